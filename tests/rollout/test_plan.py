"""The planner against sums by hand, against what the parts really hold, and what it advises."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler

from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.models.fused_layers import fuse_layers
from vidaccel.models.taehv import StreamingTinyDecoder, TinyWanDecoder
from vidaccel.rollout.chunk import Shot, Student
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.loop import rollout
from vidaccel.rollout.peak import peak_bytes
from vidaccel.rollout.plan import RolloutPlan, plan_rollout
from vidaccel.rollout.sizes import ModelSizes, RolloutSize
from vidaccel.rollout.state import new_state

GIB = 2**30
CPU = torch.device("cpu")
# Wan2.1-T2V-1.3B as published; the autoencoder's defaults are Wan's.
WAN = ModelSizes(
    transformer={
        "num_layers": 30,
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "patch_size": [1, 2, 2],
    },
    vae={},
    text_encoder_numbers=5_680_910_336,
)
WAN_480P = RolloutSize(memory=MemoryConfig(), height=480, width=832)
TINY_TRANSFORMER = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 48,
    "text_dim": 16,
    "freq_dim": 16,
    "patch_size": [1, 2, 2],
}
TINY = ModelSizes(
    transformer=TINY_TRANSFORMER,
    vae={"base_dim": 4, "num_res_blocks": 1, "dim_mult": [1, 2, 2, 2]},
    text_encoder_numbers=20_000_000,
)
TINY_SIZE = RolloutSize(memory=MemoryConfig(), height=64, width=96, text_tokens=8, dtypes={"default": torch.float32})


def plan(model: ModelSizes = TINY, size: RolloutSize = TINY_SIZE) -> RolloutPlan:
    return plan_rollout(model, size, device=CPU, free_bytes=1000 * GIB)


@pytest.fixture(scope="module")
def wan() -> RolloutPlan:
    return plan_rollout(WAN, WAN_480P, device=torch.device("cuda"), free_bytes=80 * GIB)


@pytest.fixture(scope="module")
def tiny() -> RolloutPlan:
    return plan()


def test_the_memory_of_wan_at_480p_is_three_tensors_of_the_known_size(wan: RolloutPlan) -> None:
    tokens_per_frame = (480 // 16) * (832 // 16)
    per_frame = 3 * 30 * tokens_per_frame * 12 * 128 * 2  # raw keys, rotated keys, values; layers; bfloat16
    assert per_frame == pytest.approx(1.5 * 287.5e6, rel=1e-3)
    assert [wan.bytes_of(part) for part in ("sink", "slow", "fast")] == [3 * per_frame, 12 * per_frame, 6 * per_frame]
    latents = 21 * 16 * 60 * 104 * 4
    rotary = 2 * 3 * tokens_per_frame * 128 * 4
    assert wan.bytes_of("rotary") == latents + rotary


def test_the_prompt_and_the_weights_of_wan_have_the_known_sizes(wan: RolloutPlan) -> None:
    assert wan.bytes_of("prompt") == 2 * 30 * 512 * 1536 * 2
    # 1.419 billion numbers; the time embedding and the tables of scales stay in float32.
    in_float32 = (256 * 1536 + 1536) + (1536 * 1536 + 1536) + 30 * 6 * 1536 + 2 * 1536 + 30 * 2 * 1536
    tables = 2 * 1024 * 128 * 4
    assert wan.bytes_of("transformer") == 2 * 1_418_996_800 + 2 * in_float32 + tables
    assert wan.bytes_of("text encoder") == 2 * 5_680_910_336


def test_the_features_that_the_decoder_of_wan_keeps_are_two_frames_a_convolution(wan: RolloutPlan) -> None:
    # (channels in, times the size of a latent frame, frames) of the decoder's convolutions over time, stage by stage.
    stages = [
        ([16], 1, 1),  # conv_in
        ([384] * 4, 1, 1),  # middle
        ([384] * 6, 1, 1),
        ([384], 1, 1),  # upsampling over time
        ([192] + [384] * 5, 4, 2),
        ([384], 4, 2),  # upsampling over time
        ([192] * 6, 16, 4),
        ([96] * 6, 64, 4),
        ([96], 64, 4),  # conv_out
    ]
    kept = sum(sum(channels) * area * 2 for channels, area, _ in stages) * 60 * 104 * 2
    assert wan.bytes_of("decoder") == kept


def test_the_total_is_that_of_the_phase_that_holds_most(wan: RolloutPlan) -> None:
    alone = {"denoising", "decoding"}
    always = sum(part.num_bytes for part in wan.parts if part.name not in alone)
    assert wan.total_bytes == always + wan.bytes_of("decoding") > always + wan.bytes_of("denoising")
    assert wan.fits
    assert wan.advice() == ()
    wan.check()
    dropped = plan(size=replace(TINY_SIZE, text_encoder="dropped"))
    encoding = sum(dropped.bytes_of(name) for name in ("transformer", "autoencoder", "text encoder"))
    assert dropped.total_bytes == encoding  # the text encoder is the largest here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_counted_as_they_are_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    CausalWanTransformer3DModel.from_config(TINY_TRANSFORMER).save_pretrained(tmp_path)
    loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    held = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert plan(size=replace(TINY_SIZE, dtypes={"default": dtype})).bytes_of("transformer") == held


def test_a_small_decoder_and_joined_layers_are_counted(tiny: RolloutPlan) -> None:
    torch.manual_seed(0)
    small = TinyWanDecoder(channels=(8, 6, 4, 4)).eval()
    transformer = CausalWanTransformer3DModel.from_config(TINY_TRANSFORMER)
    fuse_layers(transformer)
    model, size = replace(TINY, small_decoder=dict(small.config)), replace(TINY_SIZE, has_joined_layers=True)
    planned = plan(model, size)
    tensors = (*transformer.parameters(), *transformer.buffers())
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert planned.bytes_of("transformer") == sum(held.values()) == tiny.bytes_of("transformer")  # joined, not doubled
    assert planned.bytes_of("small decoder") == sum(tensor.nbytes for tensor in small.parameters())
    assert planned.bytes_of("autoencoder") == tiny.bytes_of("autoencoder")
    decoder, latents = StreamingTinyDecoder(small), torch.zeros(1, 16, 3, 8, 12)
    decoder.decode(latents)
    assert planned.bytes_of("decoder") == sum(tensor.nbytes for tensor in decoder.save_state()[0].values())
    assert planned.bytes_of("decoding") == peak_bytes(lambda: decoder.decode(latents), device=CPU)


def test_an_exact_state_on_disk_has_the_planned_size(tiny: RolloutPlan) -> None:
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel.from_config(TINY_TRANSFORMER)
    student = Student(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), num_inference_steps=1)
    state = new_state(student, MemoryConfig(keyframe_rule="uniform"), height=8, width=12)
    shot = Shot(start_chunk=0, prompt="a", embeddings=(torch.zeros(1, 8, 16),))
    *_, last = rollout(student, state, [shot], num_chunks=30)
    state.decoder = StreamingDecoder(AutoencoderKLWan.from_config(dict(TINY.vae)).eval())
    state.decoder.decode(last.latents)
    saved = state.save_state()[0]
    latents = sum(tensor.nbytes for name, tensor in saved.items() if name.startswith("latents."))
    assert sum(tensor.nbytes for tensor in saved.values()) - latents == tiny.state_bytes


@pytest.mark.parametrize("camera", [{}, {"camera_dim": 8, "clean_pass": "frame"}], ids=["plain", "camera"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_memory_prompt_and_decoder_hold_what_was_planned(batch_size: int, camera: dict[str, Any]) -> None:
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel.from_config(TINY_TRANSFORMER | camera)
    vae = AutoencoderKLWan.from_config(dict(TINY.vae)).eval()
    memory = MemoryConfig(sink_frames=1, slow_frames=2, fast_frames=3, chunk_frames=2, depth_every=batch_size)
    model = replace(TINY, transformer=TINY_TRANSFORMER | camera)
    planned = plan(model, replace(TINY_SIZE, memory=memory, batch_size=batch_size))

    student = Student(transformer=transformer, scheduler=None)
    state = new_state(student, memory, height=8, width=12, seeds=tuple(range(batch_size)))
    reserved = state.memory.bytes_by_part()["reserved"]
    parts = sum(planned.bytes_of(name) for name in ("sink", "slow", "fast", "rotary"))
    assert parts == reserved + batch_size * memory.total_frames * 16 * 8 * 12 * 4  # and latents of its frames

    prompt = transformer.cache_prompt(torch.zeros(batch_size, 8, 16))
    assert planned.bytes_of("prompt") == sum(keys.nbytes + values.nbytes for keys, values in prompt.layers)

    decoder = StreamingDecoder(vae)
    latents = torch.zeros(batch_size, 16, 2, 8, 12)
    for _ in range(3):
        decoder.decode(latents)
    assert planned.bytes_of("decoder") == sum(tensor.nbytes for tensor in decoder.save_state()[0].values())
    assert planned.bytes_of("decoding") == peak_bytes(lambda: decoder.decode(latents), device=CPU)


def test_a_pass_over_a_chunk_takes_what_was_planned_however_deep_the_model_is(
    tiny: RolloutPlan,
) -> None:
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel.from_config({**TINY_TRANSFORMER, "num_layers": 6})
    student = Student(transformer=transformer, scheduler=None)
    state = new_state(student, MemoryConfig(keyframe_rule="none"), height=8, width=12)
    latents = torch.zeros(1, 16, 3, 8, 12)
    with torch.no_grad():
        prompt = transformer.cache_prompt(torch.zeros(1, 8, 16))
        state.memory.begin_chunk()
    timestep = torch.zeros(1)
    taken = peak_bytes(lambda: transformer(latents, timestep, prompt, memory=state.memory), device=CPU)
    assert tiny.bytes_of("denoising") == taken


def test_the_peak_is_counted_from_making_to_letting_go() -> None:
    x = torch.empty(1000, device="meta")

    def call() -> torch.Tensor:
        y = x.view(10, 100) + 1  # 4000 bytes; the view is none of them
        z = torch.cat([y, y])  # 8000 more
        del y
        return z * 2  # 8000 more, while z lives and y is gone

    assert peak_bytes(call, device=CPU) == 16000
    assert peak_bytes(lambda: x[:10], device=CPU) == 0


def test_a_small_convolution_is_unfolded_on_a_cpu_only() -> None:
    x = torch.empty(1, 4, 3, 16, 16, device="meta")
    weight = torch.empty(8, 4, 3, 3, 3, device="meta")
    out = 8 * 14 * 14 * 4

    def call() -> torch.Tensor:
        return torch.nn.functional.conv3d(x, weight)

    assert peak_bytes(call, device=torch.device("cuda")) == out
    assert peak_bytes(call, device=CPU) == out + 4 * 27 * 14 * 14 * 4


def test_guidance_has_a_memory_and_a_prompt_of_its_own(tiny: RolloutPlan) -> None:
    one, two = tiny, plan(size=replace(TINY_SIZE, num_branches=2))
    for name in ("sink", "slow", "fast", "prompt"):
        assert two.bytes_of(name) == 2 * one.bytes_of(name)
    for name in ("transformer", "decoder", "denoising", "decoding"):
        assert two.bytes_of(name) == one.bytes_of(name)


def test_no_length_of_the_video_is_asked_for_and_only_full_memory_depends_on_it() -> None:
    window = plan(size=replace(TINY_SIZE, memory=MemoryConfig.sliding_window(21)))
    full = plan(size=replace(TINY_SIZE, memory=MemoryConfig.full(240)))
    assert full.bytes_of("fast") * 21 == window.bytes_of("fast") * 240


def test_advice_is_given_in_order_with_its_effect_up_to_what_is_enough(tiny: RolloutPlan) -> None:
    whole = tiny
    advice = replace(whole, free_bytes=whole.total_bytes - 1).advice()
    assert [one.change for one in advice] == ["drop the text encoder when the prompts are encoded"]
    assert whole.total_bytes - advice[0].saved_bytes == advice[0].total_bytes <= whole.total_bytes - 1

    advice = replace(whole, free_bytes=whole.bytes_of("transformer")).advice()
    assert [one.change.split()[0] for one in advice] == ["drop", "calculate"]
    totals = [whole.total_bytes, *(one.total_bytes for one in advice)]
    assert [before - after for before, after in itertools.pairwise(totals)] == [one.saved_bytes for one in advice]
    assert all(one.saved_bytes > 0 and not one.fits for one in advice)


def test_a_memory_is_made_no_smaller_than_needed() -> None:
    no_text = replace(TINY, text_encoder_numbers=0)
    size = replace(TINY_SIZE, dtypes={"default": torch.bfloat16}, height=128, width=128)
    whole = plan(no_text, size)
    per_frame = whole.bytes_of("sink") // 3
    (advice,) = replace(whole, free_bytes=whole.total_bytes - 4 * per_frame).advice()
    assert advice.change == "keep 6 keyframes instead of 12"
    assert advice.saved_bytes == 6 * (per_frame + 16 * 16 * 16 * 4)  # and the latents of each

    for memory in (MemoryConfig(retrieve_by="keys", retrieved_frames=8), MemoryConfig(retrieve_by="keys")):
        back = replace(whole, size=replace(size, memory=memory))
        (advice,) = replace(back, free_bytes=back.total_bytes - 4 * per_frame).advice()
        assert advice.change == "keep 6 keyframes instead of 12"
        none = replace(back, free_bytes=1).advice()
        assert any(one.change.startswith("keep 0 keyframes instead of 12") for one in none)

    long = replace(size, memory=MemoryConfig.full(240))
    whole = plan(no_text, long)
    (advice,) = replace(whole, free_bytes=whole.total_bytes - 200 * per_frame).advice()
    assert advice.change == "remember the last 39 frames instead of 240"


def test_without_room_for_the_weights_all_is_advised_and_nothing_promised(tiny: RolloutPlan) -> None:
    tight = replace(tiny, free_bytes=1)
    advice = tight.advice()
    assert not any(one.fits for one in advice)
    assert {one.change.split()[0] for one in advice} >= {"drop", "calculate"}
    with pytest.raises(UserError, match="1 MiB are free; nothing here makes it fit \\(drop the text encoder"):
        tight.check()


def test_what_does_not_fit_is_refused_with_the_changes(wan: RolloutPlan) -> None:
    tight = replace(wan, free_bytes=24 * GIB)
    words = (
        r"needs 27\.5 GiB .* on cuda and 24\.0 GiB are free; change in this order: drop the text encoder .*\(then 17"
    )
    with pytest.raises(UserError, match=words):
        tight.check()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"height": 100}, "multiples of 16 and 16; got 100 x 96"), ({"width": 0}, "multiples of 16")],
)
def test_a_size_that_the_model_cannot_make_is_refused(change: dict[str, int], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        plan(size=replace(TINY_SIZE, **change))


@pytest.mark.parametrize(
    ("transformer", "vae"),
    [
        ({}, {}),
        ({"patch_size": 2}, {}),
        ({**TINY_TRANSFORMER, "image_dim": 3}, {}),
        (TINY_TRANSFORMER, {"dim_mult": 3}),
    ],
)
def test_a_configuration_of_something_else_is_refused(transformer: dict[str, Any], vae: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is no configuration"):
        plan(ModelSizes(transformer=transformer, vae=vae))


def test_sizes_are_read_from_the_folders_of_a_model(tmp_path: Path) -> None:
    assets = Path(__file__).parents[2] / "assets" / "wan-tiny"
    model = ModelSizes.of_folders(
        transformer=assets / "transformer", vae=assets / "vae", text_encoder=assets / "text_encoder"
    )
    assert model.transformer["num_layers"] == 6
    weights = assets / "text_encoder" / "model.safetensors"
    assert 0 < model.text_encoder_numbers <= weights.stat().st_size
    planned = plan(model)
    assert json.loads(json.dumps(planned.to_dict()))["total_bytes"] == planned.total_bytes
    for text in (None, "[", "3"):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=str(tmp_path / "config.json")):
            ModelSizes.of_folders(transformer=tmp_path, vae=assets / "vae")

"""The rollout pipeline as users of diffusers call it: prompts, starts, outputs, folders, adapters, offloading."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline

from tests.support.tiny_models import (
    LATENT_CHANNELS,
    TEXT_DIM,
    WORDS,
    tiny_scheduler,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.catalog.spec import asset_path
from vidaccel.cli import run
from vidaccel.easycache.apply import apply_easycache
from vidaccel.errors import UserError
from vidaccel.machine.attention import set_attention_backend
from vidaccel.memory import MemoryConfig
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.timeline import PromptSpan, PromptTimeline

SIZE = {"height": 32, "width": 32}
PROMPT, OTHER = "a red circle moves to the left", "the blue square on green sky"


def transformer() -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def new_pipe(**settings: Any) -> Any:
    pipe = ContextForcingWanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(vocabulary_size=len(WORDS) + 3),
        vae=tiny_vae(),
        scheduler=tiny_scheduler("stochastic"),
        transformer=transformer(),
        **({"memory": "slow-fast:3+3+6@0.99", "num_inference_steps": 2} | settings),
    )
    return quiet(pipe)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return new_pipe()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def called(pipe: Any, prompt: Any = PROMPT, **changes: Any) -> Any:
    """Latents of a short video, unless `changes` say otherwise."""
    settings = {"num_frames": 21, "output_type": "latent", "generator": seeded(), **SIZE}
    return pipe(prompt, **(settings | changes)).frames


def test_a_call_is_the_stream_put_together_and_cut_to_the_frames_that_were_asked_for(pipe: Any) -> None:
    seed = int(torch.randint(2**62, (1,), generator=seeded()))
    chunks = list(pipe.stream(PROMPT, num_chunks=2, seeds=(seed,), **SIZE))
    assert [chunk.frames.shape for chunk in chunks] == [(1, 9, 3, 32, 32), (1, 12, 3, 32, 32)]
    frames = torch.cat([chunk.frames for chunk in chunks], dim=1)
    for count in (1, 8, 10, 21):
        made = called(pipe, num_frames=count, output_type="pt")
        torch.testing.assert_close(made, frames[:, :count].float() / 255)
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    assert torch.equal(called(pipe, num_frames=21), latents)
    assert torch.equal(called(pipe, num_frames=10), latents[:, :, :4])


def test_every_output_type_of_diffusers_is_given(pipe: Any) -> None:
    array, tensor, pictures = (called(pipe, num_frames=5, output_type=kind) for kind in ("np", "pt", "pil"))
    assert array.shape == (1, 5, 32, 32, 3)
    np.testing.assert_array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert np.array_equal(np.asarray(pictures[0][4]), (array[0, 4] * 255).round().astype(np.uint8))
    (alone,) = pipe(PROMPT, num_frames=5, generator=seeded(), output_type="np", return_dict=False, **SIZE)
    assert np.array_equal(alone, array)


def test_a_list_of_prompts_with_generators_makes_each_video_as_alone(pipe: Any) -> None:
    together = called(pipe, [PROMPT, OTHER], num_videos_per_prompt=2, generator=[seeded(n) for n in range(4)])
    for number in range(4):
        alone = called(pipe, [PROMPT, OTHER][number // 2], generator=seeded(number))
        torch.testing.assert_close(together[number : number + 1], alone, atol=1e-4, rtol=1e-4)
    assert called(pipe, num_videos_per_prompt=3).shape[0] == 3
    assert not torch.equal(*called(pipe, num_videos_per_prompt=2).unbind(0))


def test_a_negative_prompt_is_one_for_all_or_one_for_each(pipe: Any) -> None:
    both = [PROMPT, OTHER]
    generators = [seeded(0), seeded(1)]
    first = called(pipe, both, negative_prompt=["sky", "green"], guidance_scale=2.0, generator=generators)
    generators = [seeded(0), seeded(1)]
    second = called(pipe, both, negative_prompt="sky", guidance_scale=2.0, generator=generators)
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=1e-4)
    assert not torch.allclose(called(pipe, guidance_scale=2.0), called(pipe), atol=1e-4)


def test_embeddings_stand_for_prompts(pipe: Any) -> None:
    with torch.no_grad():
        embeddings, negative = pipe.encode_prompt([PROMPT], [""], max_sequence_length=512)
    assert torch.equal(called(pipe, None, prompt_embeds=embeddings), called(pipe))
    both = {"prompt_embeds": embeddings.double(), "negative_prompt_embeds": negative}
    assert torch.equal(called(pipe, None, guidance_scale=2.0, **both), called(pipe, guidance_scale=2.0))
    twice = called(pipe, None, prompt_embeds=embeddings, num_videos_per_prompt=2)
    assert torch.equal(twice, called(pipe, num_videos_per_prompt=2))
    names = {next(pipe.stream(prompt_embeds=part, num_chunks=1, **SIZE)).prompt for part in (embeddings, negative)}
    assert len(names) == 2  # going on under other embeddings is a change of the prompt


@pytest.mark.parametrize("kind", ["tensor", "bytes", "picture", "array"])
def test_a_picture_to_begin_with_is_the_first_frame_in_every_form(pipe: Any, kind: str) -> None:
    pixels = torch.randint(256, (3, 32, 32), generator=seeded(), dtype=torch.uint8)
    rows = pixels.permute(1, 2, 0).numpy()
    forms: dict[str, Any] = {
        "tensor": pixels.float() / 255,
        "bytes": pixels,
        "picture": Image.fromarray(rows),
        "array": rows[None].astype(np.float32) / 255,
    }
    chunks = list(pipe.stream(PROMPT, image=forms[kind], num_chunks=3, **SIZE))
    assert [chunk.frames.shape[1] for chunk in chunks] == [1, 12, 12]
    expected = list(pipe.stream(PROMPT, image=pixels, num_chunks=3, **SIZE))
    for chunk, twin in zip(chunks, expected, strict=True):
        torch.testing.assert_close(chunk.latents, twin.latents, atol=1e-4, rtol=1e-4)
    plain = next(pipe.stream(PROMPT, num_chunks=1, **SIZE))
    assert not torch.equal(chunks[1].latents, plain.latents)


def test_a_clip_is_gone_on_with_and_counts_as_frames_of_the_video(pipe: Any) -> None:
    clip = torch.rand(13, 3, 32, 32, generator=seeded())
    chunks = list(pipe.stream(PROMPT, video=clip, num_chunks=4, **SIZE))
    assert [chunk.frames.shape[1] for chunk in chunks] == [9, 4, 12, 12]
    assert called(pipe, video=clip, num_frames=25, output_type="pt").shape[1] == 25
    pictures = [Image.fromarray((frame.permute(1, 2, 0).numpy() * 255).astype(np.uint8)) for frame in clip]
    assert next(pipe.stream(PROMPT, video=pictures, **SIZE)).latents.shape[2] == 3
    both = list(pipe.stream([PROMPT, OTHER], video=clip, seeds=(1, 2), num_chunks=3, **SIZE))
    assert torch.equal(*both[0].latents.unbind(0))
    assert not torch.equal(*both[2].latents.unbind(0))


def test_a_stream_has_no_end_and_goes_on_from_its_state(pipe: Any) -> None:
    expected = list(pipe.stream(PROMPT, num_chunks=6, **SIZE))
    state = pipe.new_state(pipe.student(), **SIZE)
    begin = list(islice(pipe.stream(PROMPT, state=state, decode=False), 3))
    assert [chunk.frames for chunk in begin] == [None] * 3
    rest = list(pipe.stream(PROMPT, state=state, num_chunks=6))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(begin + rest, expected, strict=True))
    turned = list(pipe.stream(OTHER, state=state, num_chunks=7))
    assert (turned[0].index, turned[0].prompt) == (6, OTHER)
    with pytest.raises(UserError, match="A `state` has its memory already; leave out `memory`"):
        pipe.stream(PROMPT, state=state, memory="window:9")


def test_a_timeline_changes_the_prompt_at_its_time(pipe: Any) -> None:
    timeline = PromptTimeline((PromptSpan(0.0, PROMPT), PromptSpan(1.0, OTHER, "hard")))
    chunks = list(pipe.stream(timeline, num_chunks=4, **SIZE))
    assert [chunk.prompt for chunk in chunks] == [PROMPT, PROMPT, OTHER, OTHER]
    assert [chunk.frames.shape[1] for chunk in chunks] == [9, 12, 9, 12]
    assert chunks[2].sink == (6, 7, 8)


def cut_hard(*seconds: float) -> PromptTimeline:
    return PromptTimeline((PromptSpan(0.0, PROMPT), *(PromptSpan(one, OTHER, "hard") for one in seconds)))


@pytest.mark.parametrize("start", [None, "image", "video"])
@pytest.mark.parametrize(("memory", "cuts"), [(None, (0.9,)), (None, (0.9, 1.7)), ("window:1", (0.2, 0.5, 1.1))])
def test_a_call_with_hard_cuts_has_the_frames_that_were_asked_for(
    pipe: Any, start: str | None, memory: str | None, cuts: tuple[float, ...]
) -> None:
    config = pipe.memory_config() if memory is None else MemoryConfig.sliding_window(4, 1)
    given = {} if start is None else {start: torch.rand(*((9,) if start == "video" else ()), 3, 32, 32)}
    settings = {"memory": config, "num_inference_steps": 1, **given}
    for count in (34, 37):
        made = called(pipe, cut_hard(*cuts), num_frames=count, output_type="pt", **settings)
        assert made.shape[1] == count
        latents = called(pipe, cut_hard(*cuts), num_frames=count, **settings)
        chunks = list(pipe.stream(cut_hard(*cuts), num_frames=count, **settings, **SIZE))
        lengths = [chunk.frames.shape[1] for chunk in chunks]
        assert sum(lengths[:-1]) < count <= sum(lengths)
        begins_short = start != "image" or config.chunk_frames == 1
        assert lengths.count(9 if config.chunk_frames == 3 else 1) > begins_short  # at least one cut is shown
        last = chunks[-1].latents.shape[2] - (sum(lengths) - count) // 4  # no latent frame that shows nothing
        assert latents.shape[2] == sum(chunk.latents.shape[2] for chunk in chunks[:-1]) + last


def test_a_timeline_counts_in_chunks_of_the_memory_that_is_given(pipe: Any) -> None:
    timeline = PromptTimeline((PromptSpan(0.0, PROMPT), PromptSpan(9 / 16, OTHER)))
    for memory, first in ((MemoryConfig.sliding_window(4, 1), 3), (MemoryConfig.sliding_window(6, 2), 2), (None, 1)):
        chunks = list(pipe.stream(timeline, num_chunks=5, memory=memory, num_inference_steps=1, **SIZE))
        assert [chunk.prompt for chunk in chunks].index(OTHER) == first
        frames = sum(chunk.frames.shape[1] for chunk in chunks[:first])
        assert frames >= 9 > frames - chunks[first - 1].frames.shape[1]


def test_what_a_video_begins_with_comes_back_as_it_was_given_or_as_it_is_decoded(
    pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    clip = torch.randint(256, (14, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    caplog.set_level("INFO", "vidaccel")
    own, decoded = (
        list(pipe.stream(PROMPT, video=clip, num_chunks=4, decode_start=decode, **SIZE)) for decode in (False, True)
    )
    assert [line for line in caplog.messages if "13 frames" in line] == [
        "The video begins with the 13 frames of the clip, with the pixels that were given.",
        "The video begins with the 13 frames of the clip, as the autoencoder decodes them.",
    ]
    assert torch.equal(torch.cat([chunk.frames for chunk in own[:2]], dim=1)[0], clip[1:])
    latents = torch.cat([chunk.latents for chunk in decoded], dim=2)
    expected = StreamingDecoder(pipe.vae).decode(latents)
    assert torch.equal(torch.cat([chunk.frames for chunk in decoded], dim=1), expected)
    for one, other in zip(own, decoded, strict=True):
        assert torch.equal(one.latents, other.latents)
    assert all(torch.equal(one.frames, other.frames) for one, other in zip(own[2:], decoded[2:], strict=True))
    made = called(pipe, video=clip.float() / 255, num_frames=20, output_type="pt")
    assert torch.equal((made[0, :13] * 255).round().to(torch.uint8), clip[1:])
    both = next(pipe.stream([PROMPT, OTHER], image=clip[0], seeds=(1, 2), num_frames=2, **SIZE))
    assert torch.equal(both.frames[:, 0], clip[:1].expand(2, -1, -1, -1))


def test_a_start_as_long_as_the_video_is_refused(pipe: Any) -> None:
    clip = torch.rand(13, 3, 32, 32)
    for length in ({"num_frames": 13}, {"num_frames": 5}, {"num_chunks": 2}):
        with pytest.raises(UserError, match=r"has 13 frames, 0\.8125 s at 16 frames a second, and the whole video"):
            pipe.stream(PROMPT, video=clip, **length, **SIZE)
    with pytest.raises(UserError, match="The image that the video begins with has 1 frames"):
        called(pipe, image=clip[0], num_frames=1)
    assert called(pipe, video=clip, num_frames=14, output_type="pt").shape[1] == 14


def test_what_a_student_was_made_for_is_taken_and_can_be_said_otherwise() -> None:
    pipe = new_pipe(memory="sink+window:1+4", chunk_frames=1, num_inference_steps=1, guidance_scale=2.0)
    assert pipe.memory_config() == MemoryConfig.sink_and_window(1, 4, 1)
    student = pipe.student()
    assert (student.num_inference_steps, student.num_branches) == (1, 2)
    assert pipe.student(3, 1.0).passes_per_chunk == 4
    assert called(pipe, num_frames=9, memory="window:2").shape[2] == 3


def test_a_saved_pipeline_keeps_its_settings_and_makes_the_same_video(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = quiet(ContextForcingWanPipeline.from_pretrained(tmp_path, dtype=torch.float32))
    assert torch.equal(called(again), called(pipe))
    assert again.config.memory == "slow-fast:3+3+6@0.99"
    assert ContextForcingWanPipeline.from_pipe(again).config.memory == "slow-fast:3+3+6@0.99"
    formats = {"default": torch.float32, "transformer": torch.bfloat16}
    mixed = quiet(ContextForcingWanPipeline.from_pretrained(tmp_path, dtype=formats))
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float32)
    assert called(mixed, num_frames=9, output_type="np").shape == (1, 9, 32, 32, 3)


def test_a_plain_wan_folder_takes_a_student_and_its_scheduler(tiny_wan_folder: Path, pipe: Any) -> None:
    load = ContextForcingWanPipeline.from_pretrained
    made = quiet(load(tiny_wan_folder, transformer=pipe.transformer, scheduler=pipe.scheduler))
    assert called(made, memory="window:6").shape == (1, LATENT_CHANNELS, 6, 4, 4)
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler"):
        load(tiny_wan_folder, transformer=pipe.transformer)
    with pytest.raises(UserError, match="vidaccel convert"):
        load(tiny_wan_folder, scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_frames": 0}, "`num_frames` must be a whole number of at least 1, got 0"),
        ({"num_videos_per_prompt": 0}, "`num_videos_per_prompt` must be a whole number of at least 1"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a whole number of at least 1, got 0"),
        ({"output_type": "gif"}, "`output_type` must be np, pt, pil or latent; got 'gif'"),
        ({"height": 24}, "multiples of 16 and 16, got 24 and 32"),
        ({"generator": [seeded()] * 2}, "a generator for each of the 1 videos, got 2"),
        ({"negative_prompt": ["a", "b"], "guidance_scale": 2.0}, "`negative_prompt` must be a text, or one for each"),
        ({"prompt": None}, "`prompt` or `prompt_embeds`, one of them"),
        ({"prompt_embeds": torch.zeros(1, 4, TEXT_DIM)}, "`prompt` or `prompt_embeds`, one of them"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 3)}, "text tokens, 16"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 4, TEXT_DIM), "guidance_scale": 2.0},
            "negative_prompt_embeds",
        ),
        ({"prompt": []}, "`seeds` must have a whole number for every video"),
        ({"prompt": [1]}, "`prompt` must be a text"),
        ({"memory": "slow-fast:1"}, "A memory must be"),
        ({"image": torch.zeros(3, 16, 16)}, "scale and cut them first"),
        ({"image": torch.zeros(3, 32, 32), "video": torch.zeros(5, 3, 32, 32)}, "an image or a video, not both"),
        ({"video": torch.zeros(2, 5, 3, 32, 32)}, "2 clips to begin with and 1 videos"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_made_is_said_in_a_line(pipe: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        called(pipe, **{"prompt": PROMPT, **changes})


def test_a_stream_wants_a_prompt_for_every_seed(pipe: Any) -> None:
    with pytest.raises(UserError, match="each of the 1 videos"):
        pipe.stream([PROMPT, OTHER], num_chunks=1, **SIZE)
    with pytest.raises(UserError, match="of \\[2\\] prompts"):
        pipe.stream(prompt_embeds=torch.zeros(2, 4, TEXT_DIM), num_chunks=1, **SIZE)


def test_lora_layers_are_loaded_weighted_fused_and_taken_off(tmp_path: Path) -> None:
    pipe = new_pipe()
    plain = called(pipe)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    trained = transformer()
    trained.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False), "style")
    layers = get_peft_model_state_dict(trained, adapter_name="style")
    ContextForcingWanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    whole = called(pipe)
    assert not torch.allclose(whole, plain, atol=1e-3)
    pipe.set_adapters(["style"], [0.5])
    half = called(pipe)
    pipe.set_adapters(["style"], [1.0])
    latents, times = torch.randn(1, LATENT_CHANNELS, 3, 4, 4), torch.zeros(1)
    text = torch.randn(1, 4, TEXT_DIM)
    with torch.no_grad():
        scaled = pipe.transformer(latents, times, text, attention_kwargs={"scale": 0.5}).sample
        pipe.set_adapters(["style"], [0.5])
        torch.testing.assert_close(scaled, pipe.transformer(latents, times, text).sample)
    pipe.fuse_lora()
    torch.testing.assert_close(called(pipe), half, atol=1e-3, rtol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(called(pipe), plain, atol=1e-3, rtol=1e-3)


def _offloaded(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def _in_groups(pipe: Any) -> None:
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def _other_backend(pipe: Any) -> None:
    set_attention_backend(pipe.transformer, "_native_math")  # diffusers' own would change it for all later tests


def _sliced(pipe: Any) -> None:
    pipe.vae.enable_slicing()


@pytest.mark.parametrize("change", [_offloaded, _in_groups, _other_backend, _sliced])
def test_what_diffusers_offers_changes_nothing_in_the_video(pipe: Any, change: Callable[[Any], None]) -> None:
    changed = new_pipe()
    change(changed)
    for kind in ("latent", "pt"):
        expected: Tensor = called(pipe, output_type=kind)
        torch.testing.assert_close(called(changed, output_type=kind), expected, atol=5e-3, rtol=0)


def test_a_pipeline_in_half_precision_gives_floats(pipe: Any) -> None:
    half = new_pipe().to(torch.bfloat16)
    made = called(half)
    assert made.dtype == torch.float32
    assert (made - called(pipe)).abs().mean() < 0.2
    assert called(half, output_type="np", guidance_scale=2.0).dtype == np.float32


def test_what_would_not_work_is_refused_with_what_to_do(pipe: Any) -> None:
    with pytest.raises(ValueError, match="vidaccel rollout"):
        apply_easycache(pipe)
    tiled = new_pipe()
    tiled.vae.enable_tiling()
    with pytest.raises(UserError, match="disable_tiling"):
        called(tiled, output_type="np")


@pytest.mark.shipped
def test_the_embedded_student_takes_its_other_parts_from_the_embedded_model() -> None:
    formats = {"default": torch.float32, "vae": torch.bfloat16}
    pipe = quiet(ContextForcingWanPipeline.from_pretrained(asset_path(EMBEDDED_STUDENT), dtype=formats))
    assert [part.dtype for part in (pipe.transformer, pipe.text_encoder, pipe.vae)] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]
    other = ContextForcingWanPipeline.from_pretrained(asset_path(EMBEDDED_STUDENT), vae=pipe.vae)
    assert other.vae is pipe.vae


@pytest.mark.shipped
def test_the_embedded_student_is_called_streamed_and_started_from_pictures() -> None:
    pipe = quiet(ContextForcingWanPipeline.from_pretrained(asset_path(EMBEDDED_STUDENT)))
    settings = {"height": 64, "width": 64, "max_sequence_length": 64}
    prompt = "a red ball on a meadow"
    frames = pipe(prompt, num_frames=21, generator=seeded(), output_type="pt", **settings).frames
    assert frames.shape == (1, 21, 3, 64, 64)
    assert frames.std() > 0.05
    chunks = list(pipe.stream(prompt, num_chunks=2, image=frames[0, 0], **settings))
    # It goes on with the picture: what follows is nearer to it than a video of another seed.
    later = chunks[1].frames[0, 0].float() / 255
    stranger = next(pipe.stream(prompt, num_chunks=1, seeds=(5,), **settings)).frames[0, 0].float() / 255
    assert (later - frames[0, 0]).abs().mean() < (stranger - frames[0, 0]).abs().mean()
    clip = list(pipe.stream(prompt, num_chunks=3, video=frames[0, :13], **settings))
    assert [chunk.frames.shape[1] for chunk in clip] == [9, 4, 12]


@pytest.mark.shipped
def test_generate_points_to_rollout_for_the_embedded_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "a red ball", "--model", EMBEDDED_STUDENT, "--output", str(tmp_path / "out")]
    size = ["--num-frames", "9", "--height", "64", "--width", "64"]
    assert run([*arguments, *size]) == 2
    assert "vidaccel rollout" in capsys.readouterr().err
    assert run([*arguments, *size, "--no-cache"]) == 0

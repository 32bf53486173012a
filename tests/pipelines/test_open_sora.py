"""OpenSoraPipeline against the original's sampling, and what a call promises: frames given, clips, callbacks, LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import vidaccel.pipelines.open_sora as module
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from vidaccel.pipelines.open_sora import OpenSoraPipeline

from tests.support.open_sora_fixtures import largest_difference, recorded_stdit3, tensors
from tests.support.tiny_open_sora import TEXT_SIZE, run, small_pipeline
from vidaccel.errors import UserError
from vidaccel.open_sora.sizes import VideoSize

RECORDED_SIZE = VideoSize(num_frames=17, height=480, width=854, fps=24)
TOLERANCE = 2e-4  # the latents are of magnitude 9


@pytest.fixture(scope="module")
def pipe() -> OpenSoraPipeline:
    return small_pipeline()


# Sampling, against the original.


@pytest.fixture(scope="module")
def recorded_pipe() -> OpenSoraPipeline:
    return small_pipeline(transformer=recorded_stdit3())


def sampled(pipe: OpenSoraPipeline) -> Tensor:
    recorded = tensors("rflow_io")
    return pipe(
        prompt_embeds=recorded["t2v.y"][:, 0],
        prompt_attention_mask=recorded["t2v.text_mask"],
        latents=recorded["t2v.z"],
        num_frames=RECORDED_SIZE.num_frames,
        num_inference_steps=6,
        output_type="latent",
    ).frames


def sampled_with_mask(pipe: OpenSoraPipeline, case: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    recorded = {name.partition(".")[2]: tensor for name, tensor in tensors("rflow_io").items() if name.startswith(case)}
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: recorded["noise"][pipe.scheduler.step_index or 0])
    pipe._guidance_scale, pipe._num_timesteps, pipe._interrupt = 7.0, 6, False
    with torch.no_grad():
        embeds, text_mask = pipe._with_null(recorded["y"][:, 0], recorded["text_mask"].bool())
        return pipe.denoise(
            recorded["z"],
            prompt_embeds=embeds,
            prompt_attention_mask=text_mask,
            size=RECORDED_SIZE,
            mask=recorded["mask"],
        )


def test_text_to_video_samples_as_the_original(recorded_pipe: OpenSoraPipeline) -> None:
    assert largest_difference(sampled(recorded_pipe), tensors("rflow_io")["t2v.out"]) <= TOLERANCE


@pytest.mark.parametrize("case", ["masked", "ones"])
def test_masked_sampling_is_that_of_the_original(
    case: str, recorded_pipe: OpenSoraPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sampled_with_mask(recorded_pipe, case, monkeypatch)
    assert largest_difference(found, tensors("rflow_io")[f"{case}.out"]) <= TOLERANCE


def unflipped(scheduler: Any) -> Callable[..., Any]:
    step = scheduler.step
    return lambda output, *args, **kwargs: step(-output, *args, **kwargs)


def unshifted(scheduler: Any) -> Callable[..., Any]:
    plain = scheduler.set_timesteps
    return lambda sigmas, device: plain(len(sigmas), device=device)


@pytest.mark.parametrize(("name", "wrong"), [("step", unflipped), ("set_timesteps", unshifted)])
def test_a_wrong_sign_or_schedule_shows(
    name: str, wrong: Callable[..., Any], recorded_pipe: OpenSoraPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_pipe.scheduler, name, wrong(recorded_pipe.scheduler))
    assert largest_difference(sampled(recorded_pipe), tensors("rflow_io")["t2v.out"]) > 100 * TOLERANCE


def test_noise_on_frames_that_join_late_counts(
    recorded_pipe: OpenSoraPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "kept_apart", lambda generated, before, active: generated)
    found = sampled_with_mask(recorded_pipe, "masked", monkeypatch)
    assert largest_difference(found, tensors("rflow_io")["masked.out"]) > 100 * TOLERANCE


# Calls.


@pytest.mark.parametrize(
    ("output_type", "shape"), [("np", (1, 17, 32, 48, 3)), ("pt", (1, 17, 3, 32, 48)), ("latent", (1, 4, 5, 4, 6))]
)
def test_a_prompt_becomes_a_video(output_type: str, shape: tuple[int, ...], pipe: OpenSoraPipeline) -> None:
    frames = run(pipe, output_type=output_type)
    assert frames.shape == shape
    assert np.isfinite(np.asarray(frames)).all()


def test_sizes_have_names_and_lose_the_rest_over_eight(pipe: OpenSoraPipeline) -> None:
    frames = run(
        pipe, height=None, width=None, resolution="144p", aspect_ratio="3:8", num_frames=1, num_inference_steps=1
    )
    assert frames.shape == (1, 4, 1, 117 // 8, 312 // 8)


def test_a_seed_gives_a_video_and_another_one_another(pipe: OpenSoraPipeline) -> None:
    assert torch.equal(run(pipe), run(pipe))
    assert not torch.equal(run(pipe), run(pipe, seed=1))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = run(pipe, prompt=["A calm sea."] * 2, generator=generators)
    assert largest_difference(both, torch.cat([run(pipe), run(pipe, seed=1)])) <= 1e-4
    assert run(pipe, num_videos_per_prompt=2).shape[0] == 2


def test_prompts_of_different_lengths_do_not_disturb_each_other(pipe: OpenSoraPipeline) -> None:
    latents = torch.randn(1, 4, 5, 4, 6, generator=torch.Generator().manual_seed(3))
    prompts = ["A calm sea.", "A storm over the hills."]
    apart = torch.cat([run(pipe, prompt=prompt, latents=latents) for prompt in prompts])
    assert largest_difference(run(pipe, prompt=prompts, latents=latents.repeat(2, 1, 1, 1, 1)), apart) <= 1e-4
    assert largest_difference(apart[0], apart[1]) > 1e-3


def test_embeddings_stand_for_their_prompt(pipe: OpenSoraPipeline) -> None:
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(["a calm sea. aesthetic score: 6.5."], max_sequence_length=48)
    assert mask is None
    expected = run(pipe)
    assert torch.equal(run(pipe, prompt=None, prompt_embeds=embeds), expected)
    padded = torch.cat([embeds, torch.ones(1, 3, TEXT_SIZE)], dim=1)
    counts = (torch.arange(padded.shape[1]) < embeds.shape[1])[None]
    assert torch.equal(run(pipe, prompt=None, prompt_embeds=padded, prompt_attention_mask=counts), expected)


def test_the_text_is_never_longer_than_the_model_knows(pipe: OpenSoraPipeline) -> None:
    assert torch.equal(run(pipe, max_sequence_length=300), run(pipe, max_sequence_length=64))
    long = "a sea " * 40
    with torch.no_grad():
        assert pipe.encode_prompt([long])[0].shape[1] == 64


def test_the_guidance_is_that_of_two_separate_forwards(pipe: OpenSoraPipeline) -> None:
    """One step from pure noise ends at noise + velocity, for each branch as for their combination."""
    latents = torch.randn(1, 4, 5, 4, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(["a calm sea."], max_sequence_length=48)
    null = pipe.transformer.y_embedder.y_embedding[None, : embeds.shape[1]]
    given: dict[str, Any] = {"prompt": None, "latents": latents, "num_inference_steps": 1}
    cond = run(pipe, prompt_embeds=embeds, guidance_scale=1.0, **given) - latents
    assert pipe.batched_guidance == ("cond",)
    uncond = run(pipe, prompt_embeds=null, guidance_scale=1.0, **given) - latents
    guided = run(pipe, prompt_embeds=embeds, guidance_scale=7.0, **given) - latents
    assert pipe.batched_guidance == ("cond", "uncond")
    assert largest_difference(guided, uncond + 7 * (cond - uncond)) <= 1e-4


def test_a_first_image_stays_as_it_is(pipe: OpenSoraPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(5))
    known = torch.randn(1, 4, 1, 4, 6, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr(pipe, "encode_reference", lambda frames, _: known)
    made = run(pipe, image=image)
    assert torch.equal(made[:, :, :1], known)
    assert largest_difference(made[:, :, 1:], run(pipe)[:, :, 1:]) > 1e-3


def test_an_image_is_encoded_at_the_size_of_the_video(pipe: OpenSoraPipeline) -> None:
    image = torch.rand(3, 40, 80, generator=torch.Generator().manual_seed(5))
    first = run(pipe, image=image)[:, :, 0]
    assert torch.equal(first, run(pipe, image=image, guidance_scale=3.0)[:, :, 0])
    assert not torch.equal(first, run(pipe, image=1 - image)[:, :, 0])
    both = run(pipe, image=[image, 1 - image], align=None)
    assert torch.equal(both[:, :, 0], run(pipe, image=[image, image], align=None)[:, :, 0])
    assert not torch.equal(both[:, :, 4], run(pipe, image=[image, image], align=None)[:, :, 4])


def test_images_and_videos_come_in_every_kind(pipe: OpenSoraPipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (18, 40, 40, 3), dtype=np.uint8)
    shares = pixels.astype(np.float32) / 255
    tensor = torch.from_numpy(shares).permute(0, 3, 1, 2)
    pictures = [PIL.Image.fromarray(frame) for frame in pixels]
    bytes_ = (pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    one_picture = [kind[0] for kind in (pictures, shares, tensor, *bytes_)]
    first = [run(pipe, image=kind, num_inference_steps=1)[:, :, 0] for kind in one_picture]
    assert max(largest_difference(one, first[0]) for one in first) <= 1e-5
    ends = [run(pipe, video=kind, num_inference_steps=1)[:, :, :5] for kind in (pictures, shares, tensor, *bytes_)]
    assert max(largest_difference(one, ends[0]) for one in ends) <= 1e-5


def test_each_video_draws_its_reference_for_itself(pipe: OpenSoraPipeline) -> None:
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(5))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = run(pipe, prompt=["A calm sea."] * 2, image=image, generator=generators)
    apart = torch.cat([run(pipe, image=image), run(pipe, image=image, seed=1)])
    assert largest_difference(both, apart) <= 1e-4
    assert largest_difference(apart[0], apart[1]) > 1e-3


def test_two_images_serve_the_videos_of_two_prompts(pipe: OpenSoraPipeline) -> None:
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(5))
    made = run(pipe, prompt=["A calm sea."] * 2, num_videos_per_prompt=2, image=[images], num_inference_steps=1)
    assert made.shape[0] == 4
    given = made[:, :, 0]
    assert largest_difference(given[0], given[1]) < largest_difference(given[1], given[2])


def test_a_video_is_gone_on_with_from_its_end(pipe: OpenSoraPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    known = torch.randn(1, 4, 10, 4, 6, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr(pipe, "encode_reference", lambda frames, _: known)
    made = run(pipe, video=torch.rand(34, 3, 32, 48), num_frames=34)
    assert torch.equal(made[:, :, :5], known[:, :, 5:])
    edited = run(pipe, video=torch.rand(34, 3, 32, 48), num_frames=34, mask_strategy="0,0,0,0,10,0.9")
    assert not torch.equal(edited[:, :, :5], known[:, :, :5])
    assert torch.equal(run(pipe, video=torch.rand(17, 3, 32, 48), mask_strategy="0,0,0,0,5,0"), known[:, :, :5])


def test_a_long_video_is_made_of_clips_that_begin_where_the_last_one_ends(
    pipe: OpenSoraPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, starts, denoise = [], [], pipe.denoise

    def watched(latents: Tensor, **arguments: Any) -> Tensor:
        masks.append(arguments["mask"])
        starts.append((latents, denoise(latents, **arguments)))
        return starts[-1][1]

    monkeypatch.setattr(pipe, "denoise", watched)
    frames = run(pipe, prompt="|0|a calm sea|2|a storm", num_frames=34, num_loops=3, output_type="pt")
    assert frames.shape[1] == 3 * (34 - 17) + 17
    assert masks[0] is None
    assert [mask.tolist() for mask in masks[1:]] == [[[0] * 5 + [1] * 5]] * 2
    for start, made in starts[1:]:
        assert torch.equal(start[:, :, :5], made[:, :, :5])
    latents = run(pipe, prompt="|0|a calm sea|2|a storm", num_frames=34, num_loops=3)
    assert latents.shape[2] == 3 * (10 - 5) + 5
    assert torch.equal(latents[:, :, :10], starts[0][1])


def test_a_callback_sees_every_step_and_may_change_or_end_it(pipe: OpenSoraPipeline) -> None:
    seen = []

    def watch(_: Any, index: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, float(timestep), given["latents"].shape, given["prompt_embeds"].shape[0]))
        return {}

    names = ["latents", "prompt_embeds"]
    watched = run(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert [index for index, *_ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000.0
    assert seen[0][2:] == ((1, 4, 5, 4, 6), 2)
    assert torch.equal(watched, run(pipe))
    zeros = run(pipe, callback_on_step_end=lambda _, __, ___, given: {"latents": torch.zeros_like(given["latents"])})
    assert not zeros.any()

    def stop(self: Any, index: int, *_: Any) -> dict[str, Any]:
        self._interrupt = True
        return {}

    stopped = run(pipe, num_loops=2, callback_on_step_end=stop)
    assert stopped.shape[2] == 5, "the clip under way, and none behind it"
    assert not torch.equal(stopped, run(pipe))
    assert pipe.current_timestep is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "either `prompt` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 4, 32)}, "either `prompt` or `prompt_embeds`"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 65, 32)}, "1 to 64 tokens; got 65"),
        ({"height": 7}, "at least 8; got 7"),
        ({"num_loops": 0}, "`num_loops` must be at least 1"),
        ({"condition_latent_frames": 3}, "multiple of a chunk, 5; got 3"),
        ({"callback_on_step_end_tensor_inputs": ["sigma"]}, r"can be given latents, prompt_embeds; got \['sigma'\]"),
        ({"image": [torch.zeros(3, 8, 8)] * 3}, "3 images and 0 videos need a `mask_strategy`"),
        ({"image": [torch.zeros(2, 3, 8, 8)]}, "one for each prompt; got 2 for 1 videos"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.int64)}, r"whole numbers of 8 bits; got torch.int64"),
        ({"video": np.zeros((17, 8, 8, 3), dtype=np.uint16)}, r"whole numbers of 8 bits; got uint16"),
    ],
)
def test_arguments_that_cannot_work_are_refused(changes: dict[str, Any], message: str, pipe: OpenSoraPipeline) -> None:
    with pytest.raises(UserError, match=message):
        run(pipe, **changes)


def test_a_scheduler_that_shifts_by_itself_is_refused() -> None:
    pipe = small_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(UserError, match="must not shift by itself"):
        run(pipe)


# Folders, number formats, adapters, offloading.


def test_it_saves_and_loads(tmp_path: Path, pipe: OpenSoraPipeline) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = OpenSoraPipeline.from_pretrained(tmp_path)
    custom = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(module.__file__), trust_remote_code=True)
    for one in (loaded, custom):
        one.set_progress_bar_config(disable=True)
        assert torch.equal(run(one), run(pipe))
    half = OpenSoraPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    frames = run(half, output_type="pt", image=torch.rand(3, 32, 48))
    assert torch.isfinite(frames).all()
    without = OpenSoraPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    without.set_progress_bar_config(disable=True)
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(["a calm sea. aesthetic score: 6.5."], max_sequence_length=48)
    assert torch.equal(run(without, prompt=None, prompt_embeds=embeds), run(pipe))


def test_the_first_noise_is_drawn_in_the_number_format_of_the_transformer() -> None:
    pipe = small_pipeline()
    pipe.transformer.to(torch.bfloat16)
    size = VideoSize(num_frames=17, height=32, width=48, fps=24)
    noise = pipe.prepare_latents(1, size, torch.Generator().manual_seed(0), None)
    expected = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, expected.float())


def test_a_lora_is_loaded_switched_and_taken_away(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    donor = small_pipeline()
    donor.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["qkv", "proj"], init_lora_weights=False)
    )
    OpenSoraPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor.transformer), safe_serialization=True
    )
    pipe = small_pipeline()
    plain = run(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    changed = run(pipe)
    assert largest_difference(changed, plain) > 1e-3
    assert torch.equal(changed, run(donor))
    pipe.set_adapters("style", 0.5)
    assert not torch.equal(run(pipe), changed)
    pipe.disable_lora()
    assert torch.equal(run(pipe), plain)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), plain)


def test_group_offloading_changes_nothing() -> None:
    pipe = small_pipeline()
    plain = run(pipe, output_type="pt")
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert torch.equal(run(pipe, output_type="pt"), plain)

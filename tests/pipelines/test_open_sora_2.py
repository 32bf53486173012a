"""`OpenSora2Pipeline`: the published sampling written out step by step gives the same latents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import vidaccel.pipelines.open_sora_2 as module
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from vidaccel.pipelines.open_sora_2 import OpenSora2Pipeline

from tests.support.tiny_open_sora_2 import LATENT_CHANNELS, POOLED_DIM, SIZES, TEXT_DIM, tiny_open_sora_2
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache
from vidaccel.errors import UserError
from vidaccel.open_sora.version_2 import (
    CONDITIONS,
    Guidance,
    find_condition,
    finished_prompt,
    guided,
    pack,
    schedule_shift,
    token_positions,
    unpack,
    video_size,
    video_sizes,
)

PROMPT, NUM_STEPS = "a red circle moves left", 13
FRAMES, ROWS, COLUMNS = 3, 4, 6  # latents of 9 frames of 32x48


@pytest.fixture(scope="module")
def pipe() -> OpenSora2Pipeline:
    return tiny_open_sora_2()


def call(pipe: Any, prompt: str | list[str] | None = PROMPT, *, seed: int = 0, **changes: Any) -> Any:
    arguments = SIZES | {"num_inference_steps": NUM_STEPS, "output_type": "latent"} | changes
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments).frames


def slow_sampling(pipe: Any, *, noise: Tensor, mask: Tensor, references: Tensor, grows: bool) -> Tensor:
    """Three forwards a step, one after the other, whatever the condition: the published loop, spelt out."""
    texts = [pipe.encode_prompt([text], max_sequence_length=12) for text in (f"{PROMPT}. 24 FPS. 4 motion score.", "")]
    places = [
        (frame, row, column) for frame in range(FRAMES) for row in range(ROWS // 2) for column in range(COLUMNS // 2)
    ]
    shift = (1 + (ROWS * COLUMNS / 4 - 256) / 3840 * 2) * FRAMES**0.5
    levels = [1 - step / NUM_STEPS for step in range(NUM_STEPS + 1)]
    levels = [shift * level / (1 + (shift - 1) * level) for level in levels]
    condition = pack(torch.cat([mask, references], dim=1))
    latents = pack(noise)

    def predicted(text: tuple[Tensor, Tensor], condition: Tensor, level: float) -> Tensor:
        return pipe.transformer(
            hidden_states=torch.cat([latents, condition], dim=-1),
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=torch.tensor([level]),
            img_ids=torch.tensor(places).float(),
            txt_ids=torch.zeros(12, 3),
        ).sample

    for step, level in enumerate(levels[:-1]):
        swings = step >= 10 and step % 2 == 1
        text_scale, image_scale = (1.0, 1.0) if swings else (7.5, 3.0)
        scales = torch.full((FRAMES,), image_scale)
        if grows and not swings:
            end = 3.0 + (1.0 - 3.0) * step / NUM_STEPS
            scales = torch.tensor([1 + (end - 1) * frame / (FRAMES - 1) for frame in range(FRAMES)])
        tokens = torch.tensor([float(scales[place[0]]) for place in places])[None, :, None]
        cond, uncond = predicted(texts[0], condition, level), predicted(texts[1], condition, level)
        neither = predicted(texts[1], torch.zeros_like(condition), level)
        velocity = neither + tokens * (uncond - neither) + text_scale * (cond - uncond)
        latents = latents + (levels[step + 1] - level) * velocity
    return unpack(latents, (FRAMES, ROWS, COLUMNS))


def noise_of(seed: int = 0) -> Tensor:
    shape = (1, LATENT_CHANNELS, FRAMES, ROWS, COLUMNS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_text_to_video_runs_two_forwards_a_step_and_equals_the_loop_of_three(pipe: OpenSora2Pipeline) -> None:
    seen: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(len(arguments["hidden_states"])), with_kwargs=True
    )
    try:
        latents = call(pipe)
    finally:
        handle.remove()
    assert seen == [2] * NUM_STEPS
    assert pipe.batched_guidance == ("cond", "uncond")
    nothing = torch.zeros_like(noise_of())
    slow = slow_sampling(pipe, noise=noise_of(), mask=nothing[:, :1], references=nothing, grows=False)
    torch.testing.assert_close(latents, slow, atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("ends", [("image",), ("last_image",), ("image", "last_image")])
def test_images_condition_the_loop_of_three_and_stay_in_the_video(
    pipe: OpenSora2Pipeline, ends: tuple[str, ...]
) -> None:
    images = {name: torch.rand(3, 32, 48) for name in ends}
    latents = call(pipe, latents=noise_of(3), **images)
    assert pipe.batched_guidance == ("cond", "uncond", "uncond_2")
    generator = torch.Generator().manual_seed(0)
    mask, references = torch.zeros(1, 1, FRAMES, ROWS, COLUMNS), torch.zeros_like(noise_of())
    for name, image in images.items():
        place = 0 if name == "image" else -1
        encoded = pipe.vae.encode(image[None, :, None] * 2 - 1).latent_dist.sample(generator) * 0.476986
        mask[:, :, place], references[:, :, place] = 1, encoded[:, :, 0]
    slow = slow_sampling(pipe, noise=noise_of(3), mask=mask, references=references, grows=True)
    held = mask.expand_as(references) > 0
    torch.testing.assert_close(latents[~held], slow[~held], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(latents[held], references[held], atol=1e-5, rtol=0)
    assert float((latents - call(pipe, latents=noise_of(3))).abs().max()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("condition", "given"), [("v2v_head", slice(0, 9)), ("v2v_tail", slice(-9, None))])
def test_a_video_guides_nine_latent_frames_that_are_sampled_all_the_same(
    pipe: OpenSora2Pipeline, condition: str, given: slice
) -> None:
    video = torch.rand(40, 3, 32, 48)
    frames: list[Tensor] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, __, arguments: frames.append(arguments["hidden_states"]), with_kwargs=True
    )
    try:
        noise = torch.randn(1, LATENT_CHANNELS, 12, ROWS, COLUMNS)
        changes = {"video": video, "condition": condition, "num_frames": 45, "num_inference_steps": 1}
        latents = call(pipe, latents=noise, **changes)
    finally:
        handle.remove()
    side = unpack(frames[0][:, :, 4 * LATENT_CHANNELS :], (12, ROWS, COLUMNS))
    mask, references = side[:, :1], side[:, 1:]
    expected = torch.zeros(12)
    expected[given] = 1
    assert torch.equal(mask[0, 0, :, 0, 0], expected)
    assert not mask[2].any()
    assert not references[2].any()
    assert torch.equal(references[0], references[1])
    clip = video[:33] if condition == "v2v_head" else video[-33:]
    pixels = clip.transpose(0, 1)[None] * 2 - 1
    encoded = pipe.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0)) * 0.476986
    whole = torch.zeros_like(references[:1])
    whole[:, :, given] = encoded
    torch.testing.assert_close(references[:1], whole, atol=1e-5, rtol=0)
    assert not torch.equal(latents[:, :, given], references[:1, :, given])


def test_the_condition_follows_from_what_is_given_and_contradictions_are_refused() -> None:
    def found(name: str | None = None, *, frames: int = 33, **given: Any) -> Any:
        inputs = {"image": None, "last_image": None, "video": None} | given
        return find_condition(name, inputs, num_latent_frames=frames)

    assert found() is CONDITIONS["t2v"]
    assert found(image=1) is CONDITIONS["i2v_head"]
    assert found(last_image=1) is CONDITIONS["i2v_tail"]
    assert found(image=1, last_image=1) is CONDITIONS["i2v_loop"]
    assert found(video=1) is CONDITIONS["v2v_head"]
    assert found("v2v_tail_easy", video=1).tail == 17
    for words, name, given in (
        ("v2v_sideways", "v2v_sideways", {"video": 1}),
        ("`video`", "v2v_tail", {"image": 1}),
        ("neither", "i2v_head", {}),
        ("together", None, {"image": 1, "video": 1}),
    ):
        with pytest.raises(UserError, match=words):
            found(name, **given)
    with pytest.raises(UserError, match="num_frames"):
        found(video=1, frames=9)


def test_sizes_are_those_of_the_published_tables() -> None:
    assert video_size("256px", "16:9") == (192, 336)
    assert video_size("768px", "16:9") == (576, 1024)
    assert video_size("768px", "9:16") == (1024, 576)
    assert video_size("256px", "1:1") == (256, 256)
    for resolution, side in (("256px", 256), ("768px", 768)):
        for name, (height, width) in video_sizes(resolution).items():
            assert height % 16 == width % 16 == 0
            across, down = (float(part) for part in name.split(":"))
            assert math.isclose(width / height, across / down, rel_tol=0.16)
            assert 0.85 * side**2 < height * width <= side**2
    for resolution, ratio, words in (("512px", "16:9", "256px, 768px"), ("256px", "16:10", "width:height")):
        with pytest.raises(UserError, match=words):
            video_size(resolution, ratio)


@pytest.mark.parametrize(
    ("prompt", "finished"),
    [
        ("a cat", "a cat. 24 FPS. 4 motion score."),
        ("  a cat.\n", "a cat. 24 FPS. 4 motion score."),
        ("a cat. 16 FPS.", "a cat. 16 FPS. 4 motion score."),
        ("a cat at 16 FPS", "a cat at 16 FPS. 4 motion score."),
        ("", ". 24 FPS. 4 motion score."),
    ],
)
def test_prompts_end_as_in_training(prompt: str, finished: str) -> None:
    assert finished_prompt(prompt) == finished
    assert finished_prompt(prompt, motion_score=None) == finished.removesuffix(" 4 motion score.")


def test_the_shift_grows_with_tokens_and_frames() -> None:
    assert schedule_shift(256, 1) == 1
    assert schedule_shift(4096, 1) == pytest.approx(3)
    assert schedule_shift(256, 33) == pytest.approx(33**0.5)


def test_image_guidance_grows_along_the_video_and_falls_over_the_steps() -> None:
    guidance = Guidance(image_scale=3.0, grows=True)
    first = guidance.image_scales(0, num_inference_steps=50, num_latent_frames=5)
    assert first.tolist() == [1, 1.5, 2, 2.5, 3]
    late = guidance.image_scales(40, num_inference_steps=50, num_latent_frames=5)
    assert late.tolist() == pytest.approx([1, 1.1, 1.2, 1.3, 1.4])
    assert guidance.image_scales(41, num_inference_steps=50, num_latent_frames=5).tolist() == [1] * 5
    assert [guidance.text_scale(step) for step in (9, 10, 11, 12)] == [7.5, 7.5, 1, 7.5]
    steady = Guidance(oscillates=False, image_oscillates=False)
    assert steady.text_scale(11) == 7.5
    assert steady.image_scales(11, num_inference_steps=50, num_latent_frames=2).tolist() == [3, 3]


def test_guidance_of_one_needs_one_forward(pipe: OpenSora2Pipeline) -> None:
    latents = call(pipe, guidance_scale=1.0, num_inference_steps=2)
    assert pipe.batched_guidance == ("cond",)
    assert not pipe.do_classifier_free_guidance
    three = torch.randn(3, 4, 2)
    assert torch.equal(guided(three[:1], branches=1, scale=1.0, image_scales=torch.ones(2)), three[:1])
    assert torch.isfinite(latents).all()


def test_packing_goes_there_and_back_and_positions_name_the_tokens() -> None:
    latents = torch.arange(2 * 3 * 2 * 4 * 6).reshape(2, 3, 2, 4, 6).float()
    tokens = pack(latents)
    assert torch.equal(unpack(tokens, (2, 4, 6)), latents)
    for token, (frame, row, column) in enumerate(token_positions((2, 4, 6), device=torch.device("cpu")).int().tolist()):
        patch = latents[1, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(tokens[1, token], patch.flatten())


def test_every_form_of_an_image_and_of_an_output_is_taken(pipe: OpenSora2Pipeline) -> None:
    array = np.random.default_rng(0).random((40, 64, 3), dtype=np.float32)
    array = (array * 255).round() / 255
    forms = (
        array,
        torch.from_numpy(array).permute(2, 0, 1),
        PIL.Image.fromarray((array * 255).round().astype(np.uint8)),
    )
    results = [call(pipe, image=form, num_inference_steps=1) for form in forms]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-4, rtol=0)
    assert call(pipe, num_inference_steps=1, output_type="pt").shape == (1, 9, 3, 32, 48)
    assert call(pipe, num_inference_steps=1, output_type="np").shape == (1, 9, 32, 48, 3)
    assert call(pipe, num_inference_steps=1, output_type="pil")[0][0].size == (48, 32)


def test_batches_and_several_videos_of_a_prompt_match_their_own_calls(pipe: OpenSora2Pipeline) -> None:
    noise = torch.randn(4, LATENT_CHANNELS, FRAMES, ROWS, COLUMNS)
    together = call(pipe, [PROMPT, "the blue square"], latents=noise, num_videos_per_prompt=2, num_inference_steps=2)
    for index, prompt in enumerate((PROMPT, PROMPT, "the blue square", "the blue square")):
        alone = call(pipe, prompt, latents=noise[index : index + 1], num_inference_steps=2)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_embeddings_stand_in_for_prompts(pipe: OpenSora2Pipeline) -> None:
    states, pooled = pipe.encode_prompt([finished_prompt(PROMPT), ""], max_sequence_length=12)
    assert states.shape == (2, 12, TEXT_DIM)
    assert pooled.shape == (2, POOLED_DIM)
    embeds = {"prompt_embeds": states[:1], "pooled_prompt_embeds": pooled[:1]}
    embeds |= {"negative_prompt_embeds": states[1:], "negative_pooled_prompt_embeds": pooled[1:]}
    given = call(pipe, None, **embeds, num_inference_steps=2)
    torch.testing.assert_close(given, call(pipe, num_inference_steps=2), atol=1e-5, rtol=1e-5)


def test_padding_is_seen_by_t5_as_in_the_original(pipe: OpenSora2Pipeline) -> None:
    short = pipe.encode_prompt([PROMPT], max_sequence_length=8)[0]
    ids = pipe.tokenizer_2(PROMPT, padding="max_length", max_length=8, return_tensors="pt")
    masked = pipe.text_encoder_2(**ids).last_hidden_state
    unmasked = pipe.text_encoder_2(ids.input_ids).last_hidden_state
    assert torch.equal(short, unmasked)
    assert not torch.allclose(short, masked)


def test_callbacks_see_the_steps_may_change_them_and_may_interrupt(pipe: OpenSora2Pipeline) -> None:
    seen: list[tuple[int, float, tuple[str, ...]]] = []

    def on_step(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, float(timestep), tuple(tensors)))
        pipe._interrupt = index == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = call(pipe, callback_on_step_end=on_step)
    assert not latents.any()
    assert [step[0] for step in seen] == [0, 1]
    assert seen[0][1:] == (1000.0, ("latents",))
    assert pipe.num_timesteps == NUM_STEPS
    assert pipe.current_timestep is None
    names = ["prompt_embeds", "negative_pooled_prompt_embeds"]
    shapes: list[Any] = []
    call(
        pipe,
        num_inference_steps=1,
        callback_on_step_end=lambda *arguments: shapes.append({k: v.shape for k, v in arguments[3].items()}) or {},
        callback_on_step_end_tensor_inputs=names,
    )
    assert shapes == [{"prompt_embeds": (1, 12, TEXT_DIM), "negative_pooled_prompt_embeds": (1, POOLED_DIM)}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 40}, "`height` must be a positive multiple of 16, got 40"),
        ({"num_frames": 10}, r"`num_frames` must be 4k \+ 1, got 10"),
        ({"prompt": None}, "either `prompt` or"),
        ({"latents": torch.zeros(1)}, "`latents` must have shape"),
        ({"callback_on_step_end_tensor_inputs": ["mask"]}, "mask"),
        ({"negative_prompt": ["a", "b", "c"]}, "Negative prompts"),
        ({"video": torch.zeros(20, 3, 32, 48), "num_frames": 45}, "33 frames of `video`, got 20"),
        ({"image": torch.zeros(3, 3, 32, 48)}, "one for each of 1"),
        ({"height": None, "resolution": "1px"}, "256px"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pipe: OpenSora2Pipeline, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(pipe, **({"prompt": PROMPT} | changes))


def test_a_scheduler_with_a_shift_of_its_own_keeps_it(pipe: OpenSora2Pipeline) -> None:
    before = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    try:
        call(pipe, num_inference_steps=4)
        assert pipe.scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 5000 / 6, 625])
    finally:
        pipe.scheduler = before


def test_it_saves_and_loads_whole_and_as_a_custom_pipeline(pipe: OpenSora2Pipeline, tmp_path: Path) -> None:
    expected = call(pipe, num_inference_steps=2)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "OpenSora2Pipeline"
    custom = {"custom_pipeline": str(module.__file__), "trust_remote_code": True}
    for loaded in (
        OpenSora2Pipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, **custom),
    ):
        loaded.set_progress_bar_config(disable=True)
        assert not loaded.vae.use_framewise_decoding
        assert torch.equal(call(loaded, num_inference_steps=2), expected)


def test_easycache_reuses_steps_of_text_and_of_image_to_video(pipe: OpenSora2Pipeline) -> None:
    for inputs in ({}, {"image": torch.rand(3, 32, 48)}):
        plain = call(pipe, **inputs)
        for threshold in (0.0, 10.0):
            apply_easycache(pipe, EasyCacheConfig(threshold=threshold, warmup_steps=3))
            try:
                cached = call(pipe, **inputs)
                report = easycache_report(pipe)
            finally:
                remove_easycache(pipe)
            assert (report.num_reused > 0) == (threshold > 0)
            assert torch.equal(cached, plain) == (threshold == 0)
            assert torch.isfinite(cached).all()


def test_a_lora_changes_the_video_and_can_be_taken_away(pipe: OpenSora2Pipeline) -> None:
    plain = call(pipe, num_inference_steps=2)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    name = "transformer.transformer_blocks.0.attn.to_q"
    lora = {
        f"{name}.lora_A.weight": torch.randn(2, weight.shape[1]),
        f"{name}.lora_B.weight": torch.randn(weight.shape[0], 2),
    }
    pipe.load_lora_weights(lora)
    assert not torch.allclose(call(pipe, num_inference_steps=2), plain)
    pipe.unload_lora_weights()
    assert torch.equal(call(pipe, num_inference_steps=2), plain)

"""One video from one request: the pipeline's own result, counted and timed truly, and refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.support.tiny_models import tiny_wan_v2v
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.generation.generate import check_request, generate, unknown_words, warm_up
from vidaccel.generation.loading import load_pipeline
from vidaccel.generation.recorder import StepProgress
from vidaccel.generation.request import GenerationRequest

REQUEST = GenerationRequest("a red circle", num_frames=5, height=32, width=32, num_inference_steps=14)
REUSING = EasyCacheConfig(threshold=1.0, warmup_steps=3)


@pytest.fixture(scope="module")
def pipe(tiny_wan_folder: Path) -> DiffusionPipeline:
    return load_pipeline(str(tiny_wan_folder), device="cpu", dtype="float32")


def count_forwards(pipe: Any) -> list[int]:
    """A list that grows with every forward of the transformer's last layer: a slow twin of the own count."""
    calls: list[int] = []
    pipe.transformer.proj_out.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_video_is_the_one_the_pipeline_makes_by_itself(pipe: DiffusionPipeline) -> None:
    made = generate(pipe, REQUEST)
    plain = pipe(
        "a red circle",
        negative_prompt="",
        num_frames=5,
        height=32,
        width=32,
        num_inference_steps=14,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames[0]
    assert made.frames.shape == (5, 3, 32, 32)
    assert made.frames.dtype == torch.float32
    assert torch.equal(made.frames, plain)
    assert made.report is None


def test_a_callback_without_the_names_of_tensors_still_reports_steps(tiny_wan_folder: Path) -> None:
    pipe = load_pipeline(str(tiny_wan_folder), device="cpu", dtype="float32")

    class Older(type(pipe)):  # type: ignore[misc]
        def __call__(
            self,
            prompt: str,
            height: int = 32,
            width: int = 32,
            num_frames: int = 5,
            num_inference_steps: int = 14,
            guidance_scale: float = 5.0,
            generator: Any = None,
            output_type: str = "pt",
            callback_on_step_end: Any = None,
        ) -> Any:
            sizes = {"height": height, "width": width, "num_frames": num_frames}
            return super().__call__(
                prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generator,
                output_type=output_type,
                callback_on_step_end=callback_on_step_end,
                **sizes,
            )

    pipe.__class__ = Older
    seen: list[StepProgress] = []
    generate(pipe, REQUEST, on_step=seen.append)
    assert [(step.step_index, step.num_steps) for step in seen] == [(index, 14) for index in range(14)]


def test_forwards_that_really_ran_are_counted(tiny_wan_folder: Path) -> None:
    pipe = load_pipeline(str(tiny_wan_folder), device="cpu", dtype="float32")
    calls = count_forwards(pipe)
    plain = generate(pipe, REQUEST)
    assert plain.num_forwards == len(calls) == 28
    calls.clear()
    cached = generate(pipe, REQUEST, easycache=REUSING)
    assert cached.report is not None
    assert cached.report.num_reused > 0
    assert cached.num_forwards == len(calls) == cached.report.num_computed_passes < 28


def test_easycache_is_gone_after_the_call_and_after_a_failed_one(
    pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(pipe, REQUEST)
    generate(pipe, REQUEST, easycache=REUSING)
    assert torch.equal(generate(pipe, REQUEST).frames, plain.frames)

    def fail(step: StepProgress) -> None:
        if step.step_index == 5:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, REQUEST, easycache=REUSING, on_step=fail)
    again = generate(pipe, REQUEST)
    assert torch.equal(again.frames, plain.frames)
    assert again.num_forwards == 28


def test_every_step_is_reported_with_what_was_decided(pipe: DiffusionPipeline) -> None:
    steps: list[StepProgress] = []
    made = generate(pipe, REQUEST, easycache=REUSING, on_step=steps.append)
    assert made.report is not None
    assert [step.step_index for step in steps] == list(range(14))
    assert {step.num_steps for step in steps} == {14}
    assert [step.computed for step in steps] == [decision.computed for decision in made.report.decisions]
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
    assert steps[-1].seconds == pytest.approx(made.denoising_seconds)


def test_denoising_is_a_part_of_the_whole(pipe: DiffusionPipeline) -> None:
    made = generate(pipe, REQUEST)
    assert 0 < made.denoising_seconds < made.total_seconds


def test_a_warm_up_changes_nothing(pipe: DiffusionPipeline) -> None:
    before = generate(pipe, REQUEST).frames
    warm_up(pipe, REQUEST)
    assert torch.equal(generate(pipe, REQUEST).frames, before)


def test_the_seed_and_nothing_else_draws_the_noise(pipe: DiffusionPipeline) -> None:
    torch.manual_seed(1)
    first = generate(pipe, REQUEST).frames
    torch.manual_seed(2)
    assert torch.equal(generate(pipe, REQUEST).frames, first)
    other = GenerationRequest("a red circle", num_frames=5, height=32, width=32, num_inference_steps=14, seed=1)
    assert not torch.equal(generate(pipe, other).frames, first)


def test_unknown_words_are_named_once_in_order_without_punctuation(pipe: DiffusionPipeline) -> None:
    assert unknown_words(pipe, "a Zebra, red and a (unicorn) Zebra!") == ("Zebra", "unicorn")
    assert unknown_words(pipe, "A Red circle") == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "a zebra"}, "does not know zebra"),
        ({"prompt": "a red circle", "negative_prompt": "unicorn"}, "does not know unicorn"),
        ({"prompt": "a red circle", "max_sequence_length": 3}, "longer than 3 tokens"),
    ],
)
def test_words_without_effect_are_warned_about(
    pipe: DiffusionPipeline, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("vidaccel.generation.generate.logger.warning", lambda text, *values: said.append(text % values))
    generate(pipe, GenerationRequest(**changes, num_frames=1, height=16, width=16, num_inference_steps=2))
    assert [text for text in said if words in text] == said != []


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": " "},
        {"prompt": "a", "num_inference_steps": 0},
        {"prompt": "a", "guidance_scale": float("inf")},
        {"prompt": "a", "seed": 2**63},
        {"prompt": "a", "max_sequence_length": 0},
    ],
)
def test_a_request_refuses_nonsense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="`"):
        GenerationRequest(**wrong)


def test_a_pipeline_that_needs_more_than_a_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="WanVideoToVideoPipeline"):
        check_request(tiny_wan_v2v(), REQUEST)


class TestImageToVideo:
    @pytest.fixture
    def pipe(self, tiny_wan_folder: Path) -> Any:
        from diffusers import WanImageToVideoPipeline

        from tests.support.tiny_models import tiny_wan_i2v

        text = load_pipeline(str(tiny_wan_folder), device="cpu", dtype="float32")
        parts = {name: part for name, part in tiny_wan_i2v().components.items() if part is not None}
        pipe = WanImageToVideoPipeline(**parts, tokenizer=text.tokenizer, text_encoder=text.text_encoder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_the_image_decides_the_video(self, pipe: Any) -> None:
        made = []
        for value in (0.0, 1.0):
            image = torch.full((3, 32, 32), value)
            request = GenerationRequest(
                "a red circle", inputs={"image": image}, num_frames=5, height=32, width=32, num_inference_steps=3
            )
            made.append(generate(pipe, request).frames)
        assert made[0].shape == (5, 3, 32, 32)
        assert not torch.equal(made[0], made[1])

    def test_a_missing_image_is_asked_for(self, pipe: Any) -> None:
        with pytest.raises(UserError, match="--image"):
            generate(pipe, REQUEST)


def test_an_image_for_a_text_model_is_refused(pipe: DiffusionPipeline) -> None:
    request = GenerationRequest(
        "a red circle", inputs={"image": torch.rand(3, 32, 32)}, num_frames=5, height=32, width=32
    )
    with pytest.raises(UserError, match="takes no image"):
        generate(pipe, request)

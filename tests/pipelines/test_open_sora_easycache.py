"""EasyCache on Open-Sora 1.2: both branches in one batch, a learned sigma behind the velocity, frames given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vidaccel.pipelines.easycache_open_sora import EasyCacheOpenSoraPipeline

from tests.support.tiny_open_sora import run, small_pipeline
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache

CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)
STEPS = {"num_inference_steps": 9}


def forwards_of(pipe: Any) -> list[int]:
    """Grows by one with each pass through the first block."""
    passes: list[int] = []
    pipe.transformer.spatial_blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("guidance_scale", [7.0, 1.0])
def test_threshold_zero_equals_the_plain_call_and_a_larger_one_saves_forwards(guidance_scale: float) -> None:
    pipe, arguments = small_pipeline(), {**STEPS, "guidance_scale": guidance_scale}
    plain = run(pipe, **arguments)
    apply_easycache(pipe, EasyCacheConfig(threshold=0))
    assert torch.equal(run(pipe, **arguments), plain)
    assert easycache_report(pipe).num_reused == 0
    remove_easycache(pipe)
    passes = forwards_of(pipe)
    apply_easycache(pipe, CONFIG)
    reused = run(pipe, **arguments)
    report = easycache_report(pipe)
    assert report.num_steps == 9
    assert report.num_reused > 0
    assert len(passes) == report.num_computed
    assert torch.isfinite(reused).all()
    assert not torch.equal(reused, plain)
    remove_easycache(pipe)
    assert torch.equal(run(pipe, **arguments), plain)


def test_a_reused_step_adds_the_last_change_to_the_velocity_as_the_model_signs_it() -> None:
    """Equation 3 on the transformer's own output, `clean - noise`: output = input + (last output - last input)."""
    pipe = small_pipeline()
    inputs, outputs = [], []
    apply_easycache(pipe, EasyCacheConfig(threshold=1e9, warmup_steps=2))
    forward = pipe.transformer.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        inputs.append(kwargs["hidden_states"])
        outputs.append(forward(*args, **kwargs)[0])
        return (outputs[-1],)

    watched.__wrapped__ = forward  # type: ignore[attr-defined]
    pipe.transformer.forward = watched
    run(pipe, num_inference_steps=4)
    assert [step.computed for step in easycache_report(pipe).decisions] == [True, True, False, True]
    expected = inputs[2] + (outputs[1][:, :4] - inputs[1])
    torch.testing.assert_close(outputs[2][:, :4], expected)
    assert outputs[2].shape == outputs[1].shape


def test_samples_may_decide_for_themselves() -> None:
    pipe = small_pipeline()
    prompts = ["A calm sea.", "A storm over the hills."]
    run_both = {"prompt": prompts, **STEPS}
    plain = run(pipe, **run_both)
    apply_easycache(pipe, EasyCacheConfig(threshold=0, decisions="sample"))
    assert torch.equal(run(pipe, **run_both), plain)
    remove_easycache(pipe)
    apply_easycache(pipe, EasyCacheConfig(threshold=0.5, warmup_steps=3, decisions="sample"))
    assert torch.isfinite(run(pipe, **run_both)).all()
    assert easycache_report(pipe).num_reused > 0


def test_given_frames_stay_and_the_clips_of_a_text_are_sections_of_one_report() -> None:
    pipe = EasyCacheOpenSoraPipeline.from_pipe(small_pipeline())
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(5))
    arguments: dict[str, Any] = {"image": image, "num_loops": 2, "num_frames": 34, **STEPS}
    plain = run(pipe, threshold=0, **arguments)
    output = pipe_output(pipe, easycache=CONFIG, **arguments)
    assert torch.equal(output.frames[:, :, 0], plain[:, :, 0])
    assert torch.isfinite(output.frames).all()
    decisions = output.report.decisions
    assert [(step.section, step.step_index) for step in decisions] == [
        (clip, step) for clip in (0, 1) for step in range(9)
    ]
    for clip in (decisions[:9], decisions[9:]):
        assert all(step.computed for step in (*clip[:3], clip[-1])), "warm-up and tail of each clip"
        assert not all(step.computed for step in clip)
    again = pipe_output(pipe, easycache=CONFIG, **arguments)
    assert torch.equal(again.frames, output.frames)
    assert again.report.num_steps == 18, "of the present call alone"


def test_clips_of_other_texts_are_reported_from_the_last_change_of_the_text_on() -> None:
    pipe = EasyCacheOpenSoraPipeline.from_pipe(small_pipeline())
    arguments: dict[str, Any] = {"prompt": "|0|a calm sea|1|a storm", "num_loops": 3, "num_frames": 34, **STEPS}
    report = pipe_output(pipe, easycache=CONFIG, **arguments).report
    assert [step.section for step in report.decisions] == [0] * 9 + [1] * 9


def test_frames_that_join_late_do_not_keep_reuse_from_being_exact_at_zero() -> None:
    pipe = EasyCacheOpenSoraPipeline.from_pipe(small_pipeline())
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(5))
    arguments = {"image": image, "mask_strategy": "0,0,0,0,1,0.8", **STEPS}
    plain = run(small_pipeline(), **arguments)
    assert torch.equal(run(pipe, threshold=0, **arguments), plain)
    assert torch.isfinite(run(pipe, easycache=CONFIG, **arguments)).all()


def pipe_output(pipe: Any, **changes: Any) -> Any:
    """The whole output of what `run` calls."""
    outputs = []

    def call(**arguments: Any) -> Any:
        outputs.append(pipe(**arguments))
        return outputs[-1]

    run(call, **changes)
    return outputs[-1]

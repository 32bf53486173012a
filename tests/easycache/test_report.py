"""What is told: one record a step, the last finished call, and a warning with its reason where nothing was gained."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.family_calls import call_inputs
from tests.support.tiny_models import call_arguments, tiny_scheduler, tiny_wan_t2v, tiny_wan_two_experts
from vidaccel import EasyCacheConfig, EasyCacheReport, apply_easycache, easycache_report, remove_easycache
from vidaccel.easycache.report import StepDecision
from vidaccel.random_models.build import build_random

NUM_STEPS = 12
CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)


def run(pipe: Any, **changes: Any) -> Tensor:
    return pipe(**call_arguments(pipe, **({"num_inference_steps": NUM_STEPS} | changes))).frames


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("vidaccel")]


def test_every_step_is_reported_while_it_is_decided_and_in_the_end() -> None:
    pipe = tiny_wan_t2v()
    told: list[StepDecision] = []
    handle = apply_easycache(pipe, CONFIG, on_step=told.append)
    run(pipe)
    decisions = easycache_report(pipe).decisions
    assert [step.step_index for step in told] == list(range(NUM_STEPS))
    for early, late in zip(told, decisions, strict=True):
        assert (early.computed, early.reason) == (late.computed, late.reason)
        assert (early.predicted_change, early.accumulated_error) == (late.predicted_change, late.accumulated_error)
        assert (early.num_passes, late.num_passes) == (1, 2)
    handle.on_step = None
    run(pipe)
    assert len(told) == NUM_STEPS


def test_the_records_follow_the_rule() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    run(pipe)
    decisions = easycache_report(pipe).decisions
    assert decisions[0].transformation_rate is None
    assert all(step.transformation_rate > 0 for step in decisions[1:])
    error = 0.0
    for before, step in pairwise(decisions):
        if not step.computed:
            assert step.transformation_rate == before.transformation_rate
        if step.reason in ("above_threshold", "below_threshold"):
            error = (0.0 if before.computed else error) + step.predicted_change
            assert step.accumulated_error == pytest.approx(error, rel=1e-5)
            assert step.computed == (step.accumulated_error >= CONFIG.threshold)
        else:
            assert step.predicted_change is None
    assert all(step.seconds == 0 for step in decisions if not step.computed)
    assert all(step.seconds > 0 for step in decisions if step.computed)


def test_a_report_is_plain_data(tmp_path: Path) -> None:
    pipe = tiny_wan_two_experts()
    apply_easycache(pipe, CONFIG)
    run(pipe)
    report = easycache_report(pipe)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["num_computed"] + data["num_reused"] == data["num_steps"] == len(data["decisions"]) == NUM_STEPS
    assert data["num_passes"] == 2 * NUM_STEPS
    assert data["config"] == CONFIG.to_dict()
    assert {"step_index", "computed", "reason", "predicted_change", "accumulated_error", "transformation_rate"} <= set(
        data["decisions"][0]
    )
    assert {step["transformer"] for step in data["decisions"]} == {"transformer", "transformer_2"}


def test_a_report_of_numbers_that_are_not_finite_is_strict_json_and_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, EasyCacheConfig(threshold=float("inf"), warmup_steps=3))
    run(pipe, callback_on_step_end=lambda pipe, step, time, kwargs: {"latents": kwargs["latents"] * float("nan")})
    report = easycache_report(pipe)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert float(data["config"]["threshold"]) == math.inf
    assert math.isnan(float(data["decisions"][5]["accumulated_error"]))
    assert data["decisions"][5]["reason"] == "not_finite"
    assert report.save_picture(tmp_path / "report.png").exists()
    (message,) = warnings_of(caplog)
    assert "not_finite" in message
    assert "smallest" not in message, "there is no smallest of numbers that are not finite"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_report_draws_itself(tmp_path: Path, ending: str) -> None:
    pipe = tiny_wan_two_experts()
    apply_easycache(pipe, CONFIG)
    run(pipe)
    path = easycache_report(pipe).save_picture(tmp_path / f"report.{ending}")
    assert path.stat().st_size > 10_000


def test_sections_are_drawn_one_after_the_other_and_shares_of_samples_as_heights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    samples = [(True, True), (True, False), (False, False), (True, True), (False, True)]
    steps = tuple(
        StepDecision(
            step_index=place % 3,
            section=place // 3,
            computed=any(each),
            samples=each,
            reason="warmup",
            accumulated_error=0.1,
            transformation_rate=1.0,
            seconds=1.0,
        )
        for place, each in enumerate(samples)
    )
    report = EasyCacheReport(decisions=steps, config={"threshold": 0.1})
    report.save_picture(tmp_path / "picture.png")
    error, rate, time = figures[0].axes
    assert sorted(x for line in error.lines[:2] for x in line.get_xdata()) == [0, 1, 2, 3, 4]
    assert list(rate.lines[0].get_xdata()) == [0, 1, 2, 3, 4]
    assert [bar.get_x() + 0.4 for bar in time.patches] == pytest.approx([0, 1, 2, 3, 4])
    assert [span.get_height() for span in error.patches] == [1, 0.5, 1, 0.5]
    assert [line.get_xdata()[0] for line in time.lines] == [2.5]
    assert time.get_xlabel() == "denoising step, 2 sections"


def test_an_empty_report_is_not_drawn_and_an_untimed_one_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no steps"):
        EasyCacheReport(decisions=(), config={"threshold": 0.1}).save_picture(tmp_path / "empty.png")
    untimed = EasyCacheReport(
        decisions=(StepDecision(step_index=0, computed=True, reason="warmup"),), config={"threshold": 0.1}
    )
    assert untimed.seconds_saved is None
    assert untimed.save_picture(tmp_path / "untimed.png").exists()


def test_seconds_saved_compare_reused_steps_with_a_median_computed_one() -> None:
    def step(index: int, computed: bool, seconds: float) -> StepDecision:
        reason = "warmup" if computed else "below_threshold"
        return StepDecision(step_index=index, computed=computed, reason=reason, seconds=seconds)  # type: ignore[arg-type]

    steps = (step(0, True, 9.0), step(1, True, 2.0), step(2, True, 2.0), step(3, False, 0.5), step(4, False, 0.0))
    assert EasyCacheReport(decisions=steps, config={}).seconds_saved == 2 * 2.0 - 0.5
    partly = replace(step(5, True, 1.25), samples=(True, False))
    assert EasyCacheReport(decisions=(*steps, partly), config={}).seconds_saved == 3 * 2.0 - 0.5 - 1.25


def test_a_report_needs_a_finished_call() -> None:
    pipe = tiny_wan_t2v()
    with pytest.raises(ValueError, match="not applied"):
        easycache_report(pipe)
    with pytest.raises(ValueError, match="not applied"):
        remove_easycache(pipe)
    apply_easycache(pipe, CONFIG)
    with pytest.raises(ValueError, match="no report yet"):
        easycache_report(pipe)
    run(pipe)
    assert easycache_report(pipe).num_steps == easycache_report(pipe.transformer).num_steps == NUM_STEPS


def test_an_exception_in_the_model_frees_its_memory_at_once() -> None:
    pipe = tiny_wan_t2v()
    state = apply_easycache(pipe, CONFIG)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    pipe.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(pipe)
    assert state.tensors() == []
    assert state.report is None


def test_a_call_that_fails_after_its_last_step_is_not_a_finished_one() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    run(pipe, num_inference_steps=9)

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = pipe.vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        run(pipe, output_type="pt")
    assert easycache_report(pipe).num_steps == 9
    handle.remove()
    run(pipe, output_type="pt")
    assert easycache_report(pipe).num_steps == NUM_STEPS


def test_asking_for_the_report_in_the_middle_of_a_call_changes_nothing() -> None:
    pipe, watched = tiny_wan_t2v(), tiny_wan_t2v()
    for each in (pipe, watched.transformer):
        apply_easycache(each, CONFIG)
    expected = run(pipe)
    run(watched)
    seen: list[int] = []

    def ask(*_: Any) -> None:
        seen.append(easycache_report(watched.transformer).num_steps)

    watched.transformer.register_forward_hook(ask)
    watched.transformer.patch_embedding.register_forward_pre_hook(ask)
    assert torch.equal(run(watched), expected)
    assert set(seen) == {NUM_STEPS}
    assert easycache_report(watched).num_passes == 2 * NUM_STEPS


@pytest.mark.parametrize("num_steps", [1, 4, 5])
def test_a_schedule_too_short_to_reuse_warns_once(num_steps: int, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    run(pipe, num_inference_steps=num_steps)
    (message,) = warnings_of(caplog)
    assert f"of {num_steps} steps the first 3 and the last 1 are always computed" in message


def test_a_schedule_long_enough_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    run(pipe)
    assert easycache_report(pipe).num_reused > 0
    assert warnings_of(caplog) == []


def test_a_run_that_reused_nothing_says_why(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, EasyCacheConfig(threshold=1e-6, warmup_steps=3))
    for count in (1, 2):
        run(pipe)
        assert len(warnings_of(caplog)) == count, "once for every run"
    errors = [step.accumulated_error for step in easycache_report(pipe).decisions]
    least = min(error for error in errors if error is not None)
    assert f"reused none of {NUM_STEPS} steps" in warnings_of(caplog)[0]
    assert f"{least:.4g}" in warnings_of(caplog)[0]


def test_threshold_zero_is_a_choice_and_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, EasyCacheConfig(threshold=0, warmup_steps=3))
    run(pipe)
    assert warnings_of(caplog) == []


def test_a_scheduler_that_adds_noise_in_every_step_warns_by_name(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_wan_t2v(scheduler="stochastic")
    apply_easycache(pipe, CONFIG)
    run(pipe)
    assert any("FlowMatchEulerDiscreteScheduler adds fresh noise" in message for message in warnings_of(caplog))
    caplog.clear()
    pipe.scheduler = tiny_scheduler("euler")
    run(pipe)
    assert warnings_of(caplog) == []


def test_a_model_in_training_mode_is_not_silently_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    pipe.transformer.train()
    run(pipe)
    (message,) = warnings_of(caplog)
    assert "training mode" in message


def test_gradients_by_oversight_are_told_and_training_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    arguments = {
        "hidden_states": torch.randn(1, 16, 3, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
    }
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    pipe.transformer.train()
    pipe.transformer(**arguments)
    assert warnings_of(caplog) == []
    pipe.transformer.eval()
    for _ in range(2):
        pipe.transformer(**arguments)
    (message,) = warnings_of(caplog)
    assert "torch.no_grad()" in message


def test_timesteps_that_rise_are_told_where_nothing_else_tells_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    transformer = tiny_wan_t2v().transformer
    arguments = {"hidden_states": torch.randn(1, 16, 3, 4, 4), "encoder_hidden_states": torch.randn(1, 6, 16)}
    apply_easycache(transformer, EasyCacheConfig(threshold=0.5, warmup_steps=3, num_inference_steps=NUM_STEPS))
    with torch.no_grad():
        for times in (range(NUM_STEPS, 0, -1), range(NUM_STEPS, 0, -1)):
            for time in times:
                transformer(timestep=torch.tensor([time]), **arguments)
        assert not any("rise" in message for message in warnings_of(caplog))
        for time in range(NUM_STEPS):
            transformer(timestep=torch.tensor([time]), **arguments)
    assert sum("rise" in message for message in warnings_of(caplog)) == 1


def test_the_report_needs_no_more_than_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """Reports outlive EasyCache: they hold numbers only."""
    caplog.set_level(logging.WARNING)
    pipe = tiny_wan_t2v()
    handle = apply_easycache(pipe, CONFIG)
    run(pipe)
    report = easycache_report(pipe)
    remove_easycache(pipe)
    assert handle.report == report
    assert not any(isinstance(value, torch.Tensor) for step in report.decisions for value in vars(step).values())
    assert all(math.isfinite(step.seconds) for step in report.decisions)


@pytest.mark.parametrize("ar_step", [0, 2], ids=["frames together", "frames one after the other"])
def test_every_window_of_a_long_video_has_its_own_number_of_steps_and_its_tail(ar_step: int) -> None:
    """All windows of SkyReels-V2 share one tensor of timesteps; the first one alone may take more steps."""
    pipe = build_random("skyreels-v2-df-t2v")
    pipe.set_progress_bar_config(disable=True)
    apply_easycache(pipe, EasyCacheConfig(threshold=math.inf, warmup_steps=3))
    inputs = call_inputs("skyreels-v2-df-t2v", num_inference_steps=8, output_type="latent", num_frames=17)
    windows = {"base_num_frames": 9, "overlap_history": 5, "ar_step": ar_step, "causal_block_size": 1}
    for _ in range(2):
        pipe(**inputs | windows)
        decisions = easycache_report(pipe).decisions
        assert decisions[-1].section == 2
        for section in range(3):
            steps = [step for step in decisions if step.section == section]
            assert [step.step_index for step in steps] == list(range(len(steps)))
            assert [step.reason for step in steps[:3]] == ["warmup"] * 3
            assert {step.reason for step in steps[3:-1]} == {"below_threshold"}
            assert steps[-1].reason == "tail"


def test_a_call_that_failed_in_decoding_is_no_section_of_the_next_one_with_the_same_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    inputs = call_arguments(pipe, num_inference_steps=NUM_STEPS, output_type="pt")
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", fail)
        with pytest.raises(MemoryError):
            pipe(**inputs)
    pipe(**inputs)
    steps = easycache_report(pipe).decisions
    assert [(step.section, step.step_index) for step in steps] == [(0, index) for index in range(NUM_STEPS)]

"""Where a call ends: on bare transformers, in anyone's pipelines, with two evaluations a step; no old reports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, WanPipeline
from torch import Tensor, nn

from tests.support.family_runs import counted_forwards
from tests.support.tiny_models import call_arguments, tiny_transformer, tiny_wan_t2v, tiny_wan_two_experts, tiny_wan_v2v
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report
from vidaccel.catalog.table import has_several_loops
from vidaccel.easycache.report import StepDecision
from vidaccel.random_models.build import build_random

NUM_STEPS = 8
LASTING = EasyCacheConfig(threshold=float("inf"), warmup_steps=3)
TEXT, NO_TEXT = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(0))


def run(pipe: Any, **changes: Any) -> Tensor:
    return pipe(**call_arguments(pipe, **({"num_inference_steps": NUM_STEPS} | changes)))[0]


class Loop:
    """A pipeline of one's own: a scheduler's steps, nothing of diffusers' pipelines around them.

    num_loops: how often a call goes through them, with the same prompt.
    """

    def __init__(self, transformer: nn.Module, num_loops: int = 1) -> None:
        self.transformer, self.num_loops = transformer, num_loops
        self.scheduler = tiny_wan_t2v(scheduler="euler").scheduler
        self.components = {"transformer": transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(self, text: Tensor, *, fail: bool = False) -> Tensor:
        x = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        for _ in range(self.num_loops):
            self.scheduler.set_timesteps(NUM_STEPS)
            for time in self.scheduler.timesteps:
                velocity = self.transformer(x, time.expand(1), text, return_dict=False)[0]
                x = self.scheduler.step(velocity, time, x, return_dict=False)[0]
        if fail:
            raise OSError("the disk is full")
        return x


class SectionsPipeline(WanPipeline):
    """Someone's pipeline of two sections, the second from the noise that the first one left."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        freed, self.maybe_free_model_hooks = self.maybe_free_model_hooks, lambda: None
        first = super().__call__(*args, **kwargs)[0]
        self.maybe_free_model_hooks = freed
        return super().__call__(*args, **{**kwargs, "latents": first})


def test_a_call_without_a_known_end_says_what_is_missing_and_keeps_no_latents() -> None:
    model = tiny_transformer()
    state = apply_easycache(model, LASTING)
    Loop(model)(TEXT)
    assert state.tensors()
    with pytest.raises(ValueError, match=r"8 steps have run.*`num_inference_steps`.*finish\(\)") as error:
        easycache_report(model)
    assert "\n" not in str(error.value)
    assert state.tensors() == []
    state.finish()
    assert easycache_report(model).num_steps == NUM_STEPS
    Loop(model)(TEXT)
    with pytest.raises(ValueError, match="8 steps have run"):
        easycache_report(model)  # that of the call before would be an old one


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (NUM_STEPS - 3, f"{NUM_STEPS} steps have run, and a call should have {NUM_STEPS - 3}"),
        (NUM_STEPS + 3, f"{NUM_STEPS} of {NUM_STEPS + 3} steps of a call have run"),
    ],
)
def test_a_wrong_number_of_steps_is_named_and_no_call_is_denied(said: int, words: str) -> None:
    model = tiny_transformer()
    state = apply_easycache(model, replace(LASTING, num_inference_steps=said))
    Loop(model)(TEXT)
    with pytest.raises(ValueError, match=f"{words}.*`num_inference_steps`") as error:
        easycache_report(model)
    assert "no call has finished" not in str(error.value)
    state.finish()
    assert easycache_report(model).num_steps == NUM_STEPS


def test_a_pipeline_of_diffusers_that_frees_nothing_says_how_to_end_its_call() -> None:
    class Silent(WanPipeline):
        def maybe_free_model_hooks(self) -> None:
            """As pipelines written by hand do, which leave it out."""

    pipe = Silent(**tiny_wan_t2v().components)
    pipe.set_progress_bar_config(disable=True)
    state = apply_easycache(pipe, LASTING)
    run(pipe)
    assert state.tensors() == []
    with pytest.raises(ValueError, match=rf"{NUM_STEPS} of {NUM_STEPS} steps of a call have run.*finish\(\)"):
        easycache_report(pipe)
    state.finish()
    assert easycache_report(pipe).num_steps == NUM_STEPS


@pytest.mark.parametrize("step", [0, 4, NUM_STEPS - 1])
def test_a_listener_that_raises_leaves_nothing_behind(step: int) -> None:
    model = tiny_transformer()
    state = apply_easycache(model, replace(LASTING, num_inference_steps=NUM_STEPS))
    expected = Loop(model)(TEXT)

    def stop(decision: StepDecision) -> None:
        if decision.step_index == step:
            raise KeyboardInterrupt

    state.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        Loop(model)(TEXT)
    assert state.tensors() == []
    state.on_step = None
    assert torch.equal(Loop(model)(TEXT), expected)
    assert easycache_report(model).num_steps == NUM_STEPS


@pytest.mark.parametrize("bare", [True, False])
def test_a_pipeline_that_does_not_reset_ends_with_its_last_step(bare: bool) -> None:
    pipe = Loop(tiny_transformer())
    target = pipe.transformer if bare else pipe
    config = EasyCacheConfig(threshold=float("inf"), warmup_steps=3, num_inference_steps=NUM_STEPS if bare else None)
    state = apply_easycache(target, config)
    for _ in range(2):
        pipe(TEXT)
        assert state.tensors() == [], "released before anyone asks for the report"
        assert [step.computed for step in easycache_report(target).decisions] == [True] * 3 + [False] * 4 + [True]


@pytest.mark.parametrize("bare", [True, False])
def test_the_second_evaluation_of_a_heun_step_is_a_step(bare: bool) -> None:
    pipe = tiny_wan_v2v()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    plain = run(pipe, strength=1.0)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    num_evaluations = 2 * NUM_STEPS - 1
    target = pipe.transformer if bare else pipe
    config = EasyCacheConfig(
        threshold=float("inf"), warmup_steps=3, num_inference_steps=num_evaluations if bare else None
    )
    apply_easycache(target, config)
    for _ in range(2):
        with counted_forwards(pipe) as forwards:
            made = run(pipe, strength=1.0)
        report = easycache_report(target)
        assert [step.computed for step in report.decisions] == [True] * 3 + [False] * (num_evaluations - 4) + [True]
        assert len(forwards) == report.num_computed_passes == 8
    assert made.isfinite().all()
    assert not torch.equal(made, plain)


def test_heun_with_nothing_reused_is_the_plain_pipeline_on_a_bare_transformer() -> None:
    pipe = tiny_wan_v2v()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    plain = run(pipe, strength=1.0)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    apply_easycache(pipe.transformer, EasyCacheConfig(threshold=0, num_inference_steps=2 * NUM_STEPS - 1))
    assert torch.equal(run(pipe, strength=1.0), plain)
    assert easycache_report(pipe.transformer).num_steps == 2 * NUM_STEPS - 1


def sections_pipeline() -> SectionsPipeline:
    pipe = SectionsPipeline(**tiny_wan_t2v().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_foreign_pipeline_is_asked_and_not_guessed(caplog: pytest.LogCaptureFixture) -> None:
    pipe = sections_pipeline()
    assert has_several_loops(pipe) is None
    apply_easycache(pipe, LASTING)
    run(pipe)
    assert easycache_report(pipe).num_steps == NUM_STEPS
    assert "`has_several_loops = True`" in caplog.text
    caplog.clear()
    pipe.has_several_loops = True
    run(pipe)
    report = easycache_report(pipe)
    assert [step.section for step in report.decisions] == [0] * NUM_STEPS + [1] * NUM_STEPS
    assert "has_several_loops" not in caplog.text


def test_a_foreign_call_that_failed_after_its_last_step_is_no_section_of_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = Loop(tiny_transformer())
    apply_easycache(pipe, LASTING)
    with pytest.raises(OSError, match="disk"):
        pipe(TEXT, fail=True)
    pipe(TEXT)
    assert easycache_report(pipe).num_steps == NUM_STEPS


def test_what_is_known_of_loops_is_said_by_the_pipeline_or_by_a_row() -> None:
    assert has_several_loops(tiny_wan_t2v()) is False
    assert has_several_loops(build_random("framepack")) is True
    assert has_several_loops(build_random("helios-blocks")) is True
    assert has_several_loops(build_random("wan2.1-t2v-blocks")) is False
    assert has_several_loops(Loop(tiny_transformer())) is None
    from vidaccel.pipelines.easycache_wan import EasyCacheWanPipeline

    assert has_several_loops(EasyCacheWanPipeline(**tiny_wan_t2v().components)) is False


def test_a_call_that_easycache_stayed_away_from_has_no_report_of_an_earlier_one() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, LASTING)
    run(pipe)
    assert easycache_report(pipe).num_reused
    pipe.transformer.train()
    run(pipe)
    with pytest.raises(ValueError, match=r"in training mode.*\.eval\(\)"):
        easycache_report(pipe)
    pipe.transformer.eval()
    run(pipe)
    assert easycache_report(pipe).num_reused


def test_an_expert_exchanged_after_applying_is_told() -> None:
    pipe = tiny_wan_two_experts()
    apply_easycache(pipe, LASTING)
    run(pipe)
    pipe.transformer_2 = tiny_transformer(seed=5)
    run(pipe)
    with pytest.raises(RuntimeError, match="not on `transformer_2`"):
        easycache_report(pipe)

"""Which step is it: on the host wherever the pipeline says so, else with the one read a step has anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from torch import Tensor, nn

from tests.support.device_reads import ReadsByVidaccel
from tests.support.tiny_models import (
    call_arguments,
    tiny_scheduler,
    tiny_transformer,
    tiny_wan_5b,
    tiny_wan_i2v,
    tiny_wan_t2v,
    tiny_wan_two_experts,
    tiny_wan_v2v,
    tiny_wan_vace,
)
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache
from vidaccel.easycache.conditions import fingerprint, is_equal

NUM_STEPS = 12
CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)


def run(pipe: Any, **changes: Any) -> Tensor:
    return pipe(**call_arguments(pipe, **({"num_inference_steps": NUM_STEPS} | changes))).frames


def events_of(pipe: Any, target: Any, config: EasyCacheConfig = CONFIG) -> str:
    """R for a read, S for a decision, in the order of one call."""
    events: list[str] = []
    apply_easycache(target, config, on_step=lambda decision: events.append("S"))
    with ReadsByVidaccel(events):
        run(pipe)
    assert easycache_report(target).num_reused > 0
    return "".join(events)


@pytest.mark.parametrize(
    "make", [tiny_wan_t2v, tiny_wan_i2v, tiny_wan_v2v, tiny_wan_vace, tiny_wan_5b, tiny_wan_two_experts]
)
def test_on_a_pipeline_only_decided_steps_read_from_the_device_and_once(make: Callable[[], Any]) -> None:
    events = events_of(pipe := make(), pipe)
    num_steps = easycache_report(pipe).num_steps
    reasons = [decision.reason for decision in easycache_report(pipe).decisions]
    expected = "".join("RS" if reason in ("above_threshold", "below_threshold") else "S" for reason in reasons)
    assert events.rstrip("R") == expected
    assert events.count("R") <= num_steps


@pytest.mark.parametrize("make", [tiny_wan_t2v, tiny_wan_i2v, tiny_wan_v2v])
def test_on_a_bare_transformer_no_step_reads_twice(make: Callable[[], Any]) -> None:
    pipe = make()
    events = events_of(pipe, pipe.transformer, EasyCacheConfig(threshold=0.5, warmup_steps=3, num_inference_steps=12))
    assert "RR" not in events.rstrip("R")


@pytest.mark.parametrize("make", [tiny_wan_t2v, tiny_wan_i2v, tiny_wan_v2v, tiny_wan_vace, tiny_wan_5b])
def test_a_bare_transformer_gives_the_result_of_the_pipeline(make: Callable[[], Any]) -> None:
    whole, bare = make(), make()
    apply_easycache(whole, CONFIG)
    expected = run(whole)
    num_steps = easycache_report(whole).num_steps
    apply_easycache(bare.transformer, EasyCacheConfig(threshold=0.5, warmup_steps=3, num_inference_steps=num_steps))
    for _ in range(2):
        assert torch.equal(run(bare), expected)
        decisions = easycache_report(bare.transformer).decisions
        assert [step.reason for step in decisions] == [step.reason for step in easycache_report(whole).decisions]


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("make", [tiny_wan_t2v, tiny_wan_i2v, tiny_wan_v2v])
@pytest.mark.parametrize("at_call", range(1, 8))
def test_a_bare_transformer_survives_an_interruption_after_any_call(make: Callable[[], Any], at_call: int) -> None:
    config = EasyCacheConfig(threshold=0.5, warmup_steps=3, num_inference_steps=12)
    pipe, other = make(), make()
    apply_easycache(pipe.transformer, config)
    apply_easycache(other.transformer, config)
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at_call:
            raise InterruptionError

    for seed in (0, 1):
        handle = pipe.transformer.register_forward_hook(interrupt)
        calls.clear()
        with pytest.raises(InterruptionError):
            run(pipe)
        handle.remove()
        assert torch.equal(run(pipe, seed=seed), run(other, seed=seed))


TEXT, NO_TEXT = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(0))
TIMES = [torch.full((1,), 1000.0 * (1 - index / NUM_STEPS)) for index in range(NUM_STEPS)]


def loop(model: Any, x: Tensor, num_steps: int, *, same_objects: bool = True, context: bool = False) -> Tensor:
    """A guided Euler loop of one's own; without `same_objects` every call gets new tensors, as some pipelines do."""
    for time in TIMES[:num_steps]:
        outputs = []
        for name, embeds in (("cond", TEXT), ("uncond", NO_TEXT)):
            given = x if same_objects else x.clone()
            at = time if same_objects else time.clone()
            if context:
                with model.cache_context(name):
                    outputs.append(model(given, at, embeds, return_dict=False)[0])
            else:
                outputs.append(model(given, at, embeds, return_dict=False)[0])
        x = x - (outputs[1] + 3 * (outputs[0] - outputs[1])) / num_steps
    return x


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("same_objects", [True, False])
@pytest.mark.parametrize("context", [True, False])
def test_a_loop_of_ones_own_is_understood_however_it_makes_its_tensors(
    inference: Any, same_objects: bool, context: bool
) -> None:
    model = tiny_transformer()
    x = torch.randn(1, 16, 3, 4, 4)
    config = EasyCacheConfig(threshold=float("inf"), warmup_steps=3, num_inference_steps=NUM_STEPS)
    state = apply_easycache(model, config)
    with inference():
        results = [loop(model, x, NUM_STEPS, same_objects=same_objects, context=context) for _ in range(3)]
        report = easycache_report(model)
    assert [step.computed for step in report.decisions] == [True] * 3 + [False] * 8 + [True]
    assert (report.num_passes, report.num_computed_passes) == (24, 8)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert state.tensors() == []


@pytest.mark.parametrize("same_objects", [True, False])
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("at_call", [1, 2, 3, 9])
def test_a_loop_of_ones_own_may_be_interrupted_and_repeated_with_the_very_same_tensors(
    same_objects: bool, context: bool, at_call: int
) -> None:
    model, x = tiny_transformer(), torch.randn(1, 16, 3, 4, 4)
    config = EasyCacheConfig(threshold=0.5, warmup_steps=3, num_inference_steps=NUM_STEPS)
    apply_easycache(model, config)
    with torch.no_grad():
        expected = loop(model, x, NUM_STEPS, same_objects=same_objects, context=context)
        decisions = [step.reason for step in easycache_report(model).decisions]
        calls: list[int] = []

        def interrupt(*_: Any) -> None:
            calls.append(1)
            if len(calls) == at_call:
                raise InterruptionError

        handle = model.register_forward_hook(interrupt)
        with pytest.raises(InterruptionError):
            loop(model, x, NUM_STEPS, same_objects=same_objects, context=context)
        handle.remove()
        assert torch.equal(loop(model, x, NUM_STEPS, same_objects=same_objects, context=context), expected)
        assert [step.reason for step in easycache_report(model).decisions] == decisions
        assert easycache_report(model).num_passes == 2 * NUM_STEPS


class Scripted(nn.Module):
    """A calm conditional branch (text 1) and a wild unconditional one (text 0)."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        wild = -40.0 * (timestep.reshape(-1, 1, 1) % 3)
        return (hidden_states * torch.where(encoder_hidden_states > 0, 2.0, wild),)


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_guidance_in_one_batch_decides_on_the_conditional_half(order: Any) -> None:
    model = Scripted().eval()
    config = EasyCacheConfig(threshold=0.3, warmup_steps=3, num_inference_steps=NUM_STEPS)
    text = torch.ones(1, 1, 1)
    both = torch.cat([text, 0 * text] if order[0] == "cond" else [0 * text, text])
    inputs = [torch.full((1, 4, 4), 5.0 + index) for index in range(NUM_STEPS)]
    reasons: dict[str, list[str]] = {}
    with torch.no_grad():
        for kind in ("alone", "halves", "whole"):
            apply_easycache(model, config, batched_guidance=order if kind == "halves" else None)
            for index, (x, time) in enumerate(zip(inputs, TIMES, strict=True)):
                if kind == "alone":
                    model(x, time - index, text)
                else:
                    model(x.repeat(2, 1, 1), (time - index).expand(2), both)
            reasons[kind] = [step.reason for step in easycache_report(model).decisions]
            remove_easycache(model)
    assert reasons["halves"] == reasons["alone"] != reasons["whole"]
    assert "below_threshold" in reasons["alone"]


def test_half_a_batch_does_not_decide_when_the_pipeline_has_guidance_off() -> None:
    whole, halved = tiny_wan_t2v(), tiny_wan_t2v()
    apply_easycache(whole, CONFIG)
    apply_easycache(halved, CONFIG, batched_guidance=("cond", "uncond"))
    expected = run(whole, batch=2, guidance_scale=1.0)
    assert torch.equal(run(halved, batch=2, guidance_scale=1.0), expected)
    changes = [step.predicted_change for step in easycache_report(halved).decisions]
    assert changes == [step.predicted_change for step in easycache_report(whole).decisions]


@pytest.mark.parametrize(("step_index", "num_steps"), [(5, 12), (4, 20), (3, 12), (2, 12)])
def test_a_step_index_that_does_not_follow_begins_a_new_generation(step_index: int, num_steps: int) -> None:
    model, x = tiny_transformer(), torch.randn(1, 16, 3, 4, 4)
    told: list[str] = []
    apply_easycache(
        model, EasyCacheConfig(threshold=float("inf"), warmup_steps=2), on_step=lambda step: told.append(step.reason)
    )
    with torch.no_grad():
        for index, total in [(0, 12), (1, 12), (2, 12), (3, 12), (step_index, num_steps)]:
            with model.cache_context("cond", step_index=index, num_inference_steps=total):
                model(x + len(told), TIMES[index], TEXT)
    assert told == ["warmup", "warmup", "below_threshold", "below_threshold", "no_history"]


def test_a_loop_that_writes_into_its_tensors_is_understood() -> None:
    model = tiny_transformer()
    config = EasyCacheConfig(threshold=float("inf"), warmup_steps=3, num_inference_steps=NUM_STEPS)
    apply_easycache(model, config)
    start = torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        expected = loop(model, start, NUM_STEPS)
        x, time = start.clone(), TIMES[0].clone()
        for index in range(NUM_STEPS):
            time.copy_(TIMES[index])
            cond = model(x, time, TEXT.clone(), return_dict=False)[0]
            uncond = model(x, time, NO_TEXT.clone(), return_dict=False)[0]
            x.sub_((uncond + 3 * (cond - uncond)) / NUM_STEPS)
    assert torch.equal(x, expected)
    assert easycache_report(model).num_passes == 2 * NUM_STEPS


def test_a_step_led_by_another_branch_begins_without_history() -> None:
    model, x = tiny_transformer(), torch.randn(1, 16, 3, 4, 4)
    state = apply_easycache(model, EasyCacheConfig(threshold=float("inf"), warmup_steps=2))
    with torch.no_grad():
        for index, names in enumerate([("cond", "uncond")] * 4 + [("uncond",)] * 4):
            for name in names:
                with model.cache_context(name):
                    model(x + index, TIMES[index], TEXT if name == "cond" else NO_TEXT)
    state.finish()
    reasons = [step.reason for step in easycache_report(model).decisions]
    assert reasons == ["warmup"] * 2 + ["below_threshold"] * 2 + ["no_history"] * 2 + ["below_threshold"] * 2


def test_a_loop_without_known_length_reuses_its_last_step_and_is_ended_by_hand(caplog: Any) -> None:
    model = tiny_transformer()
    state = apply_easycache(model, EasyCacheConfig(threshold=float("inf"), warmup_steps=3))
    with torch.no_grad():
        loop(model, torch.randn(1, 16, 3, 4, 4), 6)
    assert "does not know the number of steps" in caplog.text
    with pytest.raises(ValueError, match="no report yet"):
        easycache_report(model)
    state.finish()
    assert [step.computed for step in easycache_report(model).decisions] == [True] * 3 + [False] * 3


def test_another_pipeline_with_another_scheduler_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """EasyCache was applied to a pipeline whose scheduler stands still while a second one drives the transformer."""
    config = EasyCacheConfig(threshold=float("inf"), warmup_steps=3)
    first, second, alone = tiny_wan_i2v(), tiny_wan_i2v(), tiny_wan_i2v()
    first.scheduler = tiny_scheduler("stochastic")
    apply_easycache(first, config)
    run(first)
    assert "fresh noise" in caplog.text
    caplog.clear()
    second.transformer = first.transformer
    apply_easycache(alone.transformer, config)
    expected = run(alone, num_inference_steps=20)
    for _ in range(2):
        assert torch.equal(run(second, num_inference_steps=20), expected)
        decisions = easycache_report(second).decisions
        assert [step.computed for step in decisions] == [True] * 3 + [False] * 17
    assert "does not know the number of steps" in caplog.text
    assert "fresh noise" not in caplog.text


def test_a_scheduler_exchanged_after_applying_is_followed() -> None:
    pipe, expected = tiny_wan_v2v(), tiny_wan_v2v()
    apply_easycache(pipe, CONFIG)
    run(pipe)
    for each in (pipe, expected):
        each.scheduler = tiny_scheduler("euler")
    apply_easycache(expected, CONFIG)
    assert torch.equal(run(pipe), run(expected))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_strength_shortens_the_schedule_and_the_tail_stays_at_its_end(strength: float) -> None:
    pipe = tiny_wan_v2v()
    assert isinstance(pipe, WanVideoToVideoPipeline)
    apply_easycache(pipe, EasyCacheConfig(threshold=float("inf"), warmup_steps=3))
    run(pipe, strength=strength)
    reasons = [decision.reason for decision in easycache_report(pipe).decisions]
    assert len(reasons) == NUM_STEPS * strength
    assert reasons == ["warmup"] * 3 + ["below_threshold"] * (len(reasons) - 4) + ["tail"]


def test_removing_in_the_middle_of_a_call_computes_the_rest() -> None:
    pipe = tiny_wan_t2v()
    calls: list[int] = []
    apply_easycache(pipe, EasyCacheConfig(threshold=float("inf"), warmup_steps=3))
    pipe.transformer.patch_embedding.register_forward_pre_hook(lambda *_: calls.append(1))

    def remove(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        if step == 5:
            remove_easycache(pipe)
        return kwargs

    run(pipe, callback_on_step_end=remove)
    assert len(calls) == 2 * (3 + 6)


@pytest.mark.parametrize("at", [0, 5, NUM_STEPS - 1])
def test_a_second_pipeline_with_its_own_scheduler_is_fresh_after_the_first_one_failed(at: int) -> None:
    """The failed call moved the first scheduler on by a step, which must not count for the second pipeline."""
    first, second, alone = tiny_wan_v2v(), tiny_wan_v2v(), tiny_wan_v2v()
    apply_easycache(alone.transformer, CONFIG)
    apply_easycache(first, CONFIG)
    second.transformer = first.transformer

    def fail(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        if step == at:
            raise RuntimeError("in the callback")
        return kwargs

    with pytest.raises(RuntimeError, match="in the callback"):
        run(first, strength=1.0, callback_on_step_end=fail)
    assert torch.equal(run(second), run(alone))
    assert easycache_report(second).decisions[0].step_index == 0
    assert easycache_report(second).num_steps == easycache_report(alone.transformer).num_steps


def test_both_branches_may_be_given_the_very_same_prompt() -> None:
    pipe, equal = tiny_wan_v2v(), tiny_wan_v2v()
    reports = []
    for each in (pipe, equal):
        apply_easycache(each, CONFIG)
        arguments = call_arguments(each, num_inference_steps=NUM_STEPS)
        prompt = arguments["prompt_embeds"]
        each(**arguments | {"negative_prompt_embeds": prompt if each is pipe else prompt.clone()})
        reports.append([(step.computed, step.num_passes) for step in easycache_report(each).decisions])
    assert reports[0] == reports[1]
    assert (False, 2) in reports[0]


def test_a_name_that_is_new_after_the_scheduler_moved_opens_a_step() -> None:
    """Only the unconditional pass of a step, after one with only the conditional pass."""
    pipe = tiny_wan_i2v()
    apply_easycache(pipe, CONFIG)
    transformer, names = pipe.transformer, iter(["cond"] * 4 + ["uncond"] * (NUM_STEPS - 4))
    original = transformer.cache_context
    transformer.cache_context = lambda name, **kwargs: original(next(names), **kwargs)
    run(pipe, guidance_scale=1.0)
    assert [step.num_passes for step in easycache_report(pipe).decisions] == [1] * NUM_STEPS


def test_prompts_are_told_apart_where_their_values_have_the_same_sum() -> None:
    """Normalized embeddings all sum to 0; copies of them (offloading makes some) have no identity to go by."""
    prompt = torch.randn(1, 16, 8)
    prompt -= prompt.mean()
    assert is_equal(fingerprint(prompt), fingerprint(prompt.clone()))
    assert not is_equal(fingerprint(prompt), fingerprint(prompt.flip(1)))

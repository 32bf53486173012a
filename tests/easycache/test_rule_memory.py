"""What the rule keeps: copies, one vector for each branch, nothing of another shape, nothing after a reset."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.scripted_models import Outcome, double, one_step, open_loop, stream
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.rule import EasyCacheRule


def test_another_shape_or_type_starts_the_history_again() -> None:
    rule = EasyCacheRule(EasyCacheConfig(threshold=math.inf, warmup_steps=2))
    outcome = Outcome()
    for index in range(4):
        one_step(rule, outcome, torch.full((1, 4), index + 1.0), double, index, 20)
    for index in range(4, 8):
        one_step(rule, outcome, torch.full((1, 6), index + 1.0), double, index, 20)
    assert [decision.reason for decision in outcome.decisions][4:] == [
        "input_changed",
        "no_history",
        "below_threshold",
        "below_threshold",
    ]
    assert rule.decide([torch.ones(1, 6, dtype=torch.float64)], step_index=8, num_steps=20).reason == "input_changed"


def test_memory_holds_copies_that_nobody_outside_can_change() -> None:
    rule = EasyCacheRule(EasyCacheConfig(threshold=math.inf, warmup_steps=2))
    inputs = stream(6)
    for index in range(2):
        x = inputs[index].clone()
        output = 2 * x
        rule.decide([x], step_index=index, num_steps=10)
        rule.record("cond", [x], [output])
        x.fill_(1e6)
        output.fill_(-1e6)
    x = inputs[2].clone()
    assert not rule.decide([x], step_index=2, num_steps=10).computed
    first = rule.predict("cond", [x])[0]
    assert x.item() == inputs[2].item()
    assert first.item() == 3 + (4 - 2)
    first.fill_(7e6)
    x.fill_(8e6)
    assert not rule.decide([inputs[3]], step_index=3, num_steps=10).computed
    assert rule.predict("cond", [inputs[3]])[0].item() == 4 + (4 - 2)


def test_followers_keep_their_own_vector_and_wait_for_a_fresh_one() -> None:
    rule = EasyCacheRule(EasyCacheConfig(threshold=math.inf, warmup_steps=2, max_consecutive_reuses=2))
    x = stream(8)
    for index in range(2):
        rule.decide([x[index]], step_index=index, num_steps=20)
        rule.record("cond", [x[index]], [2 * x[index]])
        rule.record("uncond", [x[index]], [-3 * x[index]], same_latents=True)
    assert not rule.decide([x[2]], step_index=2, num_steps=20).computed
    assert rule.can_follow("uncond", [x[2]])
    assert not rule.can_follow("perturbed", [x[2]])
    assert rule.predict("cond", [x[2]])[0].item() == 3 + (4 - 2)
    assert rule.predict("uncond", [x[2]])[0].item() == 3 + (-6 - 2)
    rule.decide([x[3]], step_index=3, num_steps=20)
    rule.predict("cond", [x[3]])
    assert rule.decide([x[4]], step_index=4, num_steps=20).computed
    rule.record("cond", [x[4]], [2 * x[4]])
    assert not rule.decide([x[5]], step_index=5, num_steps=20).computed
    assert not rule.can_follow("uncond", [x[5]]), "its vector is older than the leader's"
    rule.record("uncond", [x[5]], [-3 * x[5]])
    assert rule.can_follow("uncond", [x[6]])
    assert rule.predict("uncond", [x[6]])[0].item() == 7 + (-18 - 6)


@pytest.mark.parametrize("half", ["first", "second"])
def test_batched_guidance_decides_on_the_conditional_half(half: str) -> None:
    inputs = [torch.randn(2, 8) * 0.1 + index for index in range(30)]
    config = EasyCacheConfig(threshold=0.3, warmup_steps=3)
    alone = open_loop(config, inputs, lambda x, index: x + 0.3 * index)

    def both(x: Tensor, index: int) -> Tensor:
        cond, uncond = x[:2] + 0.3 * index, -40 * x[:2] * (index % 3)
        return torch.cat([cond, uncond] if half == "first" else [uncond, cond])

    rule, outcome = (
        EasyCacheRule(config, num_branches=2, deciding_branch=0 if half == "first" else 1),
        Outcome(),
    )
    for index, x in enumerate(inputs):
        one_step(rule, outcome, torch.cat([x, x]), both, index, len(inputs))
    assert outcome.reused == alone.reused != set()
    plain = open_loop(config, [torch.cat([x, x]) for x in inputs], both)
    assert plain.reused != alone.reused


@pytest.mark.parametrize("batch", [1, 3])
def test_an_odd_batch_has_no_halves_and_decides_as_a_whole(batch: int) -> None:
    config = EasyCacheConfig(threshold=0.3, warmup_steps=3)
    inputs = [torch.randn(batch, 8) * 0.1 + index for index in range(30)]
    whole = open_loop(config, inputs, lambda x, index: x + 0.3 * index)
    rule, outcome = EasyCacheRule(config, num_branches=2), Outcome()
    for index, x in enumerate(inputs):
        one_step(rule, outcome, x, lambda x, index: x + 0.3 * index, index, len(inputs))
    assert outcome.decisions == whole.decisions
    assert whole.reused != set()


def test_the_statistic_of_bfloat16_latents_is_taken_in_float32() -> None:
    wide = [torch.randn(1, 4096) + 0.01 * index * torch.randn(1, 4096) for index in range(4)]
    narrow = [x.bfloat16() for x in wide]
    rule = EasyCacheRule(EasyCacheConfig(threshold=math.inf, warmup_steps=2))
    for index in range(2):
        rule.decide([narrow[index]], step_index=index, num_steps=10)
        rule.record("cond", [narrow[index]], [narrow[index] * 2])
    decision = rule.decide([narrow[2]], step_index=2, num_steps=10)
    x = [value.float() for value in narrow]
    v = [(value * 2).float() for value in narrow]
    rate = (v[1] - v[0]).abs().mean() / (x[1] - x[0]).abs().mean()
    expected = rate * (x[2] - x[1]).abs().mean() / v[1].abs().mean()
    assert decision.predicted_change == expected.item()


def test_a_generation_keeps_two_inputs_and_one_output_for_each_branch() -> None:
    rule = EasyCacheRule(EasyCacheConfig(threshold=math.inf, warmup_steps=2))
    x = stream(5)
    for index in range(2):
        rule.decide([x[index]], step_index=index, num_steps=10)
        rule.record("cond", [x[index]], [2 * x[index]])
        rule.record("uncond", [x[index]], [3 * x[index]], same_latents=True)
    assert len(rule.tensors()) == 3
    rule.decide([x[2]], step_index=2, num_steps=10)
    rule.predict("cond", [x[2]])
    rule.predict("uncond", [x[2]])
    assert len(rule.tensors()) == 4
    rule.reset()
    assert rule.tensors() == []

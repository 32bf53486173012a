"""The decision rule on scripted models: no transformer, no diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.scripted_models import TOY_B_START, Outcome, closed_loop, double, open_loop, stream, toy_b
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.predictors import Evaluation, add_transformation, hold_output
from vidaccel.easycache.rule import EasyCacheRule


@pytest.mark.parametrize("warmup", [2, 5, 13, 14, 30])
def test_an_infinite_threshold_computes_warmup_and_last_step_only(warmup: int) -> None:
    outcome = open_loop(EasyCacheConfig(threshold=math.inf, warmup_steps=warmup), stream(14), double)
    assert outcome.reused == set(range(warmup, 13))


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warmup_two_steps_are_still_needed_for_a_rate(warmup: int) -> None:
    outcome = open_loop(EasyCacheConfig(threshold=math.inf, warmup_steps=warmup), stream(6), double)
    assert outcome.reused == {2, 3, 4}
    assert [decision.reason for decision in outcome.decisions][1] == "no_history"


def test_a_longer_tail_and_an_unknown_length_move_the_last_computed_steps() -> None:
    outcome = open_loop(EasyCacheConfig(threshold=math.inf, warmup_steps=2, tail_steps=3), stream(10), double)
    assert outcome.reused == {2, 3, 4, 5, 6}
    rule, outcome = EasyCacheRule(EasyCacheConfig(threshold=math.inf, warmup_steps=2)), Outcome()
    for index, x in enumerate(stream(6)):
        decision = rule.decide([x], step_index=index)
        outcome.decisions.append(decision)
        if decision.computed:
            rule.record("cond", [x], [2 * x])
        else:
            rule.predict("cond", [x])
    assert outcome.reused == {2, 3, 4, 5}


def test_threshold_zero_never_reuses_even_where_nothing_changes() -> None:
    outcome = open_loop(EasyCacheConfig(threshold=0, warmup_steps=2), stream(8), lambda x, index: torch.ones_like(x))
    assert outcome.reused == set()


def test_the_number_of_consecutive_reuses_can_be_capped() -> None:
    config = EasyCacheConfig(threshold=math.inf, warmup_steps=2, max_consecutive_reuses=2)
    outcome = open_loop(config, stream(10), double)
    assert outcome.reused == {2, 3, 5, 6, 8}
    assert outcome.decisions[4].reason == "max_consecutive_reuses"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_reused_output_is_the_input_plus_the_last_vector_rounded_once(dtype: torch.dtype) -> None:
    old, output, new = (torch.randn(2, 4, 3, 5, 5).to(dtype) for _ in range(3))
    predicted = add_transformation(new, Evaluation(step_index=3, latents=old, output=output))
    expected = (new.float() + (output.float() - old.float())).to(dtype)
    assert predicted.dtype == dtype
    assert torch.equal(predicted, expected)


def test_the_held_output_is_a_copy_of_the_last_one() -> None:
    output = torch.randn(2, 3)
    held = hold_output(torch.randn(2, 3), Evaluation(step_index=0, latents=torch.randn(2, 3), output=output))
    assert torch.equal(held, output)
    assert held.data_ptr() != output.data_ptr()


def test_holding_the_output_takes_the_same_decisions_on_the_same_inputs() -> None:
    held = open_loop(EasyCacheConfig(threshold=0.5, warmup_steps=2, predictor="output"), stream(12), double)
    assert held.reused == {3, 5, 6, 8, 9, 10}
    assert [output.item() for output in held.outputs] == [2, 4, 6, 6, 10, 10, 10, 16, 16, 16, 16, 24]


def test_functions_may_replace_predictor_and_statistic() -> None:
    def three(latents: Tensor, last: Evaluation) -> Tensor:
        return torch.full_like(latents, 3)

    def root_mean_square(values: Tensor) -> Tensor:
        return values.square().mean().sqrt().reshape(1)

    config = EasyCacheConfig(threshold=0.5, warmup_steps=2, predictor=three, statistic=root_mean_square)
    outcome = open_loop(config, stream(12), double)
    assert outcome.reused == {3, 5, 6, 8, 9, 10}
    assert outcome.outputs[3].item() == 3
    assert (config.to_dict()["predictor"], config.to_dict()["statistic"]) == ("three", "root_mean_square")


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_model_and_latents_leaves_the_decisions_unchanged(scale: float) -> None:
    config = EasyCacheConfig(threshold=0.1, warmup_steps=4)
    plain, _ = closed_loop(config, TOY_B_START, toy_b, 14)
    scaled, _ = closed_loop(config, scale * TOY_B_START, lambda x, index: scale * toy_b(x / scale, index), 14)
    assert plain.reused == scaled.reused


def test_a_larger_threshold_reuses_at_least_as_much_on_fixed_inputs() -> None:
    inputs = [torch.randn(1, 8) * 0.1 + index for index in range(40)]
    counts = [
        len(open_loop(EasyCacheConfig(threshold=threshold, warmup_steps=3), inputs, double).reused)
        for threshold in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, math.inf)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 36


def test_two_equal_samples_decide_as_one_does() -> None:
    inputs = [torch.randn(1, 8) * 0.1 + index for index in range(30)]
    config = EasyCacheConfig(threshold=0.2, warmup_steps=3)
    single = open_loop(config, inputs, double)
    doubled = open_loop(config, [x.repeat(2, 1) for x in inputs], double)
    assert single.reused == doubled.reused != set()


def test_a_statistic_of_every_sample_lets_the_fastest_decide() -> None:
    calm = [torch.full((1, 4), 100.0 + index) for index in range(20)]
    lively = [torch.full((1, 4), 1.0 + 0.4 * index) for index in range(20)]
    config = EasyCacheConfig(threshold=0.3, warmup_steps=3, statistic=lambda values: values.abs().flatten(1).mean(1))
    together = open_loop(config, [torch.cat(pair) for pair in zip(calm, lively, strict=True)], double)
    assert together.reused == open_loop(config, lively, double).reused
    mean = EasyCacheConfig(threshold=0.3, warmup_steps=3)
    hidden = open_loop(mean, [torch.cat(pair) for pair in zip(calm, lively, strict=True)], double)
    assert len(hidden.reused) > len(together.reused)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_never_reused_and_does_no_lasting_harm(bad: float) -> None:
    def model(x: Tensor, index: int) -> Tensor:
        return torch.full_like(x, bad) if index == 3 else 2 * x

    config = EasyCacheConfig(threshold=math.inf, warmup_steps=2, max_consecutive_reuses=1)
    outcome = open_loop(config, stream(12), model)
    assert 3 in {decision.step_index for decision in outcome.decisions if decision.computed}
    after = outcome.decisions[4:6]
    assert all(decision.reason == "not_finite" for decision in after)
    assert outcome.reused & {6, 7}
    assert all(outcome.outputs[index].isfinite().all() for index in outcome.reused)


def test_an_input_that_does_not_move_is_computed() -> None:
    outcome = open_loop(EasyCacheConfig(threshold=math.inf, warmup_steps=2), [torch.ones(1, 4)] * 6, double)
    assert outcome.reused == set()
    moving_then_still = [torch.ones(1, 4) * min(index, 3) for index in range(1, 7)]
    outcome = open_loop(EasyCacheConfig(threshold=math.inf, warmup_steps=2), moving_then_still, double)
    assert outcome.decisions[3].reason == "no_change"
    assert outcome.decisions[3].computed


def test_a_zero_output_is_computed() -> None:
    outcome = open_loop(EasyCacheConfig(threshold=math.inf, warmup_steps=2), stream(6), lambda x, index: 0 * x)
    assert outcome.reused == set()


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        ("threshold", -0.1),
        ("threshold", math.nan),
        ("threshold", "0.1"),
        ("threshold", True),
        ("warmup_steps", -1),
        ("warmup_steps", 2.5),
        ("tail_steps", -1),
        ("max_consecutive_reuses", 0),
        ("num_inference_steps", 0),
        ("predictor", "guess"),
        ("statistic", "median"),
        ("denominator", "next"),
        ("rate_reference", None),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(field_name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{field_name}` must be") as error:
        EasyCacheConfig(**{field_name: value})
    assert repr(value) in str(error.value)


def test_the_defaults_are_those_of_the_official_code_for_one_video() -> None:
    assert EasyCacheConfig().to_dict() == {
        "threshold": 0.05,
        "warmup_steps": 10,
        "tail_steps": 1,
        "max_consecutive_reuses": None,
        "predictor": "transformation",
        "statistic": "mean",
        "denominator": "computed",
        "rate_reference": "computed",
        "decisions": "sample",
        "num_inference_steps": None,
    }

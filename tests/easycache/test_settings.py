"""What `apply_easycache` and `EasyCacheConfig` are given: taken as meant, or refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.support.tiny_models import call_arguments, tiny_wan_t2v
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report
from vidaccel.easycache.predictors import Evaluation, add_transformation, extrapolate_output, takes_earlier_evaluation

CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)


def computed_steps(config: EasyCacheConfig | None = CONFIG, **options: Any) -> list[int]:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, config, **options)
    pipe(**call_arguments(pipe, num_inference_steps=8))
    return [step.step_index for step in easycache_report(pipe).decisions if step.computed]


@pytest.mark.parametrize("kind", [list, set, iter, torch.tensor], ids=["list", "set", "iterator", "tensor"])
def test_a_schedule_may_be_any_collection_or_an_iterator(kind: Callable[[list[int]], Any]) -> None:
    assert computed_steps(schedule=kind([0, 1, 4, 6])) == [0, 1, 4, 6]


@pytest.mark.parametrize("schedule", ["014", 5, [-1], [0.0, 1.0], ["a"], [True]], ids=repr)
def test_a_schedule_of_anything_but_steps_is_refused(schedule: Any) -> None:
    with pytest.raises(ValueError, match="whole numbers from 0"):
        apply_easycache(tiny_wan_t2v(), schedule=schedule)


def test_steps_of_a_schedule_beyond_the_last_one_are_told(caplog: pytest.LogCaptureFixture) -> None:
    assert computed_steps(schedule=[0, 1, 50, 9]) == [0, 1]
    assert any("names the steps [9, 50], but the call has 8" in record.message for record in caplog.records)


@pytest.mark.parametrize("branches", ["cond", ("cond",), ("cond", "cond"), ("a", "b"), 5, (None, "cond")], ids=repr)
def test_branches_of_a_batch_are_names_with_cond_among_them(branches: Any) -> None:
    with pytest.raises(ValueError, match="`batched_guidance` must name the guidance passes"):
        apply_easycache(tiny_wan_t2v(), batched_guidance=branches)


@pytest.mark.parametrize("config", [0, 0.05, {"threshold": 0.05}], ids=repr)
def test_a_config_of_another_type_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="must be an EasyCacheConfig or None"):
        apply_easycache(tiny_wan_t2v(), config)


def test_a_callback_that_cannot_be_called_is_refused() -> None:
    on_step: Any = 5
    with pytest.raises(ValueError, match="`on_step` must be a function"):
        apply_easycache(tiny_wan_t2v(), on_step=on_step)


def hold_scaled(latents: torch.Tensor, last: Evaluation, scale: float = 1.0) -> torch.Tensor:
    return last.output * scale


def test_predictors_are_given_what_they_take() -> None:
    assert takes_earlier_evaluation(extrapolate_output)
    assert takes_earlier_evaluation(lambda latents, last, previous=None: last.output)
    assert not takes_earlier_evaluation(add_transformation)
    assert not takes_earlier_evaluation(hold_scaled), "a setting of its own is no place for an evaluation"
    assert not takes_earlier_evaluation(partial(extrapolate_output, previous=None))
    assert not takes_earlier_evaluation(max), "a builtin does not tell"
    expected = computed_steps(EasyCacheConfig(threshold=0.5, warmup_steps=3, predictor="output"))
    assert computed_steps(EasyCacheConfig(threshold=0.5, warmup_steps=3, predictor=hold_scaled)) == expected


@pytest.mark.parametrize("predictor", [lambda latents: latents, lambda a, b, c, d: a])
def test_a_predictor_with_another_number_of_arguments_is_refused(predictor: Any) -> None:
    with pytest.raises(ValueError, match="`predictor` must take"):
        EasyCacheConfig(predictor=predictor)


@pytest.mark.parametrize(
    "change", [torch.Tensor.double, torch.squeeze, lambda output: None], ids=["type", "shape", "no"]
)
def test_a_prediction_unlike_the_output_is_refused(change: Callable[[torch.Tensor], Any]) -> None:
    config = EasyCacheConfig(threshold=0.5, warmup_steps=3, predictor=lambda latents, last: change(last.output))
    with pytest.raises(ValueError, match="`predictor` must return a tensor of shape"):
        computed_steps(config)


def test_a_statistic_that_is_no_tensor_is_refused() -> None:
    statistic: Any = lambda values: float(values.abs().mean())  # noqa: E731
    with pytest.raises(ValueError, match="`statistic` must return a tensor; got float"):
        computed_steps(EasyCacheConfig(statistic=statistic, warmup_steps=2))

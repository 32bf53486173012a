"""The worked tables of the rule, official code and paper, step by step."""

from __future__ import annotations

import pytest
import torch

from tests.support.scripted_models import TOY_B_START, closed_loop, double, open_loop, stream, toy_b
from vidaccel.easycache.config import EasyCacheConfig

TOY_A = EasyCacheConfig(threshold=0.5, warmup_steps=2)
# step: (predicted change, accumulated error, rate after the step, output)
TABLE_A: dict[int, tuple[float | None, float | None, float | None, float]] = {
    0: (None, None, None, 2),
    1: (None, None, 2, 4),
    2: (0.5, 0.5, 2, 6),
    3: (1 / 3, 1 / 3, 2, 7),
    4: (1 / 3, 2 / 3, 2, 10),
    5: (0.2, 0.2, 2, 11),
    6: (0.2, 0.4, 2, 12),
    7: (0.2, 0.6, 2, 16),
    8: (0.125, 0.125, 2, 17),
    9: (0.125, 0.25, 2, 18),
    10: (0.125, 0.375, 2, 19),
    11: (None, None, 2, 24),
}


def test_the_worked_table_of_the_open_loop_example_is_reproduced() -> None:
    outcome = open_loop(TOY_A, stream(12), double)
    assert outcome.reused == {3, 5, 6, 8, 9, 10}
    for index, (predicted, error, rate, output) in TABLE_A.items():
        decision = outcome.decisions[index]
        assert decision.predicted_change == (None if predicted is None else pytest.approx(predicted, rel=1e-6))
        assert decision.accumulated_error == (None if error is None else pytest.approx(error, rel=1e-6))
        assert outcome.rates[index] == (None if rate is None else pytest.approx(rate))
        assert outcome.outputs[index].item() == output


def test_an_error_equal_to_the_threshold_computes() -> None:
    decision = open_loop(TOY_A, stream(12), double).decisions[2]
    assert decision.accumulated_error == 0.5
    assert decision.computed
    assert decision.reason == "above_threshold"


def test_the_papers_denominator_is_the_predicted_output() -> None:
    outcome = open_loop(EasyCacheConfig(threshold=0.5, warmup_steps=2, denominator="previous"), stream(12), double)
    assert outcome.reused == {3, 5, 6, 8, 9, 10}
    assert outcome.decisions[6].predicted_change == pytest.approx(2 / 11)
    assert outcome.decisions[7].accumulated_error == pytest.approx(0.2 + 2 / 11 + 2 / 12)


# step: (computed, predicted change, accumulated error, rate after the step, mean |x|, mean |v|)
TABLE_B = [
    (True, None, None, None, 1.250000, 1.050000),
    (True, None, None, 0.738095, 1.196429, 1.002500),
    (True, None, None, 0.728892, 1.146811, 0.957714),
    (True, None, None, 0.719379, 1.100922, 0.915488),
    (False, 0.051384, 0.051384, 0.719379, 1.058548, 0.850096),
    (False, 0.047714, 0.099098, 0.719379, 1.019201, 0.789375),
    (True, 0.044306, 0.143404, 0.723884, 0.982664, 0.806990),
    (False, 0.051706, 0.051706, 0.723884, 0.949726, 0.749348),
    (False, 0.048013, 0.099719, 0.723884, 0.919141, 0.695823),
    (True, 0.044583, 0.144302, 0.690246, 0.890740, 0.715795),
    (False, 0.049303, 0.049303, 0.690246, 0.865733, 0.664667),
    (False, 0.045782, 0.095085, 0.690246, 0.842513, 0.617191),
    (True, 0.042512, 0.137596, 0.654085, 0.820951, 0.639144),
    (True, None, None, 0.595185, 0.802611, 0.615121),
]


def test_the_worked_table_of_the_closed_loop_example_is_reproduced() -> None:
    outcome, _ = closed_loop(EasyCacheConfig(threshold=0.1, warmup_steps=4), TOY_B_START, toy_b, 14)
    for index, (computed, predicted, error, rate, size_x, size_v) in enumerate(TABLE_B):
        decision = outcome.decisions[index]
        assert decision.computed is computed
        assert decision.predicted_change == (None if predicted is None else pytest.approx(predicted, abs=1e-6))
        assert decision.accumulated_error == (None if error is None else pytest.approx(error, abs=1e-6))
        assert outcome.rates[index] == (None if rate is None else pytest.approx(rate, abs=1e-6))
        assert outcome.latents[index].abs().mean().item() == pytest.approx(size_x, abs=1e-6)
        assert outcome.outputs[index].abs().mean().item() == pytest.approx(size_v, abs=1e-6)


@pytest.mark.parametrize(
    ("threshold", "denominator", "reused", "final"),
    [
        (0.0, "computed", set(), (0.67944849, -1.35889699, 1.18207914, -0.06385497)),
        (0.1, "computed", {4, 5, 7, 8, 10, 11}, (0.67559514, -1.35119028, 1.15374550, -0.03568320)),
        (0.1, "previous", {4, 6, 8, 9, 11, 12}, (0.67551219, -1.35102437, 1.15489494, -0.03733881)),
    ],
)
def test_the_variants_of_the_closed_loop_example_end_where_they_should(
    threshold: float, denominator: str, reused: set[int], final: tuple[float, ...]
) -> None:
    config = EasyCacheConfig(threshold=threshold, warmup_steps=4, denominator=denominator)
    outcome, x = closed_loop(config, TOY_B_START, toy_b, 14)
    assert outcome.reused == reused
    torch.testing.assert_close(x, torch.tensor([final], dtype=torch.float64), rtol=0, atol=1e-8)


def test_the_rate_spans_the_last_two_computed_steps_or_the_neighbours() -> None:
    official, _ = closed_loop(EasyCacheConfig(threshold=0.1, warmup_steps=4), TOY_B_START, toy_b, 14)
    x, v = official.latents, official.outputs
    assert official.rates[6] == pytest.approx(((v[6] - v[3]).abs().mean() / (x[6] - x[3]).abs().mean()).item())
    paper, _ = closed_loop(
        EasyCacheConfig(threshold=0.1, warmup_steps=4, rate_reference="previous"), TOY_B_START, toy_b, 14
    )
    assert paper.decisions[5].computed is False
    x, v = paper.latents, paper.outputs
    assert paper.rates[6] == pytest.approx(((v[6] - v[5]).abs().mean() / (x[6] - x[5]).abs().mean()).item())

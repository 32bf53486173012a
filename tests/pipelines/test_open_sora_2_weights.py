"""Converted weights of Open-Sora 2.0's transformer compute what the published network computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.open_sora_2_original import Original, Weights, random_weights
from tests.support.tiny_open_sora_2 import POOLED_DIM, TEXT_DIM, tiny_flux
from vidaccel.convert.formats import Rule, unchanged
from vidaccel.convert.open_sora_2_map import TRANSFORMER_RULES, added, halves_swapped, interleaved, side_by_side
from vidaccel.open_sora.version_2 import token_positions

HEADS, AXES, SIZE, TOLERANCE = 2, (4, 14, 14), (3, 4, 6), 2e-5
CONFIG = {"attention_head_dim": sum(AXES), "num_attention_heads": HEADS, "num_layers": 2, "num_single_layers": 2}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(heads=HEADS, head_dim=sum(AXES), double=2, single=2, text=TEXT_DIM, pooled=POOLED_DIM)


def mapped(weights: Weights, rules: Sequence[Rule] = TRANSFORMER_RULES) -> Weights:
    return {
        name: rule.transform([weights[source] for source in sources], CONFIG)
        for rule in rules
        for name, sources in rule.expand(CONFIG)
    }


def difference(weights: Weights, converted: Weights) -> float:
    """Largest difference of the two networks' outputs, of size 1 to 10, over a batch with a reference frame."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    length = SIZE[0] * SIZE[1] * SIZE[2] // 4
    image, condition, text, pooled = random(2, length, 64), random(2, length, 68), random(2, 5, TEXT_DIM), random(2, 8)
    time, positions = torch.tensor([0.9, 0.35]), token_positions(SIZE, device=torch.device("cpu"))
    expected = Original(weights, heads=HEADS, axes=AXES)(image, condition, text, pooled, time, positions)
    model = tiny_flux(**CONFIG, axes_dims_rope=AXES)
    model.load_state_dict(converted, strict=True)
    arguments: dict[str, Any] = {"img_ids": positions, "txt_ids": torch.zeros(5, 3)}
    with torch.no_grad():
        output = model(
            hidden_states=torch.cat([image, condition], dim=-1),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time,
            **arguments,
        ).sample
    assert 1 < float(expected.abs().max()) < 10, expected.abs().max()
    return float((output - expected).abs().max())


def test_the_converted_weights_compute_the_same(weights: Weights) -> None:
    assert difference(weights, mapped(weights)) <= TOLERANCE


@pytest.mark.parametrize("left_out", [interleaved, halves_swapped])
def test_each_change_of_order_is_needed(weights: Weights, left_out: Any) -> None:
    rules = [replace(rule, transform=unchanged) if rule.transform is left_out else rule for rule in TRANSFORMER_RULES]
    assert difference(weights, mapped(weights, rules)) > 100 * TOLERANCE


@pytest.mark.parametrize("norms", [True, False])
def test_queries_and_keys_need_their_order_in_rows_and_in_norms(weights: Weights, norms: bool) -> None:
    rules = [
        replace(rule, transform=unchanged)
        if rule.transform is interleaved and ("norm_" in rule.target) == norms
        else rule
        for rule in TRANSFORMER_RULES
    ]
    assert difference(weights, mapped(weights, rules)) > 100 * TOLERANCE


def test_the_condition_is_part_of_the_input(weights: Weights) -> None:
    silent = {name: torch.zeros_like(value) if name.startswith("cond_in") else value for name, value in weights.items()}
    assert difference(weights, mapped(silent)) > 100 * TOLERANCE


def test_the_order_within_a_head_deals_its_halves_out_in_turn() -> None:
    rows = torch.arange(8.0)
    assert interleaved([rows], {"attention_head_dim": 4}).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_biases_of_two_projections_add_up_and_their_weights_lie_side_by_side() -> None:
    one, two = torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 2**-8, dtype=torch.bfloat16)
    assert torch.equal(added([one, two], {}), (one.double() + two.double()).to(torch.bfloat16))
    assert side_by_side([torch.zeros(3, 2), torch.zeros(3, 5)], {}).shape == (3, 7)


def test_every_published_tensor_is_used(weights: Weights) -> None:
    used = {source for rule in TRANSFORMER_RULES for _, sources in rule.expand(CONFIG) for source in sources}
    assert used == set(weights)

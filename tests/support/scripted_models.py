"""Scripted models and loops for the decision rule: numbers that can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.report import StepDecision
from vidaccel.easycache.rule import EasyCacheRule

Model = Callable[[Tensor, int], Tensor]


@dataclass
class Outcome:
    decisions: list[StepDecision] = field(default_factory=list)
    rates: list[float | None] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)

    @property
    def reused(self) -> set[int]:
        return {decision.step_index for decision in self.decisions if not decision.computed}


def one_step(rule: EasyCacheRule, outcome: Outcome, x: Tensor, model: Model, index: int, total: int) -> Tensor:
    decision = rule.decide([x], step_index=index, num_steps=total)
    if decision.computed:
        output = model(x, index)
        rule.record("cond", [x], [output])
    else:
        output = rule.predict("cond", [x])[0]
    rate = rule.transformation_rate
    outcome.decisions.append(decision)
    outcome.rates.append(None if rate is None else rate.max().item())
    outcome.outputs.append(output)
    outcome.latents.append(x)
    return output


def open_loop(config: EasyCacheConfig, inputs: Sequence[Tensor], model: Model) -> Outcome:
    """Feed a fixed stream of inputs."""
    rule, outcome = EasyCacheRule(config), Outcome()
    for index, x in enumerate(inputs):
        one_step(rule, outcome, x, model, index, len(inputs))
    return outcome


def closed_loop(config: EasyCacheConfig, x: Tensor, model: Model, num_steps: int) -> tuple[Outcome, Tensor]:
    """Integrate dx/dsigma = v by Euler from sigma 1 to 0."""
    rule, outcome = EasyCacheRule(config), Outcome()
    for index in range(num_steps):
        output = one_step(rule, outcome, x, model, index, num_steps)
        x = x + (-1 / num_steps) * output
    return outcome, x


def double(x: Tensor, index: int) -> Tensor:
    return 2 * x


def stream(count: int) -> list[Tensor]:
    return [torch.tensor([[float(index + 1)]]) for index in range(count)]


TOY_B_BIAS = torch.tensor([[0.25, -0.5, 1.0, -0.75]], dtype=torch.float64)
TOY_B_START = torch.tensor([[1.0, -2.0, 0.5, 1.5]], dtype=torch.float64)


def toy_b(x: Tensor, index: int) -> Tensor:
    return 0.8 * x - TOY_B_BIAS * (1 + 0.05 * index)

"""The two replaceable parts of step reuse: what a reused step returns, and how large a change is.

EasyCache (arXiv 2507.02860) adds the last transformation vector (equation 3) and measures mean absolute changes
(equations 2 and 4). Any function with the same signature may stand in for either. Pure torch: no model, no diffusers.

Precision: differences are formed in float32 (float64 for float64 tensors) from tensors stored in the model's own type,
so that a reused output is rounded once. In float32 it equals `latents + (output - input)` bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One full evaluation of a model: what went in and what came out, both of the same shape."""

    step_index: int
    latents: Tensor
    output: Tensor


Predictor = Callable[[Tensor, Evaluation], Tensor]
"""`(latents, last evaluation) -> output`, a new tensor with shape and type of the evaluation's output."""

Statistic = Callable[[Tensor], Tensor]
"""`difference or output, at least float32 -> (G,)`: one magnitude for each group that is watched on its own."""


def difference(left: Tensor, right: Tensor) -> Tensor:
    """`left - right` in at least float32."""
    return widened(left) - widened(right)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def add_transformation(latents: Tensor, last: Evaluation) -> Tensor:
    """Equation 3: the latents plus the transformation vector of the last full evaluation."""
    return (widened(latents) + difference(last.output, last.latents)).to(last.output.dtype)


def hold_output(latents: Tensor, last: Evaluation) -> Tensor:
    """The output of the last full evaluation once more, whatever the latents."""
    return last.output.clone()


def mean_change(values: Tensor) -> Tensor:
    """Mean absolute value over the whole batch, shape (1,): the official rule."""
    return values.abs().mean().reshape(1)


def sample_change(values: Tensor) -> Tensor:
    """Mean absolute value of every sample, shape (B,): the fastest changing sample decides for the batch."""
    return values.abs().flatten(1).mean(dim=1)


PREDICTORS: Mapping[str, Predictor] = MappingProxyType({"transformation": add_transformation, "output": hold_output})
STATISTICS: Mapping[str, Statistic] = MappingProxyType({"mean": mean_change, "sample": sample_change})


def find_predictor(choice: str | Predictor) -> Predictor:
    """The predictor of that name, or the function itself."""
    return PREDICTORS[choice] if isinstance(choice, str) else choice


def find_statistic(choice: str | Statistic) -> Statistic:
    """The statistic of that name, or the function itself."""
    return STATISTICS[choice] if isinstance(choice, str) else choice

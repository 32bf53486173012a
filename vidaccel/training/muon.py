"""Muon (Keller Jordan, 2024): momentum whose matrices are made orthogonal before they are applied.

The same rule as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, but matrices of equal shape are orthogonalised as
one batch: a small transformer has dozens of them and would otherwise wait for launches, not for arithmetic. Matrices
that are shared out among several cards are put together on all of them, and so is the momentum.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.training.sharding import placed, whole

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS_OF_ADAMW = 0.2


class BatchedMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for 2-D `parameters`, learning rates as for AdamW. Raises ValueError for others."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.01, momentum: float = 0.95
    ) -> None:
        parameters = list(parameters)
        if wrong := [tuple(parameter.shape) for parameter in parameters if parameter.ndim != 2]:
            raise ValueError(f"Muon takes matrices only, got a parameter of shape {wrong[0]}; give it to AdamW.")
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the gradients of one step; every parameter must have one."""
        result = None if closure is None else closure()
        for group in self.param_groups:
            self._step_group(group)
        return result

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = group["params"]
        gradient = torch.stack([whole(_gradient(parameter)) for parameter in parameters])
        buffer = self.state[parameters[0]].setdefault("momentum_buffers", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(buffer, group["momentum"]))
        rate = group["lr"] * _RMS_OF_ADAMW * math.sqrt(max(gradient.shape[-2:]))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        changes = zip(update.to(gradient.dtype).unbind(0), parameters, strict=True)
        torch._foreach_add_(parameters, [placed(change, parameter) for change, parameter in changes], alpha=-rate)


def split_parameters(
    network: nn.Module, parameters: Sequence[nn.Parameter]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks of `network`, which are Muon's, and those of `parameters` that are AdamW's."""
    matrices = [one for name, one in network.named_parameters() if name.startswith("blocks.") and one.ndim == 2]
    taken = {id(parameter) for parameter in matrices}
    return matrices, [parameter for parameter in parameters if id(parameter) not in taken]


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factor of each of (N, rows, columns) matrices, by five Newton-Schulz iterations.

    In bf16, but on a CPU, where products of bf16 matrices take forty times as long, in float32.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    factor = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    factor = factor.mT if is_tall else factor
    factor = factor / factor.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = factor @ factor.mT
        factor = torch.baddbmm(factor, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), factor, beta=a)
    return factor.mT if is_tall else factor


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has no gradient; take it out of the optimizer."
        )
    return parameter.grad

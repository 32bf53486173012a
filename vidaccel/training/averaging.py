"""A running average of the weights; the average is what is validated, saved and exported."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_YOUNG_STEPS = 20


class WeightAverage:
    """Exponential moving average of `parameters`; short-sighted at first, so that the start is forgotten soon."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.values: list[Tensor] = [parameter.detach().clone() for parameter in parameters]
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + _YOUNG_STEPS))
        current = [parameter.detach() for parameter in self.parameters]
        torch._foreach_lerp_(self.values, current, 1 - decay)

    @torch.no_grad()
    def load(self, values: Sequence[Tensor], *, num_updates: int) -> None:
        """Go on from an average of `num_updates` updates."""
        for mine, value in zip(self.values, values, strict=True):
            mine.copy_(value)
        self.num_updates = num_updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside the block and their own values again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        own = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, value, mine in zip(self.parameters, self.values, own, strict=True):
            parameter.copy_(value)
            value.copy_(mine)

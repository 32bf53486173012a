"""Steps of a chunk whose pass is left out: the clean estimate of the step before stands in for the one of the step.

A flow-matching step at noise level sigma estimates the clean chunk, x0 = x - sigma v (Lipman et al., arXiv 2210.02747).
With the estimate of the step before, a few-step student that re-noises goes from there straight to the next noise
level, as if the level had never been on its list; a sampler without fresh noise keeps its velocity. Before the first
step stands the finished chunk before, which is remembered anyway. The noise of every step is drawn as ever.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from vidaccel.errors import UserError

_FORM = re.compile(r"(\d{1,4}(?:\+\d{1,4})*)(?:@(\d+(?:\.\d+)?))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class StepSkipping:
    """Which steps of a chunk are left out.

    steps: their numbers, from 1. The first is left out only where the chunk before is remembered whole.
    threshold: left out only where the clean estimate has changed by less than this from the first step to the second
        (norm of the difference over that of the first estimate), in every sample for itself; None: in all chunks.
    Raises UserError for steps that cannot be left out.
    """

    steps: tuple[int, ...]
    threshold: float | None = None

    def __post_init__(self) -> None:
        first, steps, threshold = 1 if self.threshold is None else 3, self.steps, self.threshold
        is_tuple = isinstance(steps, tuple)
        are_whole = is_tuple and len(steps) > 0 and all(type(step) is int for step in steps)
        if not are_whole or sorted(set(steps)) != list(steps) or steps[0] < first:
            why = "" if threshold is None else " (the first two decide)"
            raise UserError(
                f"Steps to leave out must be numbers from {first} on{why}, each once and in order, as 3+4; got "
                f"{('+'.join(map(str, steps)) or 'none') if is_tuple else repr(steps)}."
            )
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if threshold is not None and not (is_number and 0 < threshold < math.inf):
            raise UserError(f"The change below which steps are left out must be a number above 0, got {threshold!r}.")

    @classmethod
    def parse(cls, text: Any) -> "StepSkipping":
        """`"3"`, `"2+3"`, or with a threshold `"3+4@0.15"`. Raises UserError, for anything but a text too."""
        found = _FORM.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise UserError(
                f"Steps to leave out are written as '3' or '2+3', with a threshold as '3+4@0.15'; got {text!r}."
            )
        steps, threshold = found.groups()
        return cls(steps=tuple(map(int, steps.split("+"))), threshold=None if threshold is None else float(threshold))

    def check(self, num_inference_steps: int, *, observes_passes: bool = False) -> None:
        """Raise UserError where a student of so many steps, or a memory that observes their passes, needs them."""
        if self.steps[-1] > num_inference_steps:
            raise UserError(
                f"Step {self.steps[-1]} cannot be left out of {num_inference_steps}; name steps up to "
                f"{num_inference_steps}."
            )
        if len(self.steps) == num_inference_steps:
            raise UserError(f"All {num_inference_steps} steps cannot be left out; compute at least one.")
        if observes_passes:
            raise UserError(
                "The official mode remembers noisy passes, which steps that are left out do not have; use clean."
            )

    def __str__(self) -> str:
        """As `parse` takes it, to the same threshold."""
        steps = "+".join(map(str, self.steps))
        if self.threshold is None:
            return steps
        return f"{steps}@{Decimal(repr(float(self.threshold))):f}".removesuffix(".0")


@dataclass
class ChunkSteps:
    """The steps of one chunk, taken one after the other.

    sigmas: noise level of every step. before: the finished chunk before (B, C, F, H, W), None where there is none.
    """

    rule: StepSkipping
    sigmas: Sequence[float]
    before: Tensor | None = None
    _estimates: list[Tensor] = field(default_factory=list)
    _skipped: list[list[bool]] = field(default_factory=list)  # for every step, by sample
    _changes: list[float] | None = None  # of each sample, read from the device once

    def velocity(self, latents: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Velocity (B, C, F, H, W) of the next step at `latents`; `compute` makes it with a pass, where one is needed.

        A sample leaves a step out whatever the others do; the pass is saved where all of them do.
        """
        sigma = self.sigmas[len(self._estimates)]
        kept = self._estimates[-1] if self._estimates else self.before
        skipped = [False] * len(latents) if kept is None else self._left_out(len(latents))
        velocity = latents if all(skipped) else compute()
        if kept is not None and any(skipped):
            rows = torch.tensor(skipped, device=latents.device).view(-1, 1, 1, 1, 1)
            velocity = torch.where(rows, (latents - kept) / sigma, velocity)
        self._estimates.append(latents - sigma * velocity)
        self._skipped.append(skipped)
        return velocity

    @property
    def num_skipped(self) -> tuple[int, ...]:
        """For each sample, how many steps were left out so far."""
        return tuple(map(sum, zip(*self._skipped, strict=True)))

    def _left_out(self, count: int) -> list[bool]:
        rule, step = self.rule, len(self._estimates) + 1
        if step not in rule.steps:
            return [False] * count
        if rule.threshold is None:
            return [True] * count
        if self._changes is None:
            self._changes = relative_changes(*self._estimates[:2]).tolist()
        return [change < rule.threshold for change in self._changes]


def relative_changes(first: Tensor, second: Tensor) -> Tensor:
    """Of each sample, the norm of second - first over that of first; (B,)."""
    found: Tensor = (second - first).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)
    return found

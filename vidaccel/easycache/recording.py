"""The steps of the call under way, until they are a report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vidaccel.easycache.report import StepDecision
from vidaccel.machine.timing import Moment, seconds_between


@dataclass(kw_only=True)
class Step:
    """A step being recorded: its decision and what is only known later.

    rates: of every sample, as their rules hold them; the largest is found when a report is made.
    """

    decision: StepDecision
    rates: tuple[Tensor, ...] = ()
    num_passes: int = 1
    num_done: int = 0
    spans: list[tuple[Moment, Moment]] = field(default_factory=list)


class Recording:
    """The steps of one loop, and of those of the same call that are through."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._earlier: list[Step] = []

    @property
    def section(self) -> int:
        """How many loops of this call are through."""
        return self._earlier[-1].decision.section + 1 if self._earlier else 0

    def next_loop(self) -> Recording:
        """The recording that goes on with another loop of the same call."""
        following = Recording()
        following._earlier = [*self._earlier, *self.steps]
        return following

    def has_all_passes(self) -> bool:
        """Whether the present step is done: as many passes as the step before had."""
        expected = self.steps[-2].num_passes if len(self.steps) > 1 else 1
        return bool(self.steps) and self.steps[-1].num_done >= expected

    def decisions(self) -> tuple[StepDecision, ...]:
        """All steps, with rates and times; one read for each device."""
        steps = [*self._earlier, *self.steps]
        rates = _read([step.rates for step in steps])
        return tuple(
            replace(
                step.decision,
                transformation_rate=rate,
                num_passes=step.num_passes,
                num_computed_passes=len(step.spans),
                seconds=sum(seconds_between(*span) for span in step.spans),
            )
            for step, rate in zip(steps, rates, strict=True)
        )


def _read(rates: list[tuple[Tensor, ...]]) -> list[float | None]:
    """The largest rate of every step, in one read for each device; reused steps have the tensors of the step before."""
    largest = {_ids(each): torch.stack([rate.max() for rate in each]).max() for each in _distinct(rates)}
    values: dict[int, float] = {}
    known = {index: largest[_ids(each)] for index, each in enumerate(rates) if each}
    for device in {rate.device for rate in known.values()}:
        here = {index: rate for index, rate in known.items() if rate.device == device}
        values |= dict(zip(here, torch.stack([rate.float() for rate in here.values()]).tolist(), strict=True))
    return [values.get(index) for index in range(len(rates))]


def _ids(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(map(id, tensors))


def _distinct(rates: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return list({_ids(each): each for each in rates if each}.values())

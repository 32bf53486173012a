"""The controllers of one transformer: one for each sample that decides for itself and each stream it denoises.

All streams of a sample (video and audio) decide together: a step is reused where every one of them allows it. The
decision itself is `vidaccel.easycache.rule`; nothing here adds to the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vidaccel.easycache.batch import Batch
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.layout import Piece, Pieces
from vidaccel.easycache.report import Reason, StepDecision
from vidaccel.easycache.rule import EasyCacheController

Streams = Sequence[Tensor]


class Ensemble:
    """Decisions and memory of one transformer during one generation, for all samples and streams."""

    def __init__(self, config: EasyCacheConfig) -> None:
        self.config = config
        self._groups: list[list[EasyCacheController]] = []
        self._rests: dict[str, dict[int, list[Tensor | None]]] = {}

    @property
    def leader(self) -> str | None:
        """The deciding branch, None before the first evaluation."""
        return self._groups[0][0].leader if self._groups else None

    @property
    def transformation_rate(self) -> Tensor | None:
        """The largest rate k_t of all samples and streams, shape (1,); None while there is none."""
        rates = [controller.transformation_rate for controller in self._controllers()]
        known = [rate.max() for rate in rates if rate is not None]
        return torch.stack(known).max().reshape(1) if known else None

    def previous_latents(self, batch: Batch) -> Tensor | None:
        """The first stream's input of the step before, if it was a batch like this one."""
        parts = {index: group[0].previous_latents for index, group in enumerate(self._groups)}
        known = {index: part for index, part in parts.items() if part is not None}
        return batch.join(known) if len(known) == batch.num_groups == len(parts) > 0 else None

    def reset(self) -> None:
        """Forget the generation and release its tensors."""
        self._rests = {}
        for controller in self._controllers():
            controller.reset()

    def tensors(self) -> list[Tensor]:
        """The distinct latent-sized tensors held at the moment."""
        kept = [rest for groups in self._rests.values() for parts in groups.values() for rest in parts]
        held = [tensor for controller in self._controllers() for tensor in controller.tensors()]
        return held + [rest for rest in kept if rest is not None]

    def fit(self, batch: Batch, num_streams: int) -> None:
        """Have a controller for every group and stream; another number of either begins without history."""
        if not self._has_layout(batch, num_streams):
            self._groups = [
                [EasyCacheController(self.config) for _ in range(num_streams)] for _ in range(batch.num_groups)
            ]
        for controller in self._controllers():
            controller.num_branches, controller.deciding_branch = batch.num_branches, batch.deciding_branch

    def must_compute(
        self, batch: Batch, streams: Streams, *, step_index: int, num_steps: int | None
    ) -> list[Reason | None]:
        """For every group why it may not reuse the step whatever its statistics are, or None."""
        if not self._has_layout(batch, len(streams)):
            return ["no_history"] * batch.num_groups
        return [
            next(
                (
                    reason
                    for controller, latents in zip(group, self._of_group(batch, streams, index), strict=True)
                    if (reason := controller.must_compute(latents, step_index=step_index, num_steps=num_steps))
                ),
                None,
            )
            for index, group in enumerate(self._groups)
        ]

    def estimate(self, batch: Batch, streams: Streams, reasons: Sequence[Reason | None]) -> Tensor:
        """The estimates of all groups that `must_compute` left open, shape (3 * open groups * streams,)."""
        return torch.cat(
            [
                controller.estimate(latents)
                for index, group in enumerate(self._groups)
                if reasons[index] is None
                for controller, latents in zip(group, self._of_group(batch, streams, index), strict=True)
            ]
        )

    def decide(
        self,
        batch: Batch,
        streams: Streams,
        *,
        step_index: int,
        num_steps: int | None,
        values: Sequence[float] | None = None,
        forced: Reason | None = None,
    ) -> StepDecision:
        """Equation 6 for the deciding branch, for every group; one read of the device, none if `values` are given.

        values: the numbers of `estimate`.
        forced: a reason to compute all groups that lies outside of them.
        """
        self.fit(batch, len(streams))
        reasons = self.must_compute(batch, streams, step_index=step_index, num_steps=num_steps)
        if forced is not None:
            reasons, values = [forced] * batch.num_groups, []
        if values is None:
            values = self.estimate(batch, streams, reasons).tolist() if None in reasons else []
        rest = list(values)
        decisions = []
        for index, group in enumerate(self._groups):
            shares = [rest[3 * k : 3 * k + 3] for k in range(len(group))] if reasons[index] is None else None
            rest = rest if shares is None else rest[3 * len(group) :]
            each = [
                controller.decide(
                    latents,
                    step_index=step_index,
                    num_steps=num_steps,
                    estimate=None if shares is None else _common(shares, own),
                    forced=reasons[index],
                )
                for own, (controller, latents) in enumerate(
                    zip(group, self._of_group(batch, streams, index), strict=True)
                )
            ]
            decisions.append(_merged(each))
        if not batch.per_sample or batch.num_groups == 1:
            return decisions[0]
        return replace(_merged(decisions), samples=tuple(decision.computed for decision in decisions))

    def can_follow(self, branch: str, batch: Batch, streams: Streams) -> list[bool]:
        """For every group whether a further branch may be predicted in a step that the group reuses."""
        if not self._has_layout(batch, len(streams)):
            return [False] * batch.num_groups
        return [
            all(
                controller.can_follow(branch, latents)
                for controller, latents in zip(group, self._of_group(batch, streams, index), strict=True)
            )
            for index, group in enumerate(self._groups)
        ]

    def predict(self, branch: str, batch: Batch, streams: Streams, groups: Sequence[int]) -> Pieces:
        """The outputs of reused passes: for each of `groups` new tensors, and the rests of their last evaluation."""
        return {
            index: [
                Piece(controller.predict(branch, latents), rest)
                for controller, latents, rest in zip(
                    self._groups[index],
                    self._of_group(batch, streams, index),
                    self._rests[branch][index],
                    strict=True,
                )
            ]
            for index in groups
        }

    def record(
        self, branch: str, batch: Batch, streams: Streams, pieces: Pieces, *, same_latents: bool = False
    ) -> None:
        """Remember a computed pass: for each computed group the pieces of its outputs, one a stream."""
        if len(self._groups) != batch.num_groups:
            return  # a pass over other samples than the deciding one: always computed, never predicted
        for index, parts in pieces.items():
            latents_of_group = self._of_group(batch, streams, index)
            for controller, latents, piece in zip(self._groups[index], latents_of_group, parts, strict=True):
                controller.record(branch, latents, piece.reused, same_latents=same_latents)
            rests = [None if piece.rest is None else piece.rest.clone() for piece in parts]
            self._rests.setdefault(branch, {})[index] = rests

    def _has_layout(self, batch: Batch, num_streams: int) -> bool:
        """Whether there is a controller for every group of the batch and each of its streams."""
        return [len(group) for group in self._groups] == [num_streams] * batch.num_groups

    def _controllers(self) -> list[EasyCacheController]:
        return [controller for group in self._groups for controller in group]

    @staticmethod
    def _of_group(batch: Batch, streams: Streams, group: int) -> list[Tensor]:
        return [batch.take(stream, group) for stream in streams]


def _common(shares: Sequence[Sequence[float]], own: int) -> list[float]:
    """The estimate of one stream, allowed only where every stream of the sample allows it."""
    return [*shares[own][:2], min(share[2] for share in shares)]


def _merged(decisions: Sequence[StepDecision]) -> StepDecision:
    """One decision from several: computed if any is, the first such reason, the largest numbers."""
    computed = [decision for decision in decisions if decision.computed]
    telling = [decision for decision in computed if decision.reason != "no_change"]  # what a stream says that follows
    first = (telling or computed or list(decisions))[0]
    return replace(
        first,
        predicted_change=_largest([decision.predicted_change for decision in decisions]),
        accumulated_error=_largest([decision.accumulated_error for decision in decisions]),
    )


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None

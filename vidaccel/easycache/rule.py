"""EasyCache: reuse the last transformation of the latents while it is predicted to change little.

Method: "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching", arXiv 2507.02860,
equations 2 to 6. Where paper and official code differ the default is the code's choice. Symbols: x_t latents given to
the model, v_t its output, k_t `transformation_rate`, epsilon_t `predicted_change`, E_t `accumulated_error`, tau
`threshold`, R `warmup_steps`. Tensors and plain Python only: nothing here knows a model, a pipeline or diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.predictors import (
    Evaluation,
    difference,
    find_predictor,
    find_statistic,
    takes_earlier_evaluation,
    widened,
)
from vidaccel.easycache.report import Reason, StepDecision

ROUNDING = 1e-6  # the error is a float32, the threshold is not
Streams = Sequence[Tensor]


class ReuseRule(Protocol):
    """What decides about the steps of one sample and holds what it needs for that: all that a run asks of a rule.

    A sample has one latent tensor for each of its streams (video; video and sound), which are decided together. In a
    step the deciding branch (the conditional pass) goes first: `decide`, then `record` if the decision says computed,
    else `predict`. Further branches follow with `can_follow`, then `predict` or `record`. Tensors passed in are never
    kept or changed, and tensors handed out are never kept.

    config: the settings, a dataclass with `to_dict`, as the report shows them.
    num_branches, deciding_branch: within a call with batched guidance the rows are `num_branches` slices of equal size,
        and `deciding_branch` is the index of the one that decides.
    leader: where branches are separate calls, the name of the one that decides; None before the first evaluation.
    transformation_rate: what the report shows of a step beside its decision; None while there is nothing.
    """

    config: EasyCacheConfig
    num_branches: int
    deciding_branch: int
    leader: str | None
    transformation_rate: Tensor | None

    def fresh(self) -> ReuseRule:
        """One for another sample, with the same settings and nothing remembered."""

    def reset(self) -> None:
        """Forget the generation and release its tensors."""

    def tensors(self) -> list[Tensor]:
        """The distinct latent-sized tensors held at the moment."""

    def must_compute(self, streams: Streams, *, step_index: int, num_steps: int | None) -> Reason | None:
        """Why the step may not be reused whatever its values are, or None. Reads no tensor values."""

    def estimate(self, streams: Streams) -> Tensor:
        """The numbers that `decide` needs, shape (3,), on the device; called only where `must_compute` gave None."""

    def decide(
        self,
        streams: Streams,
        *,
        step_index: int,
        num_steps: int | None = None,
        estimate: Sequence[float] | None = None,
        forced: Reason | None = None,
    ) -> StepDecision:
        """Compute or reuse the step; `estimate` as it was read, `forced` a reason to compute from outside."""

    def can_follow(self, branch: str, streams: Streams) -> bool:
        """Whether a further branch may be predicted in a reused step."""

    def predict(self, branch: str, streams: Streams) -> list[Tensor]:
        """The outputs of a reused pass, new tensors."""

    def record(self, branch: str, streams: Streams, outputs: Streams, *, same_latents: bool = False) -> None:
        """Remember a computed pass. The first branch recorded after a reset is the deciding one."""


class EasyCacheRule:
    """The rule of EasyCache, see `ReuseRule`.

    Held are copies: the previous input, and input and output of the last evaluation of each branch (their difference is
    the transformation vector), and of the one before for predictors that take it. Changes of all streams stand in one
    vector, so that a step is reused where every one of them allows it.
    """

    def __init__(self, config: EasyCacheConfig, *, num_branches: int = 1, deciding_branch: int = 0) -> None:
        """A batch that cannot be divided into `num_branches` is measured as a whole."""
        self.config = config
        self.num_branches, self.deciding_branch = num_branches, deciding_branch
        self._predictor = find_predictor(config.predictor)
        self._takes_earlier = takes_earlier_evaluation(self._predictor)
        self._statistic = find_statistic(config.statistic)
        self.reset()

    def fresh(self) -> EasyCacheRule:
        return EasyCacheRule(self.config)

    def reset(self) -> None:
        self.transformation_rate: Tensor | None = None
        self.leader: str | None = None
        self._previous: list[Tensor] = []  # the input of the step before
        self._previous_output: list[Tensor] = []  # the output of the step before, for `rate_reference` "previous" only
        self._evaluations: dict[str, list[Evaluation]] = {}
        self._earlier: dict[str, list[Evaluation]] = {}
        self._output_magnitude: Tensor | None = None
        self._error: Tensor | float = 0.0
        self._estimated_error: Tensor | None = None
        self._num_consecutive_reuses = 0
        self._step_index = -1

    def tensors(self) -> list[Tensor]:
        held = [*self._previous, *self._previous_output]
        for evaluations in (*self._evaluations.values(), *self._earlier.values()):
            held += [tensor for evaluation in evaluations for tensor in evaluation.tensors()]
        return list({id(tensor): tensor for tensor in held}.values())

    def must_compute(self, streams: Streams, *, step_index: int, num_steps: int | None) -> Reason | None:
        config = self.config
        if step_index < config.warmup_steps:
            return "warmup"
        if num_steps is not None and step_index >= num_steps - config.tail_steps:
            return "tail"
        if self._previous and not _same_layout(streams, self._previous):
            return "input_changed"
        if self.transformation_rate is None or self.leader is None:
            return "no_history"
        limit = config.max_consecutive_reuses
        if limit is not None and self._num_consecutive_reuses >= limit:
            return "max_consecutive_reuses"
        return None

    def estimate(self, streams: Streams) -> Tensor:
        """Equations 4 and 5: predicted change, accumulated error, and whether reuse is allowed (0 or 1).

        The last is the comparison of equation 6, `allowed = ...`; its first and last steps are in `must_compute`.
        """
        assert self.transformation_rate is not None
        assert self._output_magnitude is not None
        change = self._change(streams, self._previous)
        predicted_change = self.transformation_rate * change / self._output_magnitude
        self._estimated_error = self._error + predicted_change
        allowed = (self._estimated_error < self.config.threshold) & (change > 0)  # false for NaN and infinity
        if predicted_change.numel() == 1:  # the usual case: no kernels that find the largest of one
            return torch.cat([predicted_change, self._estimated_error, allowed.to(predicted_change.dtype)])
        error = self._estimated_error.max()
        return torch.stack([predicted_change.max(), error, allowed.all().to(error.dtype)])

    def decide(
        self,
        streams: Streams,
        *,
        step_index: int,
        num_steps: int | None = None,
        estimate: Sequence[float] | None = None,
        forced: Reason | None = None,
    ) -> StepDecision:
        """Equation 6, put together from `must_compute` (warm-up, last steps) and `estimate` (the comparison with tau).

        Without `estimate` its numbers are read here, the one read of device memory in a step.
        """
        reason = forced or self.must_compute(streams, step_index=step_index, num_steps=num_steps)
        if self._previous and not _same_layout(streams, self._previous):
            self.reset()
        self._step_index = step_index
        if reason is not None:
            return StepDecision(step_index=step_index, computed=True, reason=reason)
        predicted_change, error, allowed = self.estimate(streams).tolist() if estimate is None else estimate
        if allowed:
            assert self._estimated_error is not None
            self._error = self._estimated_error
            self._num_consecutive_reuses += 1
        return StepDecision(
            step_index=step_index,
            computed=not allowed,
            reason="below_threshold" if allowed else _refusal(predicted_change, error, self.config.threshold),
            predicted_change=predicted_change,
            accumulated_error=error,
        )

    def can_follow(self, branch: str, streams: Streams) -> bool:
        """The branch's vector must not be older than that of the deciding branch."""
        last, leader = self._evaluations.get(branch), self._evaluations.get(self.leader or "")
        if last is None or leader is None or last[0].step_index < leader[0].step_index:
            return False
        return _same_layout(streams, [evaluation.latents for evaluation in last])

    def predict(self, branch: str, streams: Streams) -> list[Tensor]:
        """Equation 3 by default."""
        last = self._evaluations[branch]
        earlier: Sequence[Evaluation | None] = self._earlier.get(branch) or [None] * len(last)
        outputs = [self._checked_output(*each) for each in zip(streams, last, earlier, strict=True)]
        if branch == self.leader:
            if self.config.denominator == "previous":
                self._output_magnitude = self._magnitude(outputs)
            if self.config.rate_reference == "previous":
                self._previous_output = [output.clone() for output in outputs]
            self._previous = [latents.clone() for latents in streams]
        return outputs

    def record(self, branch: str, streams: Streams, outputs: Streams, *, same_latents: bool = False) -> None:
        """`same_latents`: the latents equal those of the deciding branch in this step, so that one copy serves."""
        if self.leader is None:
            self.leader = branch
        shared = self._evaluations.get(self.leader, []) if same_latents and branch != self.leader else []
        if shared and shared[0].step_index == self._step_index:
            kept = [evaluation.latents for evaluation in shared]
        else:
            kept = [latents.clone() for latents in streams]
        made = [
            Evaluation(step_index=self._step_index, latents=latents, output=output.clone())
            for latents, output in zip(kept, outputs, strict=True)
        ]
        if branch == self.leader:
            self._begin_interval(made)
        if self._takes_earlier and branch in self._evaluations:
            self._earlier[branch] = self._evaluations[branch]
        self._evaluations[branch] = made

    def _begin_interval(self, made: Sequence[Evaluation]) -> None:
        """Equation 2, then E_t = 0: what a computed step of the deciding branch changes."""
        latents, outputs = [one.latents for one in made], [one.output for one in made]
        if (last := self._evaluations.get(self.leader or "")) is not None:
            inputs_then, outputs_then = [one.latents for one in last], [one.output for one in last]
            if self.config.rate_reference == "previous":
                inputs_then, outputs_then = self._previous, self._previous_output
            self.transformation_rate = self._change(outputs, outputs_then) / self._change(latents, inputs_then)
        self._output_magnitude = self._magnitude(outputs)
        self._previous = latents
        self._previous_output = outputs if self.config.rate_reference == "previous" else []
        self._error, self._num_consecutive_reuses = 0.0, 0

    def _checked_output(self, latents: Tensor, last: Evaluation, earlier: Evaluation | None) -> Tensor:
        output: Any = self._predictor(latents, last, *((earlier,) if self._takes_earlier else ()))
        if not isinstance(output, Tensor) or not _same_layout([output], [last.output]):
            raise ValueError(
                f"`predictor` must return a tensor of shape {tuple(last.output.shape)} and type {last.output.dtype} on "
                f"{last.output.device}, like the last output; got {_layout(output)}."
            )
        return output

    def _change(self, left: Streams, right: Streams) -> Tensor:
        pairs = zip(left, right, strict=True)
        return self._measure([difference(self._deciding(one), self._deciding(other)) for one, other in pairs])

    def _magnitude(self, tensors: Streams) -> Tensor:
        """Of the deciding rows of every stream, in one vector."""
        return self._measure([widened(self._deciding(tensor)) for tensor in tensors])

    def _measure(self, values: Streams) -> Tensor:
        """What the statistic says of every stream, in one vector."""
        found: list[Any] = [self._statistic(value) for value in values]
        if wrong := [magnitude for magnitude in found if not isinstance(magnitude, Tensor)]:
            raise ValueError(f"`statistic` must return a tensor; got {_layout(wrong[0])}.")
        return found[0].reshape(-1) if len(found) == 1 else torch.cat([magnitude.reshape(-1) for magnitude in found])

    def _deciding(self, tensor: Tensor) -> Tensor:
        """The rows of the branch that decides."""
        if self.num_branches == 1 or tensor.shape[0] % self.num_branches:
            return tensor
        return tensor.chunk(self.num_branches)[self.deciding_branch]


def _same_layout(left: Streams, right: Streams) -> bool:
    """Whether the streams have the same shapes, types and devices."""

    def layouts(streams: Streams) -> list[Any]:
        return [(tensor.shape, tensor.dtype, tensor.device) for tensor in streams]

    return layouts(left) == layouts(right)


def _layout(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"shape {tuple(value.shape)} and type {value.dtype} on {value.device}"


def _refusal(predicted_change: float, error: float, threshold: float) -> Reason:
    if not math.isfinite(predicted_change):
        return "not_finite"
    return "no_change" if predicted_change == 0 or error < threshold * (1 - ROUNDING) else "above_threshold"

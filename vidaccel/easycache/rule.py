"""EasyCache: reuse the last transformation of the latents while it is predicted to change little.

Method: "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching", arXiv 2507.02860,
equations 2 to 6. Where paper and official code differ the default is the code's choice. Symbols: x_t latents given to
the model, v_t its output, k_t `transformation_rate`, epsilon_t `predicted_change`, E_t `accumulated_error`, tau
`threshold`, R `warmup_steps`. Tensors and plain Python only: nothing here knows a model, a pipeline or diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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


class EasyCacheController:
    """Decisions and memory of one model during one generation.

    The deciding branch (conditional pass) goes first in every step: `decide`, then `record` if the decision says
    computed, else `predict`. Further branches of the step follow with `can_follow`, then `predict` or `record`.
    Tensors passed in are never kept or changed, and tensors handed out are never kept: memory holds copies, namely
    the previous input, and input and output of the last evaluation (their difference is the transformation vector),
    and of the one before for predictors that take it.
    """

    def __init__(self, config: EasyCacheConfig, *, num_branches: int = 1, deciding_branch: int = 0) -> None:
        """Where guidance is batched, the batch is `num_branches` blocks of equal size, one of which decides.

        A batch that cannot be divided so is measured as a whole.
        """
        self.config = config
        self.num_branches, self.deciding_branch = num_branches, deciding_branch
        self._predict = find_predictor(config.predictor)
        self._takes_earlier = takes_earlier_evaluation(self._predict)
        self._statistic = find_statistic(config.statistic)
        self.reset()

    def reset(self) -> None:
        """Forget the generation and release its tensors."""
        self.previous_latents: Tensor | None = None
        self.transformation_rate: Tensor | None = None
        self.leader: str | None = None
        self._evaluations: dict[str, Evaluation] = {}
        self._earlier: dict[str, Evaluation] = {}
        self._previous_output: Tensor | None = None
        self._output_size: Tensor | None = None
        self._error: Tensor | float = 0.0
        self._estimated_error: Tensor | None = None
        self._num_consecutive_reuses = 0
        self._step_index = -1

    def tensors(self) -> list[Tensor]:
        """The distinct latent-sized tensors held at the moment."""
        held = [self.previous_latents, self._previous_output]
        for evaluation in (*self._evaluations.values(), *self._earlier.values()):
            held += evaluation.tensors()
        return list({id(tensor): tensor for tensor in held if tensor is not None}.values())

    def must_compute(self, latents: Tensor, *, step_index: int, num_steps: int | None) -> Reason | None:
        """Why the step may not be reused whatever its statistics are, or None. Reads no tensor values."""
        config = self.config
        if step_index < config.warmup_steps:
            return "warmup"
        if num_steps is not None and step_index >= num_steps - config.tail_steps:
            return "tail"
        if self.previous_latents is not None and not _same_layout(latents, self.previous_latents):
            return "input_changed"
        if self.transformation_rate is None or self.leader is None:
            return "no_history"
        limit = config.max_consecutive_reuses
        if limit is not None and self._num_consecutive_reuses >= limit:
            return "max_consecutive_reuses"
        return None

    def estimate(self, latents: Tensor) -> Tensor:
        """Predicted change, accumulated error and whether reuse is allowed (0 or 1), shape (3,), on the device.

        Call it only where `must_compute` gave None. The values take effect when they are passed to `decide`.
        """
        assert self.previous_latents is not None
        assert self.transformation_rate is not None
        assert self._output_size is not None
        change = self._measure(latents, self.previous_latents)
        predicted = self.transformation_rate * change / self._output_size
        self._estimated_error = self._error + predicted
        allowed = (self._estimated_error < self.config.threshold) & (change > 0)  # false for NaN and infinity
        return torch.stack([predicted.max(), self._estimated_error.max(), allowed.all().to(predicted.dtype)])

    def decide(
        self,
        latents: Tensor,
        *,
        step_index: int,
        num_steps: int | None = None,
        estimate: Sequence[float] | None = None,
        forced: Reason | None = None,
    ) -> StepDecision:
        """Equation 6 for the deciding branch: compute or reuse this step.

        latents: what the model is given, shaped like its output.
        num_steps: steps of the generation; None if unknown, then there is no forced tail.
        estimate: the numbers of `estimate(latents)` if the caller has already read them; otherwise they are read here,
            the one read of device memory in a step.
        forced: a reason to compute that lies outside of this controller.
        """
        self._step_index = step_index
        reason = forced or self.must_compute(latents, step_index=step_index, num_steps=num_steps)
        if self.previous_latents is not None and not _same_layout(latents, self.previous_latents):
            self.reset()
            self._step_index = step_index
        if reason is not None:
            return StepDecision(step_index=step_index, computed=True, reason=reason)
        if estimate is None:
            estimate = self.estimate(latents).tolist()
        predicted, error, allowed = estimate
        reason = "below_threshold" if allowed else _refusal(predicted, error, self.config.threshold)
        if allowed:
            assert self._estimated_error is not None
            self._error = self._estimated_error
            self._num_consecutive_reuses += 1
        return StepDecision(
            step_index=step_index,
            computed=not allowed,
            reason=reason,
            predicted_change=predicted,
            accumulated_error=error,
        )

    def can_follow(self, branch: str, latents: Tensor) -> bool:
        """Whether a further branch may be predicted in a reused step: its vector is not older than the leader's."""
        last = self._evaluations.get(branch)
        leader = self._evaluations.get(self.leader or "")
        if last is None or leader is None:
            return False
        return last.step_index >= leader.step_index and _same_layout(latents, last.latents)

    def predict(self, branch: str, latents: Tensor) -> Tensor:
        """The output of a reused pass (equation 3 by default): a new tensor, shaped like the last output."""
        last = self._evaluations[branch]
        extra = (self._earlier.get(branch),) if self._takes_earlier else ()
        output = self._predict(latents, last, *extra)
        if not isinstance(output, Tensor) or not _same_layout(output, last.output):
            raise ValueError(
                f"`predictor` must return a tensor of shape {tuple(last.output.shape)} and type {last.output.dtype} on "
                f"{last.output.device}, like the last output; got {_layout(output)}."
            )
        if branch == self.leader:
            if self.config.denominator == "previous":
                self._output_size = self._magnitude(self._conditional(widened(output)))
            if self.config.rate_reference == "previous":
                self._previous_output = output.clone()
            self.previous_latents = latents.clone()
        return output

    def record(self, branch: str, latents: Tensor, output: Tensor, *, same_latents: bool = False) -> None:
        """Remember a computed pass. The first branch recorded after a reset is the deciding one.

        same_latents: the latents are known to equal those of the deciding branch in this step, so that one copy serves.
        """
        if self.leader is None:
            self.leader = branch
        if branch == self.leader:
            self._record_leader(latents, output.clone())
            return
        leader = self._evaluations[self.leader]
        shared = same_latents and leader.step_index == self._step_index
        kept = leader.latents if shared else latents.clone()
        self._keep(branch, Evaluation(step_index=self._step_index, latents=kept, output=output.clone()))

    def _record_leader(self, latents: Tensor, output: Tensor) -> None:
        kept = latents.clone()
        self._update_rate(kept, output)
        self._output_size = self._magnitude(self._conditional(widened(output)))
        self._keep(self.leader or "", Evaluation(step_index=self._step_index, latents=kept, output=output))
        self.previous_latents = kept
        self._previous_output = output if self.config.rate_reference == "previous" else None
        self._error = 0.0
        self._num_consecutive_reuses = 0

    def _keep(self, branch: str, evaluation: Evaluation) -> None:
        if self._takes_earlier and branch in self._evaluations:
            self._earlier[branch] = self._evaluations[branch]
        self._evaluations[branch] = evaluation

    def _update_rate(self, latents: Tensor, output: Tensor) -> None:
        last = self._evaluations.get(self.leader or "")
        if last is None:
            return
        earlier_latents, earlier_output = last.latents, last.output
        if self.config.rate_reference == "previous":
            assert self.previous_latents is not None
            assert self._previous_output is not None
            earlier_latents, earlier_output = self.previous_latents, self._previous_output
        self.transformation_rate = self._measure(output, earlier_output) / self._measure(latents, earlier_latents)

    def _measure(self, left: Tensor, right: Tensor) -> Tensor:
        return self._magnitude(difference(self._conditional(left), self._conditional(right)))

    def _magnitude(self, values: Tensor) -> Tensor:
        magnitude = self._statistic(values)
        if not isinstance(magnitude, Tensor):
            raise ValueError(f"`statistic` must return a tensor; got {_layout(magnitude)}.")
        return magnitude

    def _conditional(self, tensor: Tensor) -> Tensor:
        if self.num_branches == 1 or tensor.shape[0] % self.num_branches:
            return tensor
        return tensor.chunk(self.num_branches)[self.deciding_branch]


def _same_layout(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.device == right.device


def _layout(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"shape {tuple(value.shape)} and type {value.dtype} on {value.device}"


def _refusal(predicted: float, error: float, threshold: float) -> Reason:
    if not math.isfinite(predicted):
        return "not_finite"
    return "no_change" if predicted == 0 or error < threshold * (1 - ROUNDING) else "above_threshold"

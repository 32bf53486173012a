"""The settings of EasyCache (arXiv 2507.02860). Checking them loads no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from vidaccel.catalog.presets import Preset
from vidaccel.easycache.predictors import (
    PREDICTORS,
    STATISTICS,
    Predictor,
    Statistic,
    find_predictor,
    takes_earlier_evaluation,
)
from vidaccel.errors import UserError, check_choice, check_count

Reference = Literal["computed", "previous"]
Decisions = Literal["sample", "batch"]


@dataclass(frozen=True, kw_only=True)
class EasyCacheConfig:
    """When EasyCache may reuse a step, and what a reused step returns.

    threshold: tolerated accumulated relative change (tau); 0 never reuses, infinity reuses all it may.
    warmup_steps: first steps that are always computed (R).
    tail_steps: last steps that are always computed; needs the number of steps to be known.
    max_consecutive_reuses: compute after this many reuses in a row; None for no limit.
    predictor: what a reused step returns: "transformation" (x + last vector, equation 3), "output" (last output held),
        "extrapolation" (line through the last two outputs), or a function (`vidaccel.easycache.predictors.Predictor`).
    statistic: how a change is measured: "mean" (over everything) or a function `tensor -> (G,) magnitudes`, see
        `vidaccel.easycache.predictors.Statistic`.
    denominator: epsilon_t is relative to the last "computed" output (official code) or to the "previous" output, which
        a reuse may have predicted (paper, equation 4).
    rate_reference: k_t spans the last two "computed" steps (official code) or the "previous" step and this one (paper,
        equation 2).
    decisions: what decides for itself: every "sample" of a batch, so that its video does not depend on the others (the
        model then runs for the samples that need it), or the whole "batch" at once (official code).
    num_inference_steps: steps of a call, for callers of a bare transformer whose pipeline does not say it; else None.

    Raises `UserError`, a ValueError, for a value outside these choices.
    """

    threshold: float = 0.05
    warmup_steps: int = 10
    tail_steps: int = 1
    max_consecutive_reuses: int | None = None
    predictor: str | Predictor = "transformation"
    statistic: str | Statistic = "mean"
    denominator: Reference = "computed"
    rate_reference: Reference = "computed"
    decisions: Decisions = "sample"
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, int | float) or isinstance(self.threshold, bool) or not self.threshold >= 0:
            raise UserError(
                f"`threshold` must be a number of at least 0 (0 never reuses); got {self.threshold!r}. "
                "Values around 0.05 are usual."
            )
        check_count("warmup_steps", self.warmup_steps, minimum=0)
        check_count("tail_steps", self.tail_steps, minimum=0)
        check_count("max_consecutive_reuses", self.max_consecutive_reuses, minimum=1, optional=True)
        check_count("num_inference_steps", self.num_inference_steps, minimum=1, optional=True)
        check_choice("predictor", self.predictor, tuple(PREDICTORS), function_allowed=True)
        takes_earlier_evaluation(find_predictor(self.predictor))
        check_choice("statistic", self.statistic, tuple(STATISTICS), function_allowed=True)
        check_choice("denominator", self.denominator, ("computed", "previous"))
        check_choice("rate_reference", self.rate_reference, ("computed", "previous"))
        check_choice("decisions", self.decisions, ("sample", "batch"))

    @classmethod
    def published(cls, preset: Preset | None) -> EasyCacheConfig:
        """The published settings of a row of `vidaccel.catalog.presets`; the defaults where there is none."""
        return cls() if preset is None else cls(threshold=preset.threshold, warmup_steps=preset.warmup_steps)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; functions appear by their name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: getattr(value, "__name__", str(value)) if callable(value) else value for name, value in values.items()
        }

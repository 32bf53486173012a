"""What EasyCache did in one call of a pipeline: a record for every step, totals, and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

Reason = Literal[
    "warmup",
    "tail",
    "transformer_switch",
    "adapter_switch",
    "condition_changed",
    "no_history",
    "input_changed",
    "scheduled",
    "max_consecutive_reuses",
    "not_finite",
    "no_change",
    "above_threshold",
    "below_threshold",
]
"""Why a step was computed, or ("below_threshold") reused.

warmup, tail: first and last steps, always computed. transformer_switch: first step of another expert. adapter_switch:
LoRA adapters were switched, weighted or merged since the step before. condition_changed: a prompt, image, control or
other input beside the latents is not what it was at the last evaluation. no_history: fewer than two evaluations under
the same conditions to take a rate from. input_changed: another shape, type or device than the step before. scheduled:
the schedule given beforehand says so. not_finite, no_change: the statistic is NaN or infinite, or the input did not
move. The rest follow from the threshold.
"""


@dataclass(frozen=True, kw_only=True)
class StepDecision:
    """One denoising step.

    step_index: 0-based place of the step in the call.
    computed: the model ran for the deciding (conditional) pass; otherwise its output was predicted.
    reason: why, see `Reason`.
    predicted_change: relative change of the output predicted for this step (epsilon_t, equation 4); None if undecided.
    accumulated_error: sum of these since the last computed step (E_t, equation 5), this step included; None likewise.
    transformation_rate: change of the output per change of the input (k_t, equation 2) in force after the step; for a
        computed step it is only known when the call has finished, until then None.
    transformer: the pipeline's name of the transformer that had this step.
    section: 0-based loop of a call that has several, one after the other (FramePack, long videos).
    samples: for every sample of a batch that decides for itself, whether the model ran for it; empty otherwise. Such a
        step is `computed` if it ran for any, its reason is that of the first of them, its numbers are the largest.
    num_passes, num_computed_passes: passes of this step (two with sequential guidance) and how many the model ran for.
        While a call is under way they count only the deciding pass.
    seconds: time spent in the model; 0 for a reused step, None if not measured (yet).
    """

    step_index: int
    computed: bool
    reason: Reason
    predicted_change: float | None = None
    accumulated_error: float | None = None
    transformation_rate: float | None = None
    transformer: str = "transformer"
    section: int = 0
    samples: tuple[bool, ...] = ()
    num_passes: int = 1
    num_computed_passes: int = 0
    seconds: float | None = None

    @property
    def computed_share(self) -> float:
        """Share of the samples that the model ran for, from 0 to 1."""
        return sum(self.samples) / len(self.samples) if self.samples else float(self.computed)

    @classmethod
    def of_samples(cls, decisions: Sequence[StepDecision]) -> StepDecision:
        """One step of a batch from the decisions of its samples: the first that computes gives the reason."""
        if len(decisions) == 1:
            return decisions[0]
        computed = [decision for decision in decisions if decision.computed]
        telling = [decision for decision in computed if decision.reason != "no_change"]
        return replace(
            (telling or computed or decisions)[0],
            predicted_change=_largest([decision.predicted_change for decision in decisions]),
            accumulated_error=_largest([decision.accumulated_error for decision in decisions]),
            samples=tuple(decision.computed for decision in decisions),
        )


@dataclass(frozen=True, kw_only=True)
class EasyCacheReport:
    """All steps of one finished call, both experts of a two-expert model included.

    decisions: one record per step, in order.
    config: the settings of the run as a plain dictionary.
    """

    decisions: tuple[StepDecision, ...]
    config: Mapping[str, Any]

    @property
    def num_steps(self) -> int:
        return len(self.decisions)

    @property
    def num_computed(self) -> int:
        """Steps whose deciding pass was computed."""
        return sum(decision.computed for decision in self.decisions)

    @property
    def num_reused(self) -> int:
        return self.num_steps - self.num_computed

    @property
    def num_passes(self) -> int:
        """Passes the pipeline asked for: what it would have computed without reuse."""
        return sum(decision.num_passes for decision in self.decisions)

    @property
    def num_computed_passes(self) -> int:
        """Passes the transformer really ran for."""
        return sum(decision.num_computed_passes for decision in self.decisions)

    @property
    def seconds_saved(self) -> float | None:
        """Model time of the reused steps had they taken as long as a median computed one; None if not measured.

        A step that was reused for some samples of the batch counts as reused here, with the time it took.
        """
        timed = [decision.seconds for decision in self.decisions if decision.computed_share == 1]
        spent = [decision.seconds for decision in self.decisions if decision.computed_share < 1]
        if not timed or any(seconds is None for seconds in timed + spent):
            return None
        return median(_numbers(timed)) * len(spent) - sum(_numbers(spent))

    def to_dict(self) -> dict[str, Any]:
        """Totals, settings and decisions as plain values for strict JSON; infinity and NaN are strings."""
        return {
            "num_steps": self.num_steps,
            "num_computed": self.num_computed,
            "num_reused": self.num_reused,
            "num_passes": self.num_passes,
            "num_computed_passes": self.num_computed_passes,
            "seconds_saved": self.seconds_saved,
            "config": _plain(self.config),
            "decisions": [_plain(asdict(decision)) for decision in self.decisions],
        }

    def save_picture(self, path: str | Path) -> Path:
        """Draw decisions with the accumulated error, the transformation rate and the time per step; the path written.

        The ending chooses the format (.png, .svg, .pdf). Raises ValueError when there is no step to draw.
        """
        if not self.decisions:
            raise ValueError("The report has no steps to draw; run the pipeline first.")
        from matplotlib.figure import Figure

        path = Path(path)
        figure = Figure(figsize=(9.0, 7.5), layout="constrained")
        error, rate, time = figure.subplots(3, 1, sharex=True)
        self._draw_error(error)
        self._draw_rate(rate)
        self._draw_time(time)
        places = range(1, self.num_steps)
        sections = [place for place in places if self.decisions[place].section != self.decisions[place - 1].section]
        for place in sections:
            for axes in (error, rate, time):
                axes.axvline(place - 0.5, color="#808080", linewidth=1, linestyle="--")
        time.set_xlabel(f"denoising step, {len(sections) + 1} sections" if sections else "denoising step")
        time.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path, dpi=150)
        return path

    def _draw_error(self, axes: Any) -> None:
        for place, step in enumerate(self.decisions):
            if step.computed:
                axes.axvspan(place - 0.5, place + 0.5, ymax=step.computed_share, color="#d9e4f2", linewidth=0)
        for computed, marker, label in ((True, "s", "computed"), (False, "o", "reused")):
            points = self._points("accumulated_error", computed=computed)
            axes.plot(*points, marker, label=label, markersize=4)
        axes.axhline(self.config["threshold"], color="#b03030", linewidth=1, label="threshold")
        axes.set_ylabel("accumulated error")
        axes.set_ylim(bottom=0)
        shading = "shaded up to the share of samples" if any(step.samples for step in self.decisions) else "shaded"
        axes.set_title(f"{self.num_computed} of {self.num_steps} steps computed ({shading}), {self.num_reused} reused")
        axes.legend(loc="upper left", fontsize="small")

    def _draw_time(self, axes: Any) -> None:
        saved = self.seconds_saved
        axes.bar(*self._points("seconds"), color="#5b7fb0")
        axes.set_ylabel("model time [s]")
        axes.set_title("time not measured" if saved is None else f"{saved:.2f} s of model time saved")

    def _draw_rate(self, axes: Any) -> None:
        for name in dict.fromkeys(step.transformer for step in self.decisions):
            points = self._points("transformation_rate", transformer=name)
            axes.plot(*points, ".-", label=name)
        axes.set_ylabel("transformation rate")
        axes.legend(loc="best", fontsize="small")

    def _points(self, field: str, **wanted: Any) -> tuple[list[int], list[float]]:
        """Places in the call, all sections one after the other, and values of the wanted steps that have one."""
        known = {
            place: getattr(step, field)
            for place, step in enumerate(self.decisions)
            if getattr(step, field) is not None and all(getattr(step, name) == wanted[name] for name in wanted)
        }
        return list(known), list(known.values())


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as strict JSON holds them, which knows neither infinity nor NaN."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _largest(values: list[float | None]) -> float | None:
    return max(_numbers(values), default=None)


def _numbers(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]

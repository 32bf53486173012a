"""What EasyCache says when its settings and a call do not fit each other."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any

from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.report import EasyCacheReport

logger = logging.getLogger(__name__)


def has_few_steps(config: EasyCacheConfig, num_steps: int | None) -> bool:
    """Whether next to all steps of a call are computed whatever their statistics are."""
    kept = config.warmup_steps + config.tail_steps
    return config.threshold > 0 and num_steps is not None and num_steps <= kept + 1


def about_a_call(
    config: EasyCacheConfig, *, num_steps: int | None, schedule: Collection[int] | None, scheduler: Any
) -> None:
    """Say at the beginning of a call of so many steps (None: unknown) what will go wrong; `scheduler` drives it."""
    if has_few_steps(config, num_steps):
        logger.warning(
            "EasyCache has next to nothing to reuse: of %d steps the first %d and the last %d are always computed. "
            "Use more steps or a smaller `warmup_steps`.",
            num_steps,
            config.warmup_steps,
            config.tail_steps,
        )
    if num_steps is not None and (late := sorted(step for step in schedule or () if step >= num_steps)):
        logger.warning("EasyCache's `schedule` names the steps %s, but the call has %d, from 0.", late, num_steps)
    if num_steps is None and config.tail_steps:
        logger.warning(
            "EasyCache does not know the number of steps, so the last step may be reused. Apply it to the pipeline "
            "instead of the transformer, or set `num_inference_steps` in EasyCacheConfig."
        )
    if (noise := _fresh_noise(scheduler)) is not None:
        logger.warning(
            "EasyCache will reuse little or nothing: %s adds fresh noise in every step, which hides how little the "
            "latents change. Use a deterministic scheduler.",
            noise,
        )


def about_rising_timesteps() -> None:
    """Say that a loop whose timesteps rise cannot be followed by its timesteps."""
    logger.warning(
        "EasyCache took a timestep that rose after one step for the start of another generation. If your timesteps "
        "rise, nothing is reused: apply EasyCache to a pipeline, or give `step_index` to `cache_context`."
    )


def about_another_loop(pipe: Any) -> None:
    """Say that a call seems to have a second loop of steps, which its class is not known to have."""
    logger.warning(
        "EasyCache took a second loop of %s for another call. If one call goes through its steps several times, set "
        "`has_several_loops = True` on the pipeline or its class; the report then has the steps of all loops.",
        type(pipe).__name__,
    )


def why_no_report(num_seen: int, num_steps: int | None) -> str:
    """What is missing for a report, after so many steps of a call that was said to have `num_steps` (None: unknown)."""
    if not num_seen:
        return "no call has finished since apply_easycache. Run the pipeline"
    if num_steps is not None and num_seen <= num_steps:
        return (
            f"{num_seen} of {num_steps} steps of a call have run, and nothing has said that it is over. If it is, and "
            "went as it should, call finish() on what apply_easycache returned; if it has fewer steps, correct "
            "`num_inference_steps` in EasyCacheConfig"
        )
    known = (
        "nothing says how many a call has or when it ends" if num_steps is None else f"a call should have {num_steps}"
    )
    return (
        f"{num_seen} steps have run, and {known}. Set `num_inference_steps` in EasyCacheConfig (to {num_seen}, if that "
        "was one call), apply EasyCache to the pipeline instead of the transformer, or call finish() on what "
        "apply_easycache returned"
    )


def about_no_reuse(report: EasyCacheReport, config: EasyCacheConfig) -> None:
    """Say at the end of a call that nothing was reused, and why, where that was not clear from the beginning."""
    if report.num_reused or config.threshold == 0 or has_few_steps(config, report.num_steps):
        return
    known = [step.accumulated_error for step in report.decisions if step.accumulated_error is not None]
    errors = [error for error in known if math.isfinite(error)]
    logger.warning(
        "EasyCache reused none of %d steps at threshold %g (reasons: %s%s).",
        report.num_steps,
        config.threshold,
        ", ".join(dict.fromkeys(step.reason for step in report.decisions)),
        f"; the smallest accumulated error was {min(errors):.4g}" if errors else "",
    )


def _fresh_noise(scheduler: Any) -> str | None:
    """The name of a scheduler that adds noise in every step, else None."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    noisy_name = any(word in name for word in ("Ancestral", "SDE", "LCM", "SASolver"))
    noisy_setting = bool(config.get("stochastic_sampling")) or str(config.get("algorithm_type", "")).startswith("sde")
    return name if noisy_name or noisy_setting else None

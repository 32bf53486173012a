"""What is compared in the EasyCache benchmark: EasyCache at several thresholds, and the baselines it has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vidaccel.easycache import EasyCacheConfig

PREDICTOR_NAMES = {"transformation": "transformation reused", "output": "output held"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to make the same video.

    family: methods that differ in `parameter` only; they form one curve.
    num_inference_steps: None for the protocol's own number.
    only_first: run for the first prompt only; the plain run once more, which shows that the twin repeats exactly.
    """

    name: str
    family: str
    parameter: float
    easycache: EasyCacheConfig | None = None
    num_inference_steps: int | None = None
    only_first: bool = False


def plain_again() -> Method:
    """The plain run a second time: the fidelity that the machine itself allows."""
    return Method(name="plain, second run", family="repeat", parameter=0, only_first=True)


def easycache_methods(predictor: str, thresholds: Sequence[float], *, warmup_steps: int) -> list[Method]:
    """EasyCache with one reuse rule at several thresholds; all other settings are the defaults."""
    family = f"EasyCache, {PREDICTOR_NAMES[predictor]}"
    return [
        Method(
            name=f"{family}, threshold {threshold:g}",
            family=family,
            parameter=threshold,
            easycache=EasyCacheConfig(threshold=threshold, warmup_steps=warmup_steps, predictor=predictor),
        )
        for threshold in thresholds
    ]


def uniform_methods(predictor: str, intervals: Sequence[int], *, warmup_steps: int) -> list[Method]:
    """Compute every k-th step after the same warm-up and reuse the rest, whatever the predicted change says."""
    family = f"every k-th step, {PREDICTOR_NAMES[predictor]}"
    return [
        Method(
            name=f"{family}, k = {interval}",
            family=family,
            parameter=interval,
            easycache=EasyCacheConfig(
                threshold=math.inf,
                warmup_steps=warmup_steps,
                max_consecutive_reuses=interval - 1,
                predictor=predictor,
            ),
        )
        for interval in intervals
    ]


def fewer_steps_methods(counts: Sequence[int]) -> list[Method]:
    """The plain pipeline with fewer steps, no reuse."""
    return [
        Method(name=f"fewer steps, {count}", family="fewer steps", parameter=count, num_inference_steps=count)
        for count in counts
    ]

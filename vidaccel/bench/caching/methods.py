"""What the benchmarks compare: EasyCache at several thresholds, the baselines it has to beat, diffusers' own caches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vidaccel.bench.caching import builtin_caches
from vidaccel.bench.caching.builtin_caches import CacheBuilder
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.predictors import PREDICTORS

_CacheFamily = tuple[str, str, tuple[float, ...], Callable[[Any], CacheBuilder]]  # name, knob, its values, builder

PREDICTOR_NAMES = {
    "transformation": "transformation reused",
    "output": "output held",
    "extrapolation": "extrapolated",
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to make the same video.

    family: methods that differ in `parameter` only; they form one curve.
    num_inference_steps: None for the protocol's own number.
    only_first: run for the first prompt only; the plain run once more, which shows that the twin repeats exactly.
    cache: a cache of diffusers instead of EasyCache; `calibrated` if it needs MagCache's ratios.
    as_many_as: the method that this one computes as many steps as, on the same video, but chosen at random.
    predictor: what a reused step of a random choice returns.
    """

    name: str
    family: str
    parameter: float
    easycache: EasyCacheConfig | None = None
    num_inference_steps: int | None = None
    only_first: bool = False
    cache: CacheBuilder | None = None
    calibrated: bool = False
    as_many_as: str | None = None
    predictor: str = "transformation"


def words_of(predictor: str) -> str:
    """How tables name a predictor: by its name where there are no words for it."""
    return PREDICTOR_NAMES.get(predictor, predictor)


def plain_again() -> Method:
    """The plain run a second time: the fidelity that the machine itself allows."""
    return Method(name="plain, second run", family="repeat", parameter=0, only_first=True)


def easycache_methods(predictor: str, thresholds: Sequence[float], *, warmup_steps: int) -> list[Method]:
    """EasyCache with one reuse rule at several thresholds; all other settings are the defaults."""
    family = f"EasyCache, {words_of(predictor)}"
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
    family = f"every k-th step, {words_of(predictor)}"
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


def random_methods(predictor: str, thresholds: Sequence[float]) -> list[Method]:
    """For each EasyCache of `easycache_methods` as many computed steps as it has, after the same warm-up, at random."""
    family = f"random steps, {words_of(predictor)}"
    return [
        Method(
            name=f"{family}, as many as at threshold {threshold:g}",
            family=family,
            parameter=threshold,
            as_many_as=f"EasyCache, {words_of(predictor)}, threshold {threshold:g}",
            predictor=predictor,
        )
        for threshold in thresholds
    ]


def known_predictors() -> tuple[str, ...]:
    """The reuse rules that this version of EasyCache has, in the order of the tables."""
    return tuple(PREDICTORS)


BUILTIN_NOTES = {
    "FirstBlockCache": "Defaults; the first block always runs, and there is no warm-up. Each branch decides alone.",
    "MagCache": "Default cap of 3 reuses in a row. Ratios by its own calibration on a prompt outside the test set, one "
    "per step; diffusers takes one list for both branches, so it is their mean.",
    "MagCache, longer reuse": "The same with at most 8 reuses in a row: the default ends at 2.5x.",
    "TaylorSeer, lite mode": "Factors in the model's number format, where the default is bfloat16; order 1 and 3 "
    "warm-up steps, as it comes.",
    "TaylorSeer, lite mode, longer warm-up": "The same with EasyCache's warm-up.",
    "TaylorSeer, attention and feed-forward": "As lite mode, for every attn1, attn2 and ffn, by patterns that match.",
    "TaylorSeer, attention": "The same for every attn1 and attn2, which is what its default patterns mean.",
    "TaylorSeer, default patterns": "As it comes; the patterns want modules named `attn`, Wan's are attn1 and attn2.",
    "PyramidAttentionBroadcast": "Self- and cross-attention. It keeps one state for both branches, which are called in "
    "turn, so that they are handed each other's attention.",
    "FasterCache": "It expects both guidance branches in one batch; WanPipeline calls them one after the other.",
    "SeaCache": "Defaults: order 1, at most 2 reuses in a row. WanPipeline gives the step and sigma it asks for.",
    "SeaCache, longer reuse": "The same with at most 4 reuses in a row: the default ends before 3x.",
}


def builtin_methods(*, warmup_steps: int) -> list[Method]:
    """The caches of diffusers 0.42, each over its own knob; what is not its default is said in `BUILTIN_NOTES`.

    Where defaults end short of 3x or were worse on prompts outside the test set, a second family goes on from there.
    """
    return [
        Method(
            name=f"{family}, {knob} {value:g}",
            family=family,
            parameter=value,
            cache=build(value),
            calibrated=family.startswith("MagCache"),
        )
        for family, knob, values, build in _builtin_families(warmup_steps)
        for value in values
    ]


def _builtin_families(warmup_steps: int) -> list[_CacheFamily]:
    caches = builtin_caches
    threshold, interval = "threshold", "interval"
    all_parts, attention = (
        (rf"blocks\.\d+\.({parts})",) for parts in ("attn1|attn2|ffn", "attn1|attn2")
    )  # Wan's names
    return [
        ("FirstBlockCache", threshold, (0.03, 0.05, 0.1, 0.2), caches.first_block),
        ("MagCache", threshold, (0.03, 0.06, 0.1, 0.3), lambda value: caches.mag_cache(value, max_skip_steps=3)),
        ("MagCache, longer reuse", threshold, (0.1, 0.2, 0.4), lambda value: caches.mag_cache(value, max_skip_steps=8)),
        ("TaylorSeer, lite mode", interval, (2, 3, 4), lambda value: caches.taylorseer(value, warmup_steps=3)),
        (
            "TaylorSeer, lite mode, longer warm-up",
            interval,
            (2, 3, 4, 6),
            lambda value: caches.taylorseer(value, warmup_steps=warmup_steps),
        ),
        (
            "TaylorSeer, attention and feed-forward",
            interval,
            (2, 3, 4),
            lambda value: caches.taylorseer(value, parts=all_parts, warmup_steps=3),
        ),
        (
            "TaylorSeer, attention",
            interval,
            (2, 3, 5),
            lambda value: caches.taylorseer(value, parts=attention, warmup_steps=3),
        ),
        ("TaylorSeer, default patterns", interval, (5,), caches.taylorseer_by_default),
        (
            "PyramidAttentionBroadcast",
            interval,
            (2, 3, 6),
            lambda value: caches.pyramid_attention(value, timesteps=(100, 800)),
        ),
        ("FasterCache", interval, (2,), caches.faster_cache),
        (
            "SeaCache",
            threshold,
            (0.05, 0.1, 0.2, 0.4, 0.6),
            lambda value: caches.sea_cache(value, max_consecutive_cached=2),
        ),
        (
            "SeaCache, longer reuse",
            threshold,
            (0.2, 0.3, 0.4),
            lambda value: caches.sea_cache(value, max_consecutive_cached=4),
        ),
    ]

"""Seeded runs of every family for the test matrix: pipelines are built once, EasyCache comes and goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vidaccel import EasyCacheConfig, EasyCacheReport, apply_easycache, easycache_report, remove_easycache
from vidaccel.families.calls import call_inputs, taken_arguments
from vidaccel.families.random_weights import build_random
from vidaccel.families.table import FAMILIES

NUM_STEPS = 10
WARMUP = 3
NAMES = [family.name for family in FAMILIES if family.refusal is None]
EVERY_THIRD = EasyCacheConfig(threshold=float("inf"), warmup_steps=WARMUP, max_consecutive_reuses=2)


class InterruptionError(Exception):
    pass


def build(name: str) -> Any:
    """A pipeline of its own."""
    pipe = build_random(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def plain_pipe(name: str) -> Any:
    """The pipeline that the tests of one family share; a test leaves it without EasyCache."""
    return build(name)


@contextmanager
def easycached(name: str, config: EasyCacheConfig | None = None, **options: Any) -> Iterator[Any]:
    """The shared pipeline with EasyCache, as new."""
    pipe = plain_pipe(name)
    apply_easycache(pipe, config or mixed(name), **options)
    try:
        yield pipe
    finally:
        remove_easycache(pipe)


def arguments(name: str, **changes: Any) -> dict[str, Any]:
    """Of one call: few steps, latents out where the pipeline gives them."""
    settings = {"num_inference_steps": NUM_STEPS, "output_type": "latent"} | changes
    return {key: value for key, value in call_inputs(name, **settings).items() if takes(name, key) or key == "output"}


def run(name: str, pipe: Any, **changes: Any) -> list[Tensor]:
    """What a seeded call returns, as tensors."""
    return tensors(pipe(**arguments(name, **changes)))


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a pipeline's output: videos, and sound where there is some."""
    if isinstance(output, Tensor):
        return [output]
    if hasattr(output, "shape"):
        return [torch.as_tensor(output)]
    values = output.values() if hasattr(output, "values") else output
    return [tensor for value in values if value is not None for tensor in tensors(value)]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@cache
def plain(name: str, **changes: Any) -> list[Tensor]:
    """Without EasyCache; not to be changed."""
    return run(name, plain_pipe(name), **changes)


@cache
def fresh(name: str, **changes: Any) -> list[Tensor]:
    """What EasyCache just applied gives; not to be changed."""
    with easycached(name) as pipe:
        return run(name, pipe, **changes)


@cache
def mixed(name: str) -> EasyCacheConfig:
    """A threshold at which the random model computes some steps after the warm-up and reuses others."""
    with easycached(name, EVERY_THIRD) as pipe:
        run(name, pipe)
        changes = [step.predicted_change for step in easycache_report(pipe).decisions]
    known = [change for change in changes if change is not None]
    return EasyCacheConfig(threshold=2.5 * median(known), warmup_steps=WARMUP)


def report(pipe: Any) -> EasyCacheReport:
    return easycache_report(pipe)


def pattern(pipe: Any) -> str:
    return "".join("C" if decision.computed else "." for decision in easycache_report(pipe).decisions)


def takes(name: str, argument: str) -> bool:
    """Whether the pipeline's call has an argument."""
    return argument in taken_arguments(type(plain_pipe(name)))


def transformers(pipe: Any) -> list[Any]:
    found = [getattr(pipe, part, None) for part in ("transformer", "transformer_2")]
    return [model for model in found if model is not None]


def first_layer(model: Any) -> Any:
    """The first child with weights: it runs in every forward."""
    return next(child for child in model.children() if any(True for _ in child.parameters()))


@contextmanager
def counted_forwards(pipe: Any) -> Iterator[list[int]]:
    """One entry for every transformer forward that really runs."""
    calls: list[int] = []
    handles = [first_layer(model).register_forward_pre_hook(lambda *_: calls.append(1)) for model in transformers(pipe)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()

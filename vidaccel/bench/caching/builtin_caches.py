"""The caches that diffusers itself has, put on a pipeline for one call, and each at its fairest for the Wan family.

Every one of them keeps its defaults but for its own knob and for what its module names as a repair. A cache that
raises, or that registers no hook and so does nothing, is reported and not passed over.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import SeaCacheConfig
from torch import nn

from vidaccel.easycache.apply import find_transformers
from vidaccel.generation.generate import generate
from vidaccel.generation.request import GenerationRequest
from vidaccel.machine.private_names import hook_registry

FAILURES = (ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError)
"""What the caches raise where a model does not suit them."""


class NoHookRegistered(RuntimeError):  # noqa: N818 (a finding about a cache, reported in the table)
    """A cache was enabled without an error and without any effect."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a cache has to know of the run: its steps, and MagCache's calibrated ratios, one per step."""

    num_inference_steps: int
    mag_ratios: tuple[float, ...] = ()


CacheBuilder = Callable[[Any, Setting], Any]
"""`(pipe, setting) -> a configuration for enable_cache`."""


def first_block(threshold: float) -> CacheBuilder:
    """FirstBlockCache: each branch decides by the change of its first block's residual."""
    return lambda pipe, setting: FirstBlockCacheConfig(threshold=threshold)


def mag_cache(threshold: float, *, max_skip_steps: int) -> CacheBuilder:
    """MagCache with the ratios of its own calibration, as many as steps."""
    return lambda pipe, setting: MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skip_steps,
        num_inference_steps=setting.num_inference_steps,
        mag_ratios=list(setting.mag_ratios),
    )


def taylorseer(interval: int, *, parts: Sequence[str] | None = None, warmup_steps: int) -> CacheBuilder:
    """TaylorSeer over whole forwards (lite mode), or over the modules that the patterns `parts` match in full.

    Factors are kept in the model's own number format; the default, bfloat16, costs a float32 model its precision.
    """
    return lambda pipe, setting: TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup_steps,
        taylor_factors_dtype=next(iter(find_transformers(pipe).values())).dtype,
        cache_identifiers=None if parts is None else list(parts),
        use_lite_mode=parts is None,
    )


def taylorseer_by_default(interval: int) -> CacheBuilder:
    """TaylorSeer as it comes; its patterns want modules whose names end in `attn`."""
    return lambda pipe, setting: TaylorSeerCacheConfig(cache_interval=interval)


def pyramid_attention(interval: int, *, timesteps: tuple[int, int]) -> CacheBuilder:
    """Pyramid Attention Broadcast on self- and cross-attention, inside a range of timesteps."""
    return lambda pipe, setting: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        cross_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=timesteps,
        cross_attention_timestep_skip_range=timesteps,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster_cache(interval: int) -> CacheBuilder:
    """FasterCache; it expects both guidance branches in one batch."""
    return lambda pipe, setting: FasterCacheConfig(
        spatial_attention_block_skip_range=interval,
        attention_weight_callback=lambda _: 0.5,  # the default, given so that diffusers does not warn
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def sea_cache(threshold: float, *, max_consecutive_cached: int) -> CacheBuilder:
    """SeaCache; it needs the step index and sigma that `WanPipeline` gives, and computes everything without."""
    return lambda pipe, setting: SeaCacheConfig(threshold=threshold, max_consecutive_cached=max_consecutive_cached)


@contextmanager
def enabled_cache(pipe: Any, build: CacheBuilder, setting: Setting) -> Iterator[int]:
    """Have a cache on all transformers of `pipe` inside the block, and no trace of it after; gives its number of hooks.

    Raises NoHookRegistered where diffusers enables it without registering a hook, and what diffusers raises.
    """
    transformers: list[Any] = list(find_transformers(pipe).values())
    before = [_hooks(transformer) for transformer in transformers]
    try:
        for transformer in transformers:
            transformer.enable_cache(build(pipe, setting))
        num_hooks = sum(len(_hooks(one) - known) for one, known in zip(transformers, before, strict=True))
        if not num_hooks:
            raise NoHookRegistered("enabled without an error, but no hook was registered: nothing would be saved")
        yield num_hooks
    finally:
        for transformer, known in zip(transformers, before, strict=True):
            if transformer.is_cache_enabled:
                transformer.disable_cache()
            _remove(transformer, _hooks(transformer) - known)


def calibrate_mag_cache(pipe: Any, request: GenerationRequest) -> tuple[float, ...]:
    """Ratios of MagCache for every step of `request`, by its calibration mode: the mean over the guidance branches.

    diffusers takes one list for all branches, and prints what it measured, which is the only way it gives it out.
    Raises ValueError where it prints no list for this model.
    """
    steps = request.num_inference_steps
    printed = io.StringIO()

    def build(pipe: Any, setting: Setting) -> MagCacheConfig:
        return MagCacheConfig(calibrate=True, num_inference_steps=setting.num_inference_steps)

    with enabled_cache(pipe, build, Setting(num_inference_steps=steps)), contextlib.redirect_stdout(printed):
        generate(pipe, request)
    lists = [json.loads(line) for line in printed.getvalue().splitlines() if line.startswith("[") and line[1:2] != "M"]
    if not lists or any(len(ratios) != steps for ratios in lists):
        raise ValueError(f"MagCache's calibration gave no list of {steps} ratios for this model.")
    return tuple(torch.tensor(lists, dtype=torch.float64).mean(dim=0).tolist())


def _hooks(transformer: nn.Module) -> set[tuple[str, str]]:
    """Names of all hooks of diffusers on the transformer and its parts: (module, hook)."""
    return {
        (name, hook)
        for name, module in transformer.named_modules()
        if (registry := hook_registry(module)) is not None
        for hook in registry.hooks
    }


def _remove(transformer: Any, hooks: set[tuple[str, str]]) -> None:
    """What an enabling that failed half-way left behind."""
    for name, hook in hooks:
        if (registry := hook_registry(transformer.get_submodule(name))) is not None:
            registry.remove_hook(hook, recurse=False)

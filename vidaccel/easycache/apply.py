"""Put EasyCache on a pipeline or transformer, take it off, and read its report."""

from __future__ import annotations

import inspect
import logging
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.utils.torch_utils import is_compiled_module, unwrap_module
from torch import nn

from vidaccel.catalog.presets import Preset
from vidaccel.catalog.table import transformer_traits
from vidaccel.easycache.batch import CONDITIONAL
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.hook import HOOK_NAME, EasyCacheHook
from vidaccel.easycache.report import EasyCacheReport, StepDecision
from vidaccel.easycache.rule import EasyCacheRule
from vidaccel.easycache.run import EasyCacheRun
from vidaccel.machine.private_names import (
    cache_config,
    forward_beneath_accelerate,
    hook_registry,
    is_compiled,
    is_stateful,
    resets_after_call,
    set_forward_beneath_accelerate,
)

logger = logging.getLogger(__name__)

# A schedule given beforehand takes the place of the rule: what may be reused is reused.
_ALWAYS_REUSE: Mapping[str, Any] = MappingProxyType(
    {"threshold": math.inf, "warmup_steps": 0, "tail_steps": 0, "max_consecutive_reuses": None}
)


def apply_easycache(
    pipe_or_transformer: Any,
    config: EasyCacheConfig | None = None,
    *,
    on_step: Callable[[StepDecision], None] | None = None,
    batched_guidance: Sequence[str] | None = None,
    schedule: Collection[int] | None = None,
) -> EasyCacheRun:
    """Reuse steps of a diffusers pipeline, or of a bare transformer, until `remove_easycache`.

    A pipeline is the better choice: it tells the number of steps and where a call begins, and all its transformers
    (two experts) share one report. It works before or after `enable_model_cpu_offload`, group offload and
    `compile_repeated_blocks`.

    config: None for the published settings of the model (`vidaccel.catalog.presets`); where there are none the
        defaults are taken, and that is told.
    on_step: called with every decision when it is taken.
    batched_guidance: if the loop puts several guidance passes into one batch, their names in order, such as
        `("uncond", "cond")`; the slice named "cond" decides. None takes what is known of the pipeline.
    schedule: the steps to compute (counted from 0), in place of the rule: all others are reused as far as two earlier
        evaluations allow it. `[step.step_index for step in report.decisions if step.computed]` replays a report.

    Returns the run, which holds the report. Raises ValueError for settings of other kinds, and where outputs cannot be
    reused safely: another cache or EasyCache itself is active, the model keeps a key/value cache, is sharded by FSDP,
    or is compiled as a whole.
    """
    if config is not None and not isinstance(config, EasyCacheConfig):
        raise ValueError(
            f"`config` must be an EasyCacheConfig or None; got {config!r}. Use EasyCacheConfig(threshold=...)."
        )
    if on_step is not None and not callable(on_step):
        raise ValueError(f"`on_step` must be a function of one StepDecision; got {on_step!r}.")
    steps, passes = _checked_schedule(schedule), _checked_passes(batched_guidance)
    transformers = find_transformers(pipe_or_transformer)
    for name, transformer in transformers.items():
        _refuse_unsafe(name, transformer)
    pipe = None if isinstance(pipe_or_transformer, nn.Module) else pipe_or_transformer
    config = _published_settings(pipe_or_transformer) if config is None else config
    run = EasyCacheRun(
        EasyCacheRule(config if steps is None else replace(config, **_ALWAYS_REUSE)),
        pipe=pipe,
        resets_after_call=_resets_after_call(pipe, transformers.values()),
        batched_guidance=passes,
        schedule=steps,
        on_step=on_step,
    )
    try:
        for name, transformer in transformers.items():
            _install(EasyCacheHook(run, name), transformer)
    except BaseException:  # all or nothing
        for transformer in transformers.values():
            _uninstall(transformer)
        raise
    return run


def remove_easycache(pipe_or_transformer: Any) -> None:
    """Take EasyCache off again; the transformers are as they were before. Raises ValueError if it is not applied."""
    for transformer in _hooks(pipe_or_transformer):
        _uninstall(transformer)


def easycache_report(pipe_or_transformer: Any) -> EasyCacheReport:
    """The report of the last finished call; an interrupted call does not replace it.

    Raises ValueError if EasyCache is not applied, if no call has finished, if it stayed away from the last one, or if
    it cannot be known whether that has finished, whose latents are then released; RuntimeError if the hook was lost.
    """
    hooks = _hooks(pipe_or_transformer)
    for transformer in hooks:
        _check_installed(transformer)
    run = next(iter(hooks.values())).run
    transformers = find_transformers(pipe_or_transformer)
    if run.is_of(pipe_or_transformer) and len(hooks) < len(transformers):
        lost = ", ".join(name for name, transformer in transformers.items() if transformer not in hooks)
        raise RuntimeError(
            f"EasyCache is not on `{lost}`, which was exchanged or added after apply_easycache. Call remove_easycache "
            "and apply_easycache again."
        )
    if (why := run.explain_missing_report()) is not None:
        raise ValueError(f"EasyCache has no report yet: {why}.")
    assert run.report is not None
    return run.report


def find_transformers(pipe_or_transformer: Any) -> dict[str, nn.Module]:
    """The denoising transformers of a pipeline by component name, each once, or the transformer itself.

    Raises ValueError if there is none.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        return {"transformer": pipe_or_transformer}
    components = getattr(pipe_or_transformer, "components", None)
    if not isinstance(components, dict):
        raise ValueError(
            f"EasyCache needs a diffusers pipeline or a transformer module; got {type(pipe_or_transformer).__name__}."
        )
    found: dict[str, nn.Module] = {}
    for name, component in components.items():
        if name.startswith("transformer") and isinstance(component, nn.Module) and component not in found.values():
            found[name] = component
    if not found:
        raise ValueError(
            f"{type(pipe_or_transformer).__name__} has no transformer; its components are {', '.join(components)}."
        )
    return found


def _install(hook: EasyCacheHook, transformer: nn.Module) -> None:
    with _beneath_accelerate(transformer):
        HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, HOOK_NAME)
        hook.keep_in_place()
        hook.installed = transformer.forward
    hook.guard = transformer.register_forward_pre_hook(_check_installed)


def _uninstall(transformer: nn.Module) -> None:
    hook = _find_hook(transformer)
    if hook is None:
        return
    hook.run.reset()
    if hook.guard is not None:
        hook.guard.remove()
    hook.keep_in_place()
    with _beneath_accelerate(transformer):
        HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(HOOK_NAME, recurse=False)
        _drop_own_forward(transformer)


def _checked_schedule(schedule: Iterable[int] | None) -> frozenset[int] | None:
    """The steps, whatever holds them; an iterator is used up once, here."""
    if schedule is None:
        return None
    steps = [None] if isinstance(schedule, str) or not isinstance(schedule, Iterable) else list(schedule)
    if not all(hasattr(step, "__index__") and not isinstance(step, bool) and int(step) >= 0 for step in steps):
        raise ValueError(
            f"`schedule` must hold the steps to compute as whole numbers from 0, such as [0, 1, 4]; got {schedule!r}."
        )
    return frozenset(operator.index(step) for step in steps)


def _checked_passes(passes: Sequence[str] | None) -> tuple[str, ...] | None:
    if passes is None:
        return None
    names = tuple(passes) if isinstance(passes, tuple | list) else ("",)
    is_named = all(isinstance(name, str) for name in names) and len(set(names)) == len(names) != 1
    if not is_named or (names and CONDITIONAL not in names):
        raise ValueError(
            f'`batched_guidance` must name the guidance passes of a batch in order, "cond" among them, such as '
            f'("uncond", "cond"), or be () if each has a call of its own; got {passes!r}.'
        )
    return names


def _published_settings(pipe: Any) -> EasyCacheConfig:
    if (preset := Preset.for_pipeline(pipe)) is not None:
        logger.info("EasyCache takes the settings for %s: %s.", preset.name, preset.source)
        return EasyCacheConfig.published(preset)
    config = EasyCacheConfig()
    logger.warning(
        "EasyCache has no published settings for %s; it takes threshold %g after %d warm-up steps. Choose your own "
        "with EasyCacheConfig.",
        type(pipe).__name__,
        config.threshold,
        config.warmup_steps,
    )
    return config


def _resets_after_call(pipe: Any, transformers: Iterable[Any]) -> bool:
    """Whether the pipeline resets its transformers at the end of a call, as diffusers does those that can cache."""
    resettable = all(resets_after_call(transformer) for transformer in transformers)
    return hasattr(pipe, "maybe_free_model_hooks") and resettable


def _refuse_unsafe(name: str, transformer: nn.Module) -> None:
    kind = f"`{name}` ({type(unwrap_module(transformer)).__name__})"
    if is_compiled_module(transformer) or is_compiled(transformer):
        raise ValueError(
            f"{kind} is compiled as a whole, which leaves no place for EasyCache; "
            "use transformer.compile_repeated_blocks(fullgraph=True) instead."
        )
    if _find_hook(transformer) is not None:
        raise ValueError(f"EasyCache is already applied to {kind}; call remove_easycache first.")
    if (config := cache_config(transformer)) is not None:
        raise ValueError(
            f"{kind} has {type(config).__name__} enabled; call disable_cache() first, one cache at a time."
        )
    if cache := _find_cache(transformer):
        raise ValueError(
            f"{kind} has the hook `{cache}` of another cache on it; remove that first, one cache at a time."
        )
    if any(isinstance(module, _sharded_types()) for module in transformer.modules()):
        raise ValueError(f"{kind} is sharded by FSDP, whose ranks must all compute; run EasyCache on a whole model.")
    _refuse_unsuitable(kind, transformer)


def _refuse_unsuitable(kind: str, transformer: nn.Module) -> None:
    traits = transformer_traits(unwrap_module(transformer))
    if traits.refusal is not None:
        raise ValueError(f"{kind} is not supported: {traits.refusal}.")
    parameters = inspect.signature(type(transformer).forward).parameters
    if missing := [name for name in traits.streams if name not in parameters]:
        raise ValueError(
            f"{kind} takes no `{missing[0]}`; EasyCache needs a diffusers video transformer whose forward does."
        )
    if kept := [name for name in parameters if "cache" in name or "past_key" in name or name == "memory"]:
        advice = " Make videos of this causal student with `vidaccel rollout`." if "memory" in kept else ""
        raise ValueError(
            f"{kind} takes `{kept[0]}`: a reused step would not write its keys and values. Not supported.{advice}"
        )


def _find_cache(transformer: nn.Module) -> str | None:
    """The name of a hook, on any part, that keeps state from step to step, as the caches of diffusers do."""
    for module in transformer.modules():
        registry = hook_registry(module)
        for name, hook in {} if registry is None else registry.hooks.items():
            if is_stateful(hook):
                return str(name)
    return None


def _sharded_types() -> tuple[type, ...]:
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return FSDPModule, FullyShardedDataParallel


@contextmanager
def _beneath_accelerate(module: Any) -> Iterator[None]:
    """Change `module.forward` under accelerate's offload wrapper, if there is one.

    Accelerate restores the forward it found when it is taken off, which `enable_model_cpu_offload` does after every
    call: a hook put on top would be lost from the second call on, silently.
    """
    beneath = forward_beneath_accelerate(module)
    if beneath is None:
        yield
        return
    outer = module.forward
    if "add_hook_to_module" not in getattr(getattr(outer, "func", None), "__qualname__", ""):
        raise ValueError(
            f"{type(module).__name__} has another hook on top of its offloading, so that EasyCache can neither be put "
            "under it nor taken off; disable that hook, or apply EasyCache before offloading."
        )
    module.forward = beneath
    try:
        yield
    finally:
        set_forward_beneath_accelerate(module, module.forward)
        module.forward = outer


def _check_installed(module: nn.Module, *_: Any) -> None:
    """Raise RuntimeError if the hook is registered but not in the way of a call: never silently without effect."""
    hook = _find_hook(module)
    inner = forward_beneath_accelerate(module)
    if hook is not None and not any(_leads_to(forward, hook) for forward in (module.forward, inner)):
        raise RuntimeError(
            f"EasyCache was lost from {type(module).__name__}: something replaced its forward. Call remove_easycache "
            "and apply_easycache again, after that change."
        )


def _leads_to(forward: Any, hook: EasyCacheHook) -> bool:
    while forward is not None:
        if forward is hook.installed:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _drop_own_forward(module: nn.Module) -> None:
    """Delete an instance attribute that only repeats the class's forward, as there was none before."""
    own = module.__dict__.get("forward")
    if own is not None and own == type(module).forward.__get__(module):
        del module.__dict__["forward"]


def _find_hook(module: nn.Module) -> EasyCacheHook | None:
    registry = hook_registry(module)
    return None if registry is None else registry.get_hook(HOOK_NAME)


def _hooks(pipe_or_transformer: Any) -> dict[nn.Module, EasyCacheHook]:
    transformers = find_transformers(pipe_or_transformer).values()
    found = {module: hook for module in transformers if (hook := _find_hook(module)) is not None}
    if not found:
        raise ValueError("EasyCache is not applied here; call apply_easycache first.")
    return found

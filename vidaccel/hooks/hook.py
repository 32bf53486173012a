"""The one place where EasyCache touches a model: a diffusers `ModelHook` around the forward of a whole transformer.

A reused call runs no part of the transformer. The hook lies outside anything that may be compiled, so
`compile_repeated_blocks(fullgraph=True)` keeps whole graphs.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from typing import Any, NoReturn, cast

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vidaccel.hooks.place import Call
from vidaccel.hooks.run import EasyCacheRun
from vidaccel.hooks.timing import moment

logger = logging.getLogger(__name__)

HOOK_NAME = "vidaccel_easycache"
LATENTS_ARGUMENT = "hidden_states"
TIMESTEP_ARGUMENT = "timestep"


class _ContextReceiver(StateManager):
    """Receives the cache context of the pipeline; holds no state of its own, see `EasyCacheRun`."""

    def __init__(self) -> None:
        super().__init__(cast(Any, BaseState))

    @property
    def current(self) -> CacheContext | None:
        return self._context


class EasyCacheHook(ModelHook):
    """Asks the run about every call of one transformer and computes, or returns a predicted output.

    installed, guard: the forward that leads here, and the handle of the check that it is still in place.
    """

    _is_stateful = True

    def __init__(self, run: EasyCacheRun, transformer: str) -> None:
        super().__init__()
        self.run = run
        self.transformer = transformer
        self.contexts = _ContextReceiver()
        self.installed: Any = None
        self.guard: RemovableHandle | None = None
        self._channels: tuple[int, int] | None = None
        self._warned = False

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self._signature = inspect.signature(type(unwrap_module(module)).forward)
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """diffusers calls this at the end of a pipeline call."""
        self.run.finish()
        return module

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "A transformer with EasyCache cannot be copied or pickled: the copy would run the original's weights. "
            "Call remove_easycache first, copy, then apply_easycache to both."
        )

    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = cast(Any, self.fn_ref).original_forward
        if torch.is_grad_enabled() or module.training:
            self._warn_that_it_stays_away(module)
            return forward(*args, **kwargs)
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise RuntimeError(
                f"{type(module).__name__} was compiled as a whole beneath EasyCache, which would leave it uncompiled; "
                "use compile_repeated_blocks(fullgraph=True) instead of compile()."
            )
        if getattr(module, "_cache_config", None) is not None:
            raise RuntimeError(
                f"{type(module).__name__} has {type(module._cache_config).__name__} enabled beside EasyCache; "
                "call disable_cache() or remove_easycache, one cache at a time."
            )
        arguments = self._signature.bind(module, *args, **kwargs).arguments
        call = self._call(arguments)
        reuse, branch = self.run.enter(self.transformer, call)
        if reuse:
            return _packed(self.run.predict(self.transformer, branch, call.latents), arguments)
        return self._compute(forward, args, kwargs, call=call, branch=branch)

    def _warn_that_it_stays_away(self, module: nn.Module) -> None:
        """Only training mode and gradients together are training; either alone is likely an oversight."""
        if self._warned or module.training == torch.is_grad_enabled():
            return
        self._warned = True
        where, remedy = (
            ("in training mode", ".eval()") if module.training else ("run with gradients", "torch.no_grad()")
        )
        logger.warning(
            "%s is %s, where EasyCache stays out of the way; use %s to reuse steps.",
            type(module).__name__,
            where,
            remedy,
        )

    def _compute(self, forward: Any, args: Any, kwargs: Any, *, call: Call, branch: str) -> Any:
        start = moment(call.source.device)
        try:
            result = forward(*args, **kwargs)
            output = _unpacked(result)
            span = start, moment(call.source.device)
            self._channels = match_channels(call.source, output)
            call = replace(call, latents=_narrowed(call.source, self._channels))
            self.run.record(self.transformer, branch, call, output, span)
        except BaseException:
            self.run.reset()  # an interrupted step leaves nothing behind
            raise
        return result

    def _call(self, arguments: dict[str, Any]) -> Call:
        source = arguments[LATENTS_ARGUMENT]
        conditions = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, Tensor) and name not in (LATENTS_ARGUMENT, TIMESTEP_ARGUMENT)
        }
        return Call(
            latents=_narrowed(source, self._channels),
            source=source,
            timestep=arguments.get(TIMESTEP_ARGUMENT),
            conditions=conditions,
            context=self.contexts.current,
        )


def match_channels(source: Tensor, output: Tensor) -> tuple[int, int] | None:
    """How the input is matched with the output: None if of equal shape, else (dimension, leading channels to take).

    Image-to-video models get conditions on further channels behind the latents. Channels are dimension 1 of
    (B, C, F, H, W) and the last one of (B, L, C). Raises ValueError if that does not give equal shapes.
    """
    if source.shape == output.shape:
        return None
    dimension = source.ndim - 1 if source.ndim == 3 else 1
    channels = output.shape[dimension] if output.ndim == source.ndim else 0
    if source.shape[dimension] < channels or source.narrow(dimension, 0, channels).shape != output.shape:
        raise ValueError(
            f"EasyCache cannot be applied: the transformer returned {tuple(output.shape)} for an input of "
            f"{tuple(source.shape)}; it needs an output shaped like the input or like its leading channels."
        )
    return dimension, channels


def _narrowed(source: Tensor, channels: tuple[int, int] | None) -> Tensor:
    return source if channels is None else source.narrow(channels[0], 0, channels[1])


def _unpacked(result: Any) -> Tensor:
    """The one tensor a transformer returned."""
    if isinstance(result, Transformer2DModelOutput):
        return result.sample
    if isinstance(result, tuple) and len(result) == 1 and isinstance(result[0], Tensor):
        return result[0]
    raise ValueError(
        "EasyCache cannot be applied: the transformer must return one tensor, as a tuple or Transformer2DModelOutput; "
        f"got {type(result).__name__}" + (f" of {len(result)} values." if isinstance(result, tuple) else ".")
    )


def _packed(output: Tensor, arguments: dict[str, Any]) -> Any:
    return Transformer2DModelOutput(sample=output) if arguments.get("return_dict", True) else (output,)

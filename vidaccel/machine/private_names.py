"""Every private name of diffusers, accelerate and PyTorch's modules that this package uses, in one place.

None of them is promised to stay. `PRIVATE_NAMES` says where each is set, and a test looks for it there, so that a new
release that moves one fails there and not in use. Elsewhere no module reads a `_name` of an object that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

_MODELING, _PIPELINES = "diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_utils"
_WAN, _HOOKS = "diffusers.pipelines.wan.pipeline_wan", "diffusers.hooks.hooks"

# The name, and the module of the library that sets it.
PRIVATE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "_all_hooks": _PIPELINES,
        "_attention_backend": "diffusers.models.transformers.transformer_wan",
        "_cache_config": "diffusers.models.cache_utils",
        "_clean_caption": "diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha",
        "_compiled_call_impl": "torch.nn.modules.module",
        "_current_timestep": _WAN,
        "_diffusers_hook": _HOOKS,
        "_execution_device": _PIPELINES,
        "_hf_hook": "accelerate.hooks",
        "_is_stateful": _HOOKS,
        "_keep_in_fp32_modules": _MODELING,
        "_name_or_path": "diffusers.configuration_utils",
        "_num_timesteps": _WAN,
        "_offload_device": _PIPELINES,
        "_old_forward": "accelerate.hooks",
        "_parallel_config": _MODELING,
        "_progress_bar_config": _PIPELINES,
        "_reset_stateful_cache": "diffusers.models.cache_utils",
        "_version": "torch._C",
    }
)


def execution_device(pipe: Any) -> torch.device:
    """Where the pipeline calculates, also while its parts wait elsewhere (offload)."""
    return torch.device(pipe._execution_device)


def offload_device_of(pipe: Any) -> Any:
    """The device that a pipeline with model offload was given; None without such offload."""
    return pipe._offload_device if getattr(pipe, "_all_hooks", None) else None


def progress_bar_config(pipe: Any) -> dict[str, Any]:
    """What `set_progress_bar_config` was given."""
    return dict(getattr(pipe, "_progress_bar_config", {}))


def num_timesteps(pipe: Any, otherwise: int) -> int:
    """The steps of the call under way, as the pipeline says them after `set_timesteps`."""
    return getattr(pipe, "_num_timesteps", otherwise)


def current_timestep(pipe: Any) -> Any:
    """The timestep that the pipeline's loop is at; None between calls."""
    return getattr(pipe, "_current_timestep", None)


def name_or_path(config: Any) -> str | None:
    """Where `from_pretrained` loaded a part or a pipeline from."""
    found: str | None = getattr(config, "_name_or_path", None)
    return found


def hook_registry(module: nn.Module) -> Any:
    """The `HookRegistry` of a module; None where it never had a hook of diffusers."""
    return getattr(module, "_diffusers_hook", None)


def is_stateful(hook: ModelHook) -> bool:
    """Whether a hook of diffusers keeps something from step to step, as its caches do."""
    return bool(hook._is_stateful)


def cache_config(module: nn.Module) -> Any:
    """The configuration of diffusers' own cache that is enabled on a model; None without one."""
    return getattr(module, "_cache_config", None)


def resets_after_call(module: Any) -> bool:
    """Whether pipelines of diffusers tell this model when a call is over."""
    return hasattr(module, "_reset_stateful_cache")


def accelerate_hook(module: nn.Module) -> Any:
    """accelerate's hook on a module, of model or sequential offload; None without one."""
    return getattr(module, "_hf_hook", None)


def forward_beneath_accelerate(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that accelerate's offload calls and puts back when it is taken off; None without it."""
    found: Callable[..., Any] | None = module.__dict__.get("_old_forward")
    return found


def set_forward_beneath_accelerate(module: Any, forward: Callable[..., Any]) -> None:
    """Let accelerate's offload call `forward`, and put it back when it is taken off."""
    module._old_forward = forward


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called, which compiles in place."""
    return getattr(module, "_compiled_call_impl", None) is not None


def attention_backend_of(processor: Any) -> Any:
    """The backend that an attention processor of diffusers was set to; None where it was not."""
    return getattr(processor, "_attention_backend", None)


def chooses_attention(processor: Any) -> bool:
    """Whether an attention processor goes through diffusers' choice of backends."""
    return hasattr(processor, "_attention_backend")


def tensor_version(tensor: torch.Tensor) -> int:
    """A number that rises with every write into the tensor's memory."""
    return tensor._version


def kept_in_float32(model: Any) -> frozenset[str]:
    """Names of the parts that `from_pretrained(dtype=...)` leaves in float32."""
    return frozenset(getattr(model, "_keep_in_fp32_modules", None) or ())


def is_context_parallel(model: Any) -> bool:
    """Whether `enable_parallelism` shares the model's sequence over devices."""
    return getattr(model, "_parallel_config", None) is not None


def clean_caption(text: str) -> str:
    """PixArt's caption cleaning; the method reads one constant of its class and nothing of an instance."""
    from diffusers import PixArtAlphaPipeline

    cleaned: str = PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, text)
    return cleaned

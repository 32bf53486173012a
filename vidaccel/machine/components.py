"""The parts of a diffusers pipeline and what they say about sizes, whatever its family."""

import math
from typing import Any

import torch

from vidaccel.machine.private_names import accelerate_hook

_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")


def denoisers(pipe: Any) -> list[Any]:
    """The denoising networks, in the order they work in: one, or two where experts share the steps (Wan2.2)."""
    parts = modules(pipe)
    names = [name for name in parts if name.startswith("transformer")] or [name for name in parts if name == "unet"]
    return [parts[name] for name in sorted(names)]


def modules(pipe: Any) -> dict[str, torch.nn.Module]:
    """All networks by name: denoisers, VAE, encoders."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def onload(module: Any) -> torch.device:
    """Where a network computes; an offloaded one is brought there first, as calling it would do.

    For calls of its parts and methods other than `forward`, which the hooks of an offload do not see.
    """
    hook = accelerate_hook(module)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(module)
    device = getattr(hook, "execution_device", None)
    return torch.device(module.device if device is None else device)


def strides(pipe: Any) -> tuple[int | None, int | None]:
    """Frames for a latent frame and pixels for a latent pixel, as the pipeline or its VAE says; None where it is not.

    A VAE of images has a temporal stride of 1, which nothing says.
    """
    vae = getattr(pipe, "vae", None)
    spatial = _first_number(pipe, _SPATIAL) or _first_number(vae, ("spatial_compression_ratio",))
    return _first_number(pipe, _TEMPORAL) or _first_number(vae, ("temporal_compression_ratio",)), spatial


def patch_sizes(denoiser: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns of one token; (1, 1, 1) where the configuration does not say."""
    config = denoiser.config
    patch = getattr(config, "patch_size", None) or 1
    if isinstance(patch, int):
        temporal = getattr(config, "patch_size_t", None) or getattr(config, "patch_size_temporal", None) or 1
        return int(temporal), patch, patch
    sizes = tuple(int(size) for size in patch)
    return (1, *sizes) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[2])


def hidden_sizes(denoiser: Any) -> tuple[int, int]:
    """Width of the tokens and of the feed-forward layer; 0 where the configuration does not say."""
    config = denoiser.config
    heads, width = getattr(config, "num_attention_heads", 0), getattr(config, "attention_head_dim", 0)
    product = heads * width if isinstance(heads, int) and isinstance(width, int) else 0
    hidden = product or getattr(config, "model_dim", 0) or getattr(config, "hidden_size", 0)
    ratio = getattr(config, "mlp_ratio", 4)
    return hidden, getattr(config, "ffn_dim", 0) or getattr(config, "ff_dim", 0) or math.ceil(ratio * hidden)


def decoder_channels(vae: Any) -> int:
    """Channels of the VAE's decoder before its last stage; 0 where the configuration does not say."""
    config = vae.config
    base = getattr(config, "base_dim", None)
    if isinstance(base, int):
        multipliers = getattr(config, "dim_mult", (1, 2))
        return base * multipliers[min(1, len(multipliers) - 1)]
    for name in ("decoder_block_out_channels", "block_out_channels"):
        widths = getattr(config, name, None)
        if widths:
            return int(widths[min(1, len(widths) - 1)])
    return 0


def _first_number(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None

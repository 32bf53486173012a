"""The parts of a diffusers pipeline, whatever its family."""

from typing import Any

import torch

_DENOISERS = ("transformer", "transformer_2")


def denoisers(pipe: Any) -> list[Any]:
    """The denoising networks, in the order they work in: one, or two where experts share the steps (Wan2.2)."""
    return [model for name in _DENOISERS if (model := getattr(pipe, name, None)) is not None]


def modules(pipe: Any) -> dict[str, torch.nn.Module]:
    """All networks by name: denoisers, VAE, encoders."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def execution_device(pipe: Any) -> torch.device:
    """Where the pipeline calculates, also while its parts wait elsewhere (offload)."""
    return torch.device(pipe._execution_device)

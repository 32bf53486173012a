"""Which of diffusers' attention backends run on this machine: found out by running each on a tiny input.

A backend can be installed and still fail on the first real call (no kernel for the device, the head size or the
number format), after minutes of loading. So one small attention call is made before anything is loaded.
"""

import logging
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

from vidaccel.errors import UserError

logger = logging.getLogger(__name__)

NATIVE = "native"


def attention_backend_names() -> tuple[str, ...]:
    """The names diffusers knows, public ones first."""
    names = {backend.value for backend in AttentionBackendName}
    return tuple(sorted(names, key=lambda name: (name.startswith("_"), name)))


def check_attention_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Run one tiny attention call, (B, L, N, D) = (1, 128, 2, 64), with backend `name` on `device`.

    Raises `UserError` where the name is unknown, the package is missing, or the call fails or returns nonsense.
    """
    if name not in attention_backend_names():
        raise UserError(f"`attention` must be one of {', '.join(attention_backend_names())}; got {name!r}.")
    if name == NATIVE:
        return
    query = torch.randn(1, 128, 2, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    try:
        with torch.no_grad(), attention_backend(name):
            output = dispatch_attention_fn(query, query, query)
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The attention backend {name!r} cannot run here ({device}, {dtype}): {reason}") from error
    if output.shape != query.shape or not torch.isfinite(output).all():
        raise UserError(f"The attention backend {name!r} returns wrong values here ({device}, {dtype}); use 'native'.")


def set_attention_backend(denoiser: Any, name: str) -> None:
    """Let one model use backend `name`; diffusers' own method would also change it for every other model."""
    with attention_backend(name):  # puts the process's default back afterwards
        denoiser.set_attention_backend(name)


def usable_attention_backends(*, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The public backends that pass `check_attention_backend` and download nothing."""
    usable = []
    for name in attention_backend_names():
        if name.startswith("_") or name.endswith("_hub"):
            continue
        try:
            check_attention_backend(name, device=device, dtype=dtype)
        except UserError as error:
            logger.debug("%s", error)
        else:
            usable.append(name)
    return tuple(usable)

"""Which of diffusers' attention backends run on this machine: found out by running each on a tiny input.

A backend can be installed and still fail on the first real call (no kernel for the device, the head size, the number
format or a mask), after minutes of loading. So one small call of the kind that the model will make is run, and its
values are compared with PyTorch's own, before anything is loaded.

Axes: B batch, L length, N heads, D head size.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch.nn.functional import scaled_dot_product_attention

from vidaccel.catalog.table import transformer_traits
from vidaccel.catalog.traits import AttentionMask
from vidaccel.errors import UserError
from vidaccel.machine.components import denoisers
from vidaccel.machine.private_names import chooses_attention, execution_device

logger = logging.getLogger(__name__)

NATIVE = "native"
_LENGTH = 128
_MOST_WRONG = 0.1  # mean error relative to the mean; 8-bit attention stays under 0.05, a mask that is ignored gives 1


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What a model asks of an attention backend."""

    head_dim: int = 64
    mask: AttentionMask = "none"


def attention_call(class_name: str, config: Mapping[str, Any]) -> AttentionCall:
    """The kind of call that a transformer of that class and configuration makes."""
    head_dim = config.get("attention_head_dim") or config.get("head_dim") or sum(config.get("axes_dims", ()))
    if not head_dim and {"hidden_size", "num_heads"} <= config.keys():
        head_dim = config["hidden_size"] // config["num_heads"]
    return AttentionCall(head_dim=head_dim or 64, mask=transformer_traits(class_name).attention_mask)


def attention_backend_names() -> tuple[str, ...]:
    """The names diffusers knows, public ones first."""
    names = {backend.value for backend in AttentionBackendName}
    return tuple(sorted(names, key=lambda name: (name.startswith("_"), name)))


def check_attention_backend(
    name: str, *, device: torch.device, dtype: torch.dtype, call: AttentionCall | None = None
) -> None:
    """Run one tiny attention call, (B, L, N, D) = (1, 128, 2, head size), with backend `name` on `device`.

    Raises `UserError` where the name is unknown, the package is missing, or the call fails or returns wrong values.
    """
    call = call or AttentionCall()
    if name not in attention_backend_names():
        raise UserError(f"`attention` must be one of {', '.join(attention_backend_names())}; got {name!r}.")
    if name == NATIVE:
        return
    where = f"({device}, {dtype}, head size {call.head_dim}, mask: {call.mask})"
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, _LENGTH, 2, call.head_dim, generator=generator).to(device, dtype)
    mask = _mask(call.mask, device, dtype)
    try:
        with torch.no_grad(), attention_backend(name):
            output = dispatch_attention_fn(query, query, query, attn_mask=mask)
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The attention backend {name!r} cannot run here {where}: {reason}") from error
    rows = query.transpose(1, 2)
    expected = scaled_dot_product_attention(rows, rows, rows, attn_mask=mask).transpose(1, 2)
    if output.shape != query.shape or not _relative_error(output, expected) < _MOST_WRONG:
        raise UserError(f"The attention backend {name!r} returns wrong values here {where}; use 'native'.")
    if name == "xformers" and call.mask == "keys":
        logger.warning(
            "xformers writes the boolean mask of this model out for every head and pair of tokens, which at full size "
            "fills any memory; use native, _native_cudnn or flash_varlen."
        )


def check_attention_of_folder(folder: Path, name: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """`check_attention_backend` for every denoiser of a saved pipeline, from its configuration alone."""
    configs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("transformer*/config.json"))]
    calls = {attention_call(config.get("_class_name", ""), config) for config in configs} or {AttentionCall()}
    for call in sorted(calls, key=str):
        check_attention_backend(name, device=device, dtype=dtype, call=call)


def use_attention_backend(pipe: Any, name: str) -> None:
    """Let the denoisers of a pipeline use attention backend `name`, after a check that it can run what they will ask.

    Everything else in the process keeps its backend. Raises `UserError` where the backend is unknown, cannot run or is
    wrong here, or where a denoiser does not choose its attention through diffusers, so that nothing would change.
    """
    device = execution_device(pipe)
    for denoiser in denoisers(pipe):
        call = attention_call(type(denoiser).__name__, denoiser.config)
        check_attention_backend(name, device=device, dtype=denoiser.dtype, call=call)
    for denoiser in denoisers(pipe):
        set_attention_backend(denoiser, name)


def set_attention_backend(denoiser: Any, name: str) -> None:
    """Let one model use backend `name`, unchecked; diffusers' own method would also change it for every other model.

    Raises `UserError` where the model's attention does not go through diffusers' choice of backends.
    """
    if not any(chooses_attention(getattr(part, "processor", None)) for part in denoiser.modules()):
        raise UserError(
            f"{type(denoiser).__name__} calls PyTorch's attention directly, so that `attention` {name!r} would change "
            "nothing; leave it out."
        )
    with attention_backend(name):  # puts the process's default back afterwards
        denoiser.set_attention_backend(name)


def usable_attention_backends(
    *, device: torch.device, dtype: torch.dtype, call: AttentionCall | None = None, private: bool = False
) -> tuple[str, ...]:
    """The backends that pass `check_attention_backend` and download nothing.

    private: also those that diffusers names with an underscore, one kernel of PyTorch each for the most part.
    """
    usable = []
    for name in attention_backend_names():
        if (name.startswith("_") and not private) or name.endswith("_hub"):
            continue
        try:
            check_attention_backend(name, device=device, dtype=dtype, call=call)
        except UserError as error:
            logger.debug("%s", error)
        else:
            usable.append(name)
    return tuple(usable)


def _mask(kind: AttentionMask, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
    """Half of the keys are hidden, so that a mask that is ignored shows in the values."""
    if kind == "none":
        return None
    keys = torch.arange(_LENGTH, device=device) < _LENGTH // 2
    if kind == "keys":
        return keys.view(1, 1, 1, -1)
    if kind == "pairs":
        return keys.view(1, 1, 1, -1).repeat(1, 1, _LENGTH, 1)
    bias = torch.where(keys, 0.0, -10000.0).to(dtype)
    return bias.view(1, 1, 1, -1).expand(1, 2, 1, -1)


def _relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.float() - expected.float()).abs().mean() / expected.float().abs().mean())

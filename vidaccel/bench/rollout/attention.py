"""Which attention is fastest for a chunk and its memory, of those that give the right values on this device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidaccel.bench.shared.clock import DeviceClock
from vidaccel.errors import UserError
from vidaccel.machine.attention import (
    NATIVE,
    AttentionCall,
    check_attention_backend,
    set_attention_backend,
    usable_attention_backends,
)
from vidaccel.memory.buffers import MemoryShape
from vidaccel.models.split_attention import (
    KeySplit,
    attention_with_log_sums,
    in_parts,
    merge_parts,
    use_split_attention,
)

AUTO = "auto"
_PARTS = {"cudnn": (1, 2, 3, 4, 7), "flash": (1, 2, 3), "cpu": (1, 2)}
_CUDA_NAMES = (NATIVE, "_native_cudnn", "_native_flash")
# 8-bit kernels give another result; flex writes all weights out where it is not compiled.
_LEFT_OUT = ("sage", "flex")
_CHECKED_QUERIES = 64
_MOST_WRONG = 0.03  # mean error relative to the mean, of a result in bfloat16
_ERRORS = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)


def time_attention(
    shape: MemoryShape, *, chunk_frames: int, attended_frames: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Milliseconds of every candidate for one layer and chunk, the fastest first; those that fail last, with why."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = [frames * shape.tokens_per_frame for frames in (chunk_frames, attended_frames, attended_frames)]
    size = (shape.batch_size, shape.num_heads, shape.head_dim)
    query, keys, values = (
        torch.randn(size[0], length, *size[1:], generator=generator, device=device, dtype=dtype) for length in tokens
    )
    expected = _expected(query, keys, values)
    rows = []
    for name in _candidates(device, dtype, shape.head_dim):
        row: dict[str, Any] = {"attention": name, "ms": None, "error": None}
        try:
            call = _call(name, device)
            got = call(query, keys, values)[:, :_CHECKED_QUERIES].float()
            wrong = float((got - expected).abs().mean() / expected.abs().mean())
            if wrong < _MOST_WRONG:
                row |= {"ms": _milliseconds(partial(call, query, keys, values), device)}
            row |= {"relative_error": wrong}
        except _ERRORS as error:
            row |= {"error": " ".join(str(error).split())[:160] or type(error).__name__}
        rows.append(row)
    return sorted(rows, key=lambda row: (row["ms"] is None, row["ms"] or 0.0))


def use_attention(transformer: Any, name: str) -> None:
    """Let the self-attention of a causal transformer use `name`: a backend of diffusers, or kernel/parts.

    Raises UserError for a name that is neither, and for a backend that cannot run here.
    """
    kernel, slash, parts = name.partition("/")
    if slash:
        if kernel not in _PARTS or not parts.isdecimal() or int(parts) < 1:
            raise UserError(f"Keys in parts are written kernel/parts, such as cudnn/2; got {name!r}.")
        use_split_attention(transformer, KeySplit(kernel=kernel, num_parts=int(parts)))  # type: ignore[arg-type]
        return
    parameter: Tensor = transformer.patch_embedding.weight
    call = AttentionCall(head_dim=transformer.config.attention_head_dim)
    check_attention_backend(name, device=parameter.device, dtype=parameter.dtype, call=call)
    if name != NATIVE:
        set_attention_backend(transformer, name)


def _candidates(device: torch.device, dtype: torch.dtype, head_dim: int) -> Sequence[str]:
    kernels = ("cudnn", "flash") if device.type == "cuda" else ("cpu",)
    split = [f"{kernel}/{parts}" for kernel in kernels for parts in _PARTS[kernel]]
    if device.type != "cuda":
        return [NATIVE, *split]
    public = usable_attention_backends(device=device, dtype=dtype, call=AttentionCall(head_dim=head_dim))
    exact = [name for name in public if name not in _CUDA_NAMES and not name.startswith(_LEFT_OUT)]
    return [*_CUDA_NAMES, *exact, *split]


def _call(name: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    kernel, slash, parts = name.partition("/")
    if not slash:

        def dispatched(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            with attention_backend(name):
                attended: Tensor = dispatch_attention_fn(query, keys, values)
            return attended

        return dispatched
    # Compiled as it is within a block; one compilation serves all numbers of parts.
    merge = torch.compile(merge_parts, dynamic=True) if device.type == "cuda" else merge_parts

    def split(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attended, log_sums = attention_with_log_sums(*in_parts(query, keys, values, int(parts)), kernel)
        return attended if int(parts) == 1 else merge(attended, log_sums)

    return split


def _expected(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    query, keys, values = (side.transpose(1, 2).float() for side in (query[:, :_CHECKED_QUERIES], keys, values))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return scaled_dot_product_attention(query, keys, values).transpose(1, 2)


def _milliseconds(work: Callable[[], object], device: torch.device, *, repeats: int = 10) -> float:
    clock = DeviceClock(device)
    for _ in range(3):
        work()
    clock.synchronise()
    begin = clock.now()
    for _ in range(repeats):
        work()
    end = clock.now()
    clock.synchronise()
    return clock.between(begin, end) / repeats

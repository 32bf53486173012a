"""How much memory a computation will hold at once, found out without doing it: run on the meta device and counted.

Tensors of PyTorch's meta device have shapes and no contents, so that a forward of any size takes milliseconds and no
memory. Every tensor it makes is counted from the operation that makes it until Python lets go of it. Not in the count:
what libraries take inside one operation (workspaces of cuDNN, fragments of the allocator), and the scores of attention,
which no fused kernel writes down.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ATen unfolds the input of a 3-D convolution in float32 on a CPU unless it is at least this large (use_mkldnn in
# aten/src/ATen/native/Convolution.cpp: the product of all sizes but the last).
_LEAST_FOR_DIRECT_CONVOLUTION = 20480


def peak_bytes(call: Callable[[], Any], *, device: torch.device) -> int:
    """Most bytes of tensors alive at once during `call()`, beyond those alive before it.

    call: works with tensors of the meta device. device: the one it is meant for; a CPU unfolds small convolutions.
    """
    count = _LiveBytes(unfolds=device.type == "cpu")
    with torch.no_grad(), _FusedAttention(), count:
        call()
    return int(count.peak)


class _FusedAttention(TorchFunctionMode):
    """Stands for an attention kernel that makes nothing but its result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query: Tensor = args[0] if args else kwargs["query"]
            return torch.empty_like(query)
        return func(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages made so far and still alive, less those freed that were there before; and their peak."""

    def __init__(self, *, unfolds: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._unfolds = unfolds
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            self._note(value, is_new=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._note(value, is_new=True)
        columns = 0
        if self._unfolds and func is torch.ops.aten.convolution.default:
            columns = _column_bytes(args[0], args[1], result)
        self.peak = max(self.peak, self.live + columns)
        return result

    def _note(self, value: Any, *, is_new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._known:
            return

        def forget(_: Any) -> None:
            self.live -= num_bytes
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        if is_new:
            self.live += num_bytes


def _column_bytes(inputs: Tensor, weight: Tensor, outputs: Tensor) -> int:
    """Bytes of the unfolded neighbourhoods of a 3-D convolution in float32, 0 where the CPU needs none."""
    kernel = weight.shape[2:]
    if len(kernel) != 3 or kernel.numel() == 1 or inputs.dtype != torch.float32:
        return 0
    if inputs.shape[:-1].numel() > _LEAST_FOR_DIRECT_CONVOLUTION or inputs.shape[0] > 1:
        return 0
    return weight.shape[1] * kernel.numel() * outputs.shape[2:].numel() * inputs.element_size()

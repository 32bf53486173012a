"""Writing safetensors files tensor by tensor: the header is known beforehand, so no second copy is held in memory.

The format (github.com/huggingface/safetensors): 8 bytes of header length (little endian), a JSON header, then the
numbers without gaps. Tensors with wider numbers come first, so that each lies at a multiple of its own number size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from vidaccel.errors import UserError

DTYPE_NAMES = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)
_METADATA = "__metadata__"


class TensorForm(Protocol):
    """A tensor that is to be written: its name, shape and number format."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


T = TypeVar("T", bound=TensorForm)


def num_bytes(tensor: TensorForm) -> int:
    """Size of its numbers in the file."""
    return tensor.dtype.itemsize * torch.Size(tensor.shape).numel()


def file_order(tensors: Iterable[T]) -> list[T]:
    """The tensors as they lie in the file: wide numbers first, then by name."""
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


def file_header(tensors: Iterable[TensorForm], metadata: Mapping[str, str]) -> bytes:
    """What a file of these tensors, in this order, begins with: `format` is "pt", and `metadata` stands beside it.

    Raises UserError for number formats that safetensors does not have, and for two tensors of one name.
    """
    entries: dict[str, object] = {_METADATA: {"format": "pt", **metadata}}
    start = 0
    for tensor in tensors:
        if tensor.dtype not in DTYPE_NAMES or tensor.name in entries:
            raise UserError(f"The tensor {tensor.name!r} ({tensor.dtype}) cannot be saved as safetensors.")
        end = start + num_bytes(tensor)
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write a whole file of tensors at hand. Raises UserError as `file_header` does, and OSError of the disk."""
    ordered = file_order(_Form(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())
    file.write(file_header(ordered, {}))
    for form in ordered:
        file.write(file_data(tensors[form.name]))


class _Form(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def file_data(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in the file, whatever its device and strides."""
    numbers = tensor.detach().cpu().reshape(-1).contiguous()
    return numbers.view(torch.uint8).numpy().data if numbers.numel() else memoryview(b"")

"""Safetensors files written tensor by tensor are those that the safetensors library reads."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.files.tensors import DTYPE_NAMES, file_data, file_header, file_order, num_bytes


class Form(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def written(tensors: dict[str, Tensor]) -> bytes:
    ordered = file_order([Form(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()])
    return file_header(ordered, {}) + b"".join(file_data(tensors[form.name]) for form in ordered)


def of_every_format() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.rand(3, 5) * 100).to(dtype) for dtype in DTYPE_NAMES}
    tensors["turned"] = torch.rand(4, 6).T
    tensors["repeated"] = torch.rand(1, 3).expand(4, 3)
    tensors["part"] = torch.rand(10)[::3]
    tensors["scalar"] = torch.tensor(7)
    tensors["nothing"] = torch.zeros(0, 4)
    tensors["é\n"] = torch.tensor([True, False])
    return tensors


def test_every_format_and_stride_reads_back_to_the_bit() -> None:
    tensors = of_every_format()
    read = load(written(tensors))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert bytes(file_data(read[name])) == bytes(file_data(tensor))


def test_the_bytes_are_those_of_the_library_and_every_tensor_is_aligned() -> None:
    tensors = {name: torch.arange(5).to(dtype) for name, dtype in (("b", torch.float16), ("a", torch.float32))}
    assert written(tensors) == save(tensors, {"format": "pt"})
    start = 0
    for form in file_order([Form(name, tuple(one.shape), one.dtype) for name, one in of_every_format().items()]):
        assert start % form.dtype.itemsize == 0
        start += num_bytes(form)


@pytest.mark.parametrize(
    "forms",
    [
        [Form("a", (1,), torch.complex64)],
        [Form("__metadata__", (1,), torch.float32)],
        [Form("a", (1,), torch.float32), Form("a", (2,), torch.float32)],
    ],
)
def test_what_the_format_cannot_hold_is_refused(forms: list[Form]) -> None:
    with pytest.raises(UserError, match="cannot be saved as safetensors"):
        file_header(forms, {})

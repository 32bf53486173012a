"""Writing safetensors files tensor by tensor: the header is known beforehand, so nothing is collected in memory.

The format: 8 bytes of header length (little endian), a JSON header, then the tensors without gaps. Tensors with larger
numbers come first, so that each lies at a multiple of its own number size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from vidaccel.convert.plan import PlannedTensor
from vidaccel.errors import UserError

MOST_SHARD_BYTES = 5_000_000_000
_NAMES = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)
Make = Callable[[PlannedTensor], Tensor]


def write_weights(
    folder: Path, stem: str, tensors: Sequence[PlannedTensor], make: Make, *, most_bytes: int = MOST_SHARD_BYTES
) -> Iterator[PlannedTensor]:
    """Write `stem.safetensors`, or shards with their index where it would be larger than `most_bytes`.

    Yields every tensor once it is written. A tensor that is larger than a shard gets one of its own.
    """
    shards = _shards(tensors, most_bytes)
    if len(shards) == 1:
        yield from _write_file(folder / f"{stem}.safetensors", shards[0], make)
        return
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        yield from _write_file(folder / name, shard, make)
        placed |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Sequence[PlannedTensor], most_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: Sequence[PlannedTensor], make: Make) -> Iterator[PlannedTensor]:
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    with path.open("wb") as file:
        header = _header(ordered)
        file.write(len(header).to_bytes(8, "little") + header)
        for planned in ordered:
            tensor = make(planned)
            if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
                raise UserError(f"{planned.name} came out as {list(tensor.shape)}, not {list(planned.shape)}.")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor
            yield planned


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)

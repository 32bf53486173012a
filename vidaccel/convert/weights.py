"""The weights of a component as safetensors: one file, or shards with their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from vidaccel.convert.plan import PlannedTensor
from vidaccel.errors import UserError
from vidaccel.files.tensors import file_data, file_header, file_order, num_bytes

MOST_SHARD_BYTES = 5_000_000_000
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
    total = sum(num_bytes(tensor) for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Sequence[PlannedTensor], most_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + num_bytes(tensor) > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += num_bytes(tensor)
    return shards


def _write_file(path: Path, tensors: Sequence[PlannedTensor], make: Make) -> Iterator[PlannedTensor]:
    ordered = file_order(tensors)
    with path.open("wb") as file:
        file.write(file_header(ordered, {}))
        for planned in ordered:
            tensor = make(planned)
            if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
                raise UserError(f"{planned.name} came out as {list(tensor.shape)}, not {list(planned.shape)}.")
            file.write(file_data(tensor))
            del tensor
            yield planned

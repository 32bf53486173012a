"""Reading published weights: what a file or folder holds, from the headers alone, and one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.files.tensors import DTYPE_NAMES

_PICKLED = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_DEEPEST = 3  # folders below a given one: `ckpts/google/t5-v1_1-xxl`
_INDEX = ".safetensors.index.json"
_NEEDS_SCALES = ("F8_E4M3", "F8_E5M2", "I8")  # what such numbers mean stands elsewhere
_DTYPES = MappingProxyType({name: dtype for dtype, name in DTYPE_NAMES.items() if name not in _NEEDS_SCALES})


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies, its name there, and what it is."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of one network: a file, or the shards that an index lists. Nothing is read before `read`."""

    path: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def folder(self) -> Path:
        """Where it lies, and where its `config.json` and tokenizer may lie."""
        return self.path.parent

    def read(self, key: str) -> Tensor:
        """One tensor. Raises `UserError` if its bytes cannot be read or are no finite numbers."""
        stored = self.tensors[key]
        try:
            with safe_open(stored.file, framework="pt") as file:
                tensor = file.get_tensor(stored.name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{stored.file} is damaged at {key!r} ({error}); get it again.") from error
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{stored.file} is damaged: {key!r} holds values that are no finite numbers; get it again.")
        return tensor

    def config(self) -> dict[str, Any]:
        """The `config.json` beside the weights, or nothing."""
        path = self.folder / "config.json"
        return read_json(path) if path.is_file() else {}


def find_checkpoints(paths: Sequence[Path]) -> list[Checkpoint]:
    """All safetensors checkpoints that are given or lie in given folders, three folders deep.

    Raises `UserError` for a path that is not there, a pickled or damaged file, and where there is nothing at all.
    """
    found: dict[Path, Checkpoint] = {}
    pickled: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no file or folder {path}; `--checkpoint` takes published weights.")
        if path.is_file():
            found[path.resolve()] = _open(path)
            continue
        for folder, names in _walk(path):
            pickled += [folder / name for name in names if name.endswith(_PICKLED)]
            for checkpoint in _in_folder(folder, names):
                found[checkpoint.path.resolve()] = checkpoint
    if not found and pickled:
        raise UserError(_pickle_advice(pickled[0]))
    if not found:
        raise UserError(f"{paths[0]} holds no .safetensors file, up to {_DEEPEST} folders deep.")
    return list(found.values())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); get it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; get it again.")
    return value


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, below, names in os.walk(top, followlinks=True):
        depth = len(Path(folder).relative_to(top).parts)
        below[:] = sorted(name for name in below if not name.startswith(".") and depth < _DEEPEST)
        yield Path(folder), sorted(names)


def _in_folder(folder: Path, names: Sequence[str]) -> Iterator[Checkpoint]:
    shards: set[str] = set()
    for name in names:
        if name.endswith(_INDEX):
            checkpoint = _open_index(folder / name)
            shards |= {stored.file.name for stored in checkpoint.tensors.values()}
            yield checkpoint
    for name in names:
        if name.endswith(".safetensors") and not name.startswith(".") and name not in shards:
            yield _open(folder / name)


def _open(path: Path) -> Checkpoint:
    if path.name.endswith(_INDEX):
        return _open_index(path)
    return Checkpoint(path=path, tensors=_header(path))


def _open_index(path: Path) -> Checkpoint:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{path} has no `weight_map`; get it again.")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(placed.values())):
        if not (path.parent / name).is_file():
            raise UserError(f"{path.parent / name} is missing, and {path.name} lists it; get it again.")
        tensors |= _header(path.parent / name)
    absent = sorted(set(placed) - set(tensors))
    if absent:
        raise UserError(
            f"{path} lists {len(absent)} tensors that its shards lack, {absent[0]} among them; get it again."
        )
    return Checkpoint(path=path, tensors=tensors)


def _header(path: Path) -> dict[str, StoredTensor]:
    _check_kind(path)
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(key)
                tensors[key] = (tuple(part.get_shape()), part.get_dtype())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); get it again.") from error
    unknown = {name for _, name in tensors.values()} - set(_DTYPES)
    if unknown:
        raise UserError(
            f"{path} holds numbers as {', '.join(sorted(unknown))}; only {', '.join(_DTYPES)} can be converted."
        )
    return {
        key: StoredTensor(file=path, name=key, shape=shape, dtype=_DTYPES[kind])
        for key, (shape, kind) in tensors.items()
    }


def is_pickled(path: Path) -> bool:
    """Whether a file is a pickle by its name or its first bytes (a zip or pickle by another name)."""
    start = _start(path)
    return path.suffix in _PICKLED or (start.startswith((b"PK\x03\x04", b"\x80\x02")) and start[8:9] != b"{")


def _check_kind(path: Path) -> None:
    if _start(path).startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`.")
    if is_pickled(path):
        raise UserError(_pickle_advice(path))


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _pickle_advice(path: Path) -> str:
    return (
        f"{path} is pickled, and reading a pickle can run any code, so it is refused; take the .safetensors file of "
        "the same model, or write one with `safetensors.torch.save_file(torch.load(path, weights_only=True), ...)`."
    )

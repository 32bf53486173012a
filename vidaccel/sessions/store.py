"""Files that are whole or not there: objects named after their sha256, and small JSON files that carry theirs.

A file is written beside its place, brought to disk (fsync) and then renamed, so that neither a kill nor a power cut
leaves half of one. Every read compares the content with its sha256. Tensors are safetensors files, written tensor by
tensor, so that saving needs no second copy of them in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.files.tensors import file_data, file_header, file_order

VERSION = 1
TENSOR_SUFFIX = ".safetensors"
_BLOCK_BYTES = 2**22
_OBJECT = re.compile(r"[0-9a-f]{64}\.[a-z0-9]+")


class _Saved(NamedTuple):
    """A tensor of a file to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor


class ObjectStore:
    """Immutable files in one folder, each named after the sha256 of its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str, suffix: str = TENSOR_SUFFIX) -> Path:
        """Where the object lies."""
        return self.folder / f"{digest}{suffix}"

    def put_tensors(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> str:
        """Save tensors and JSON values as one object and return its sha256; bit-exact, also of views and aliases.

        Raises UserError for what safetensors cannot hold, before anything is written, and OSError of the disk.
        """
        ordered = _checked(tensors)
        header = _header(ordered, {} if values is None else values)
        return self._put(chain([header], (file_data(saved.tensor) for saved in ordered)), TENSOR_SUFFIX)

    def put_bytes(self, content: bytes, suffix: str) -> str:
        """Save bytes as one object and return its sha256. Raises OSError of the disk."""
        return self._put((content,), suffix)

    def tensors(self, digest: str, *, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (on the CPU) and values of an object.

        Raises UserError for a file that is missing, unreadable or not what was saved; `remedy` says what to do then.
        """
        path = self.path(digest)
        with _reading(path, remedy), path.open("rb") as file:
            computed = hashlib.sha256()
            while block := file.read(_BLOCK_BYTES):
                computed.update(block)
            _compare(path, computed.hexdigest(), digest, remedy)
            with safe_open(path, framework="pt") as opened:
                values = json.loads(opened.metadata()["values"])
                return {name: opened.get_tensor(name) for name in opened.keys()}, values  # noqa: SIM118

    def content(self, digest: str, suffix: str, *, remedy: str) -> bytes:
        """The bytes of an object. Raises UserError as `tensors` does."""
        path = self.path(digest, suffix)
        with _reading(path, remedy):
            content = path.read_bytes()
        _compare(path, hashlib.sha256(content).hexdigest(), digest, remedy)
        return content

    def files(self) -> Iterator[Path]:
        """The objects there are; files of other names are not ours."""
        return (path for path in self.folder.iterdir() if _OBJECT.fullmatch(path.name))

    def _put(self, pieces: Iterable[bytes | memoryview], suffix: str) -> str:
        return replace_file(self.folder, pieces, lambda digest: f"{digest}{suffix}")


def replace_file(folder: Path, pieces: Iterable[bytes | memoryview], name: Callable[[str], str]) -> str:
    """Write a file that has its name, a function of its sha256, once it is whole and on disk; returns the sha256.

    The name itself is on disk after `sync_folder(folder)`. Raises OSError of the disk and leaves nothing then.
    """
    digest = hashlib.sha256()
    unfinished = folder / f".{os.getpid()}.part"
    try:
        with unfinished.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, folder / name(digest.hexdigest()))
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return digest.hexdigest()


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes were writing in `folder`; the caller knows that nobody writes there now."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to disk; Windows does that by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the errors of the disk into one line; what was finished before stays whole."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{folder} cannot be written: {reason}. What is finished is whole; make room or mend it, and go on."
        ) from error


def json_values(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The values as JSON holds them: lists for tuples, strings as keys. Raises UserError for anything it cannot."""
    try:
        plain = json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} must be JSON without NaN and infinities: {error}.") from error
    if not isinstance(plain, dict):
        raise UserError(f"{what} must be a dictionary, got {type(values).__name__}.")
    return plain


def write_sealed(path: Path, content: Mapping[str, Any], *, kind: str) -> None:
    """Write JSON with its format, version and sha256 in place of what was there. Raises OSError of the disk."""
    full = {"format": kind, "version": VERSION, **content}
    text = json.dumps({**full, "sha256": _seal(full)}, indent=1, allow_nan=False) + "\n"
    replace_file(path.parent, (text.encode(),), lambda _: path.name)


def read_sealed(path: Path, *, kind: str, remedy: str) -> dict[str, Any]:
    """The content of a file of `write_sealed`.

    Raises UserError for a file that is missing, of a newer version, of another kind or not as it was written.
    """
    with _reading(path, remedy):
        raw = path.read_bytes()
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or was never a {kind} file; {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise UserError(f"{path} is damaged or was never a {kind} file; {remedy}")
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{path} has version {version} and this vidaccel reads up to {VERSION}; update vidaccel.")
    if content.pop("sha256", None) != _seal(content):
        raise UserError(f"{path} is damaged: it does not have its sha256; {remedy}")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _reading(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {remedy}") from error


def _compare(path: Path, computed: str, digest: str, remedy: str) -> None:
    if computed != digest:
        raise UserError(f"{path} is damaged: it does not have the sha256 it is named after; {remedy}")


def _checked(tensors: Mapping[str, Tensor]) -> list[_Saved]:
    """The tensors as they lie in the file. Raises UserError for what safetensors cannot hold."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"The tensor {name!r} ({tensor.dtype}, {tensor.layout}) cannot be saved as safetensors.")
    return file_order([_Saved(name, tuple(tensor.shape), tensor.dtype, tensor) for name, tensor in tensors.items()])


def _header(tensors: Sequence[_Saved], values: Mapping[str, Any]) -> bytes:
    text = json.dumps(json_values(values, "The values of a state"), sort_keys=True, separators=(",", ":"))
    return file_header(tensors, {"values": text})

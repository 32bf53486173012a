"""A store of records on disk: states, what was seen from them, and the teacher's targets, in shards of safetensors.

A shard is written whole, then the index that names it; a process that is killed in between leaves a file that the index
does not know and that the next shard of that number replaces. What is in the index stays.
Shapes: every tensor of a record is stacked along a first axis, one row a record.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_write
from vidaccel.files.differences import differences
from vidaccel.files.tensors import write_tensors
from vidaccel.files.text import write_json
from vidaccel.training.offline.fingerprint import TeacherFingerprint

INDEX_FILE = "targets.json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a collection took so far.

    teacher_forwards, student_forwards: passes over one chunk of one sample; guidance makes it two. seconds: of all.
    """

    teacher_forwards: int = 0
    student_forwards: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            teacher_forwards=self.teacher_forwards + other.teacher_forwards,
            student_forwards=self.student_forwards + other.student_forwards,
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class _Shard:
    file: str
    count: int
    num_bytes: int


@dataclass(kw_only=True)
class _Index:
    fingerprint: TeacherFingerprint
    collection: dict[str, Any]
    shards: list[_Shard] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


class TargetStore:
    """Records of one teacher and one collection; opened to read, or opened or begun to write."""

    def __init__(self, folder: Path) -> None:
        """Open what is there. Raises UserError where there is no store, or one whose files are not whole."""
        self.folder = folder
        self._index = _read_index(folder)
        for shard in self._index.shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.num_bytes:
                raise UserError(f"{path} is missing or cut short; remove {folder} and collect again.")

    @classmethod
    def begin(cls, folder: Path, fingerprint: TeacherFingerprint, collection: Mapping[str, Any]) -> "TargetStore":
        """The store to go on with: a new one, or the one that is there if teacher and collection are the same.

        collection: settings, as JSON holds them. Raises UserError where they differ.
        """
        settings = json.loads(json.dumps(dict(collection), allow_nan=False))
        if not (folder / INDEX_FILE).exists():
            _write_index(folder, _Index(fingerprint=fingerprint, collection=settings))
        store = cls(folder)
        known = {"teacher": store.fingerprint.to_dict(), **store.collection}
        if found := list(differences(known, {"teacher": fingerprint.to_dict(), **settings})):
            raise UserError(f"{folder} holds targets of another collection ({'; '.join(found)}); give another folder.")
        return store

    @property
    def fingerprint(self) -> TeacherFingerprint:
        """The teacher that the targets are of."""
        return self._index.fingerprint

    @property
    def collection(self) -> Mapping[str, Any]:
        """How the states were collected."""
        return self._index.collection

    @property
    def cost(self) -> Cost:
        """What it took."""
        return self._index.cost

    @property
    def num_shards(self) -> int:
        """Finished shards; the number of the next one."""
        return len(self._index.shards)

    @property
    def num_bytes(self) -> int:
        """Size on disk, without the index."""
        return sum(shard.num_bytes for shard in self._index.shards)

    def __len__(self) -> int:
        return sum(shard.count for shard in self._index.shards)

    def append(self, records: Mapping[str, Tensor], cost: Cost) -> None:
        """Write one shard, whole or not at all. Raises UserError where the disk does not take it."""
        (count,) = {len(tensor) for tensor in records.values()}
        name = f"targets-{self.num_shards:05d}.safetensors"
        with atomic_write(self.folder / name) as unfinished:
            with unfinished.open("wb") as file:
                write_tensors(file, records)
            shard = _Shard(file=name, count=count, num_bytes=unfinished.stat().st_size)
        index = _Index(
            fingerprint=self.fingerprint,
            collection=self._index.collection,
            shards=[*self._index.shards, shard],
            cost=self.cost + cost,
        )
        _write_index(self.folder, index)
        self._index = index

    def read(self, rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The records of these rows in their order, on the CPU; None: all. Raises UserError for a file cut short."""
        wanted = range(len(self)) if rows is None else rows
        if any(not 0 <= row < len(self) for row in wanted):
            raise IndexError(f"Rows must be from 0 to {len(self) - 1}.")
        places, parts = [], []
        start = 0
        for shard in self._index.shards:
            inside = [(place, row - start) for place, row in enumerate(wanted) if start <= row < start + shard.count]
            if inside:
                places += [place for place, _ in inside]
                parts.append(_rows(self.folder / shard.file, [row for _, row in inside], count=shard.count))
            start += shard.count
        order = torch.tensor(places, dtype=torch.long).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]} if parts else {}


def check_budget(records: int, record_bytes: int, max_bytes: int) -> None:
    """Raise UserError where that many records do not fit in `max_bytes`, before any work is done."""
    needed = records * record_bytes
    if needed > max_bytes:
        raise UserError(
            f"{records} states of {record_bytes / 1e6:.2f} MB are {needed / 1e9:.2f} GB, and `max_bytes` is "
            f"{max_bytes / 1e9:.2f} GB: {max_bytes // record_bytes} states fit. Collect fewer or allow more."
        )


def bytes_of(records: Mapping[str, Tensor]) -> int:
    """Bytes of one record among these."""
    return sum(math.prod(tensor.shape[1:]) * tensor.dtype.itemsize for tensor in records.values())


def _rows(path: Path, rows: list[int], *, count: int) -> dict[str, Tensor]:
    """Some rows of a shard; a shard that is wanted whole is read in one go, else only what is wanted."""
    try:
        with safe_open(path, framework="pt") as file:
            if rows == list(range(count)):
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: torch.cat([one[row : row + 1] for row in rows]) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove {path.parent} and collect again.") from error


def _read_index(folder: Path) -> _Index:
    path = folder / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise UserError(f"{path} is of version {content['version']}, this reads {_VERSION}; collect again.")
        return _Index(
            fingerprint=TeacherFingerprint.from_dict(content["teacher"]),
            collection=content["collection"],
            shards=[_Shard(**shard) for shard in content["shards"]],
            cost=Cost(**content["cost"]),
        )
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no targets ({INDEX_FILE} is missing); collect them first.") from error
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove {folder} and collect again.") from error


def _write_index(folder: Path, index: _Index) -> None:
    write_json(
        folder / INDEX_FILE,
        {
            "version": _VERSION,
            "teacher": index.fingerprint.to_dict(),
            "collection": index.collection,
            "cost": asdict(index.cost),
            "shards": [asdict(shard) for shard in index.shards],
        },
    )

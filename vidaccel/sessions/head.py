"""What a branch consists of, in one small file that is replaced whole: the commit of every append.

The chunks of a branch are the first lines of one journal, then of the next, and so on: its `spans`. A branch made from
another begins with the same spans and so costs a file of this kind only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vidaccel.errors import UserError
from vidaccel.sessions import MAIN
from vidaccel.sessions.store import read_sealed, write_sealed

_KIND = "vidaccel-branch"


@dataclass(frozen=True)
class Span:
    """The first `num_chunks` lines of a journal, the last of them with the sha256 `digest`."""

    journal: str
    num_chunks: int
    digest: str


@dataclass(frozen=True)
class Snapshot:
    """The object with the exact state after `num_chunks` chunks."""

    num_chunks: int
    state: str


@dataclass(frozen=True)
class Parent:
    """The branch that another one was made from, and how many of its chunks were taken and not given up since."""

    branch: str
    num_chunks: int


@dataclass(frozen=True)
class Head:
    """The chunks of a branch, its snapshots in order of their chunks, and where it came from."""

    spans: tuple[Span, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    parent: Parent | None = None

    @property
    def num_chunks(self) -> int:
        """Finished chunks."""
        return sum(span.num_chunks for span in self.spans)

    def ranges(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Where the chunks start, ..., stop - 1 stand: (journal, first line, line after the last)."""
        found = []
        first = 0
        for span in self.spans:
            begin, end = max(start, first), min(stop, first + span.num_chunks)
            if begin < end:
                found.append((span.journal, begin - first, end - first))
            first += span.num_chunks
        return found

    def cut(self, num_chunks: int, digest_of: Callable[[str, int], str]) -> Head:
        """The same branch with its first `num_chunks` chunks only; `digest_of` a journal's first lines."""
        spans = tuple(Span(journal, end, digest_of(journal, end)) for journal, _, end in self.ranges(0, num_chunks))
        kept = tuple(snapshot for snapshot in self.snapshots if snapshot.num_chunks <= num_chunks)
        parent = self.parent
        if parent is not None:
            parent = replace(parent, num_chunks=min(parent.num_chunks, num_chunks))
        return Head(spans=spans, snapshots=kept, parent=parent)


def write_head(path: Path, head: Head, *, identity: str) -> None:
    """Replace the file of a branch. Raises OSError of the disk; then the old one is still there."""
    write_sealed(path, {"session": identity, "num_chunks": head.num_chunks, **asdict(head)}, kind=_KIND)


def read_head(path: Path, *, identity: str) -> Head:
    """The head of a branch of the session `identity`.

    Raises UserError for a file that is missing, damaged, of a newer version or of another session.
    """
    remedy = "restore it from a copy."
    if path.stem != MAIN:
        remedy = "restore it from a copy, or remove it to give the branch up."
    content: dict[str, Any] = read_sealed(path, kind=_KIND, remedy=remedy)
    if content["session"] != identity:
        raise UserError(f"{path} and the session's own file are of two sessions; restore one of them from a copy.")
    return Head(
        spans=tuple(Span(**span) for span in content["spans"]),
        snapshots=tuple(Snapshot(**snapshot) for snapshot in content["snapshots"]),
        parent=None if content["parent"] is None else Parent(**content["parent"]),
    )

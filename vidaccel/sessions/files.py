"""What a session and its branches share: where their files lie, the branches' heads, and who may write."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vidaccel.errors import UserError
from vidaccel.sessions.head import Head, Snapshot, Span, read_head, write_head
from vidaccel.sessions.journal import Journal
from vidaccel.sessions.lock import WriterLock
from vidaccel.sessions.store import ObjectStore, sync_folder, writing

JOURNAL_SUFFIX = ".journal"
_JOURNAL = re.compile(rf".+\.\d+\{JOURNAL_SUFFIX}")


@dataclass(frozen=True)
class SnapshotRule:
    """Which exact states a branch keeps: the last ones, and those after every so many chunks (None: no more)."""

    keep_snapshots: int
    snapshot_every: int | None

    def __post_init__(self) -> None:
        if self.keep_snapshots < 1:
            raise UserError(
                f"`keep_snapshots` must be at least 1, got {self.keep_snapshots}; append no states for none."
            )
        if self.snapshot_every is not None and self.snapshot_every < 1:
            raise UserError(f"`snapshot_every` must be at least 1 chunk, or None; got {self.snapshot_every}.")

    def kept(self, snapshots: tuple[Snapshot, ...]) -> tuple[Snapshot, ...]:
        """Those of `snapshots`, oldest first, that stay."""
        recent = snapshots[-self.keep_snapshots :]
        every = self.snapshot_every
        return tuple(one for one in snapshots if one in recent or (every and one.num_chunks % every == 0))


class SessionFiles:
    """The files of one session; changed only within `change()` by the one process that has the lock.

    guard: held by the thread that changes or verifies; others wait for it.
    """

    def __init__(self, folder: Path, *, identity: str, lock: WriterLock | None, rule: SnapshotRule) -> None:
        self.folder = folder
        self.objects = ObjectStore(folder / "objects")
        self.states = ObjectStore(folder / "states")
        self.journals = folder / "journals"
        self.branches = folder / "branches"
        self.heads: dict[str, Head] = {}
        self.rule = rule
        self.lock = lock
        self.guard = threading.RLock()
        self._identity = identity
        self._journals: dict[str, Journal] = {}

    @contextmanager
    def change(self) -> Iterator[None]:
        """A block that writes, one thread after the other.

        Raises UserError for a session that is not open for writing by this process, or a full disk.
        """
        with self.guard, writing(self.folder):
            if self.lock is None:
                raise UserError(f"{self.folder} is not open for writing; open it again without `read_only`.")
            self.lock.check_process()
            yield

    def head(self, branch: str) -> Head:
        """The head of a branch. Raises UserError if there is none of that name."""
        if branch not in self.heads:
            raise UserError(f"There is no branch {branch!r} in {self.folder}; it has {', '.join(self.heads)}.")
        return self.heads[branch]

    def head_path(self, branch: str) -> Path:
        """Where the head of a branch lies."""
        return self.branches / f"{branch}.json"

    def load_heads(self, names: Iterable[str]) -> None:
        """Read the heads of all branches. Raises UserError if one is missing or damaged."""
        self.heads = {name: read_head(self.head_path(name), identity=self._identity) for name in names}

    def replace_head(self, branch: str, head: Head) -> None:
        """Commit a change of a branch, whole and on disk. Raises OSError of the disk."""
        write_head(self.head_path(branch), head, identity=self._identity)
        self.heads[branch] = head  # as soon as the file is there: should the next line fail, both agree
        sync_folder(self.branches)

    def journal(self, name: str) -> Journal:
        """A journal, whether it is there or not."""
        with self.guard:
            if name not in self._journals:
                self._journals[name] = Journal(self.journals / f"{name}{JOURNAL_SUFFIX}")
            return self._journals[name]

    def new_journal(self, branch: str) -> str:
        """Make an empty journal for a branch and return its name. Raises OSError of the disk."""
        taken = (f"{branch}.{number}" for number in itertools.count(1))
        name = next(name for name in taken if not self.journal(name).path.exists())
        self.journal(name).path.open("xb").close()
        sync_folder(self.journals)
        return name

    def is_continued(self, span: Span) -> bool:
        """Whether a branch has lines of this journal beyond the span; they must not be written over."""
        spans = itertools.chain.from_iterable(head.spans for head in self.heads.values())
        return any(other.journal == span.journal and other.num_chunks > span.num_chunks for other in spans)

    def remove_states(self, states: set[str]) -> None:
        """Remove those that no branch refers to; one that cannot be removed now is left for later."""
        used = {snapshot.state for head in self.heads.values() for snapshot in head.snapshots}
        for state in states - used:
            try:
                self.states.path(state).unlink(missing_ok=True)
            except OSError:
                continue

    def all_files(self) -> set[Path]:
        """Every object, state and journal, referred to or not."""
        journals = (path for path in self.journals.iterdir() if _JOURNAL.fullmatch(path.name))
        return {*self.objects.files(), *self.states.files(), *journals}

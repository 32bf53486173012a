"""The session of a rollout on disk: finished chunks, exact states, branches; nothing here knows a model.

    DIR/session.json                          settings that must agree to go on
    DIR/objects/SHA256.safetensors, .h264     latents and encoded frames of chunks, never changed
    DIR/states/SHA256.safetensors             exact states (large), removed when no branch needs them
    DIR/journals/NAME.N.journal               the chunks, one line each, appended
    DIR/branches/NAME.json                    which lines of which journals are the branch, and its states
    DIR/lock                                  process id of the writer

Appending a chunk writes its objects, then its line, then replaces the branch's file: that is the moment the chunk is
finished. What a killed process leaves beyond it does not count and is written over or collected later. An append costs
the chunk itself, one line and one small file, whatever the length of the video; the file has one entry for every state
that is kept, and one for every journal, of which a branch begins another where it left one that a branch goes on in.
In memory a chunk costs 8 bytes.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from vidaccel.errors import UserError
from vidaccel.files.differences import differences
from vidaccel.sessions import MAIN
from vidaccel.sessions.branch import Branch
from vidaccel.sessions.files import SessionFiles, SnapshotRule
from vidaccel.sessions.head import Head, Parent
from vidaccel.sessions.lock import LOCK_FILE, WriterLock
from vidaccel.sessions.store import json_values, read_sealed, remove_unfinished, sync_folder, write_sealed, writing

SESSION_FILE = "session.json"
_KIND = "vidaccel-session"
_FOLDERS = ("objects", "states", "journals", "branches")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


@dataclass(frozen=True)
class BranchSize:
    """Bytes on disk that only this branch refers to, and those that others refer to as well."""

    own_bytes: int
    shared_bytes: int


class Session:
    """A folder with the branches of one rollout. Made by `create` and `open`; ended by `close`, or use `with`.

    One that is open for writing keeps every other writer out, of this process too. Threads may share it: what they
    change is changed one after the other. Any number of readers see what was finished when they opened it, but for
    exact states that the writer has replaced since.
    """

    def __init__(self, files: SessionFiles, settings: Mapping[str, Any]) -> None:
        self.folder = files.folder
        self.settings = dict(settings)
        self._files = files

    @classmethod
    def create(
        cls,
        folder: str | Path,
        settings: Mapping[str, Any],
        *,
        keep_snapshots: int = 1,
        snapshot_every: int | None = None,
    ) -> Session:
        """Start a session, with the empty branch `main`, in a new or empty folder and open it for writing.

        settings: JSON values that must agree when the rollout goes on (model, seed, size, memory, sampler, fps).
        keep_snapshots, snapshot_every: of the exact states of a branch the last so many are kept, and besides them one
        after every so many chunks.

        Raises UserError for a folder that holds something already, a full disk and the like.
        """
        folder, rule = Path(folder), SnapshotRule(keep_snapshots, snapshot_every)
        content: dict[str, Any] = {
            "id": secrets.token_hex(16),
            "settings": json_values(settings, "The settings of a session"),
        }
        with ExitStack() as stack, writing(folder):
            _check_free(folder)
            folder.mkdir(parents=True, exist_ok=True)
            lock = WriterLock(folder)
            stack.callback(lock.close)
            _check_free(folder)  # once more: another process may have been faster
            _make_folders(folder)
            files = SessionFiles(folder, identity=content["id"], lock=lock, rule=rule)
            files.replace_head(MAIN, Head())
            write_sealed(folder / SESSION_FILE, content, kind=_KIND)
            sync_folder(folder)
            stack.pop_all()
        return cls(files, content["settings"])

    @classmethod
    def open(
        cls,
        folder: str | Path,
        settings: Mapping[str, Any] | None = None,
        *,
        read_only: bool = False,
        keep_snapshots: int = 1,
        snapshot_every: int | None = None,
    ) -> Session:
        """Open a session: for writing, unless `read_only`. The other arguments are those of `create`.

        Raises UserError if `settings` are given and differ from the session's (each differing value is named), if
        another process writes to it, for a folder that is no session, and for files that are missing, damaged or of a
        newer version. Nothing is changed then.
        """
        folder, rule = Path(folder), SnapshotRule(keep_snapshots, snapshot_every)
        content = _read_session_file(folder)
        if settings is not None:
            _check_settings(folder, content["settings"], json_values(settings, "The settings of a session"))
        with ExitStack() as stack, writing(folder):
            lock = None if read_only else WriterLock(folder)
            if lock is not None:
                stack.callback(lock.close)
            files = SessionFiles(folder, identity=content["id"], lock=lock, rule=rule)
            files.load_heads(_branch_names(files.branches))
            if lock is not None:
                _make_folders(folder)  # copies may leave empty folders out
            stack.pop_all()
        return cls(files, content["settings"])

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other writers in, after what a thread is writing; reading goes on to work."""
        with self._files.guard:
            if self._files.lock is not None:
                self._files.lock.close()
                self._files.lock = None

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of all branches, `main` first."""
        return tuple(self._files.heads)

    def branch(self, name: str = MAIN) -> Branch:
        """The branch of this name. Raises UserError if there is none or its journals are damaged."""
        return Branch(self._files, name)

    def new_branch(self, name: str, from_branch: str = MAIN, num_chunks: int | None = None) -> Branch:
        """Make a branch of the first `num_chunks` chunks (None: all) of another; nothing of them is copied.

        Raises UserError for a name that is taken or cannot be a file's, and for more chunks than there are.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"A branch's name has up to 64 letters, digits and inner `.`, `_`, `-`; got {name!r}.")
        with self._files.change():
            if name in self.branches or self._files.head_path(name).exists():
                raise UserError(f"There is a branch {name!r} in {self.folder} already; choose another name.")
            head = self.branch(from_branch).cut(num_chunks)
            self._files.replace_head(name, replace(head, parent=Parent(from_branch, head.num_chunks)))
        return self.branch(name)

    def rewind(self, name: str, num_chunks: int) -> Branch:
        """Give up all chunks of a branch but the first `num_chunks`; their files stay until `collect`.

        Raises UserError for more chunks than there are.
        """
        with self._files.change():
            self._files.replace_head(name, self.branch(name).cut(num_chunks))
        return self.branch(name)

    def collect(self) -> int:
        """Remove the objects, states and journals that no branch refers to; returns their bytes.

        Raises UserError, and removes nothing, if a branch cannot be read whole. Files of other names are left alone.
        """
        with self._files.change():
            unused = self._unused()
            freed = _bytes_on_disk(unused)
            for path in unused:
                path.unlink(missing_ok=True)
        return freed

    def sizes(self) -> dict[str, BranchSize]:
        """The size of every branch. Raises UserError if one cannot be read whole."""
        files = {name: self.branch(name).files() for name in self.branches}
        found = {}
        for name in self.branches:
            others = set().union(*(paths for other, paths in files.items() if other != name))
            found[name] = BranchSize(_bytes_on_disk(files[name] - others), _bytes_on_disk(files[name] & others))
        return found

    def unused_bytes(self) -> int:
        """What `collect` would free. Raises UserError if a branch cannot be read whole."""
        return _bytes_on_disk(self._unused())

    def _unused(self) -> set[Path]:
        return self._files.all_files() - set().union(*(self.branch(name).files() for name in self.branches))


def _make_folders(folder: Path) -> None:
    """Make the folders of a session, and remove what processes that were killed were writing there."""
    remove_unfinished(folder)
    for name in _FOLDERS:
        (folder / name).mkdir(exist_ok=True)
        remove_unfinished(folder / name)


def _branch_names(folder: Path) -> list[str]:
    """`main`, there or not, then the names of the others in order; files of other names are not ours."""
    names = {path.stem for path in folder.glob("*.json") if _NAME.fullmatch(path.stem)}
    return [MAIN, *sorted(names - {MAIN})]


def _read_session_file(folder: Path) -> dict[str, Any]:
    remedy = "give the folder of a session, or restore that file from a copy."
    return read_sealed(folder / SESSION_FILE, kind=_KIND, remedy=remedy)


def _check_free(folder: Path) -> None:
    """Refuse a folder that holds files; what a creation that was killed left behind is no hindrance."""
    if (folder / SESSION_FILE).exists():
        raise UserError(f"{folder} is a session already; open it to go on, or choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file and a session is a folder; choose another name.")
    expected = (folder / LOCK_FILE, folder / "branches" / f"{MAIN}.json")
    files = (path for path in folder.rglob("*") if path.is_file() and not path.match(".*.part"))
    if any(path not in expected for path in files):
        raise UserError(f"{folder} is not empty and has no {SESSION_FILE}; choose a new folder, or restore that file.")


def _check_settings(folder: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    if found := list(differences(stored, given)):
        raise UserError(
            f"{folder} was made with other settings: {'; '.join(found)}. "
            "Ask for the session's values, or start another session."
        )


def _bytes_on_disk(paths: set[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.exists())

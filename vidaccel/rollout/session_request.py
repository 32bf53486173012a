"""What is asked of the session that a rollout is kept in: which folder, which branch, from where. Loads no PyTorch.

The command line (`--checkpoint`, `--resume`, ...) and Python (`pipe.stream(session=..., resume=True, ...)`) ask here,
so that both refuse the same things in the same words, and each goes on with what the other began.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vidaccel.errors import UserError
from vidaccel.sessions import MAIN


@dataclass(frozen=True, kw_only=True)
class SessionRequest:
    """Where finished chunks are kept, and where a rollout goes on.

    Messages name the flags of the command line; `--resume` is `resume=True` in Python, and so on.

    folder: of the session. resume: go on in a session that there is.
    branch: of the session, to be written. branch_from: first make it of so many chunks of `from_branch`.
    rewind: first give up all chunks of the branch but so many, for good.
    snapshot_every: chunks between exact states, 0 for none; None: as many as their size suggests.

    Raises UserError for choices that do not go together.
    """

    folder: Path
    resume: bool = False
    branch: str = MAIN
    branch_from: int | None = None
    from_branch: str = MAIN
    rewind: int | None = None
    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("snapshot_every", "branch_from", "rewind"):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < 0):
                raise UserError(f"`{name}` must be a whole number of at least 0 chunks, got {count!r}.")
        if self.branch_from is not None and self.branch == MAIN:
            raise UserError("--branch-from makes a new branch; name it with --branch.")
        if self.branch_from is None and self.from_branch != MAIN:
            raise UserError("--from-branch is the branch that a new one begins with; say how far: --branch-from N.")
        if self.branch != MAIN and self.branch_from is None and not self.resume:
            raise UserError(f"Branch {self.branch!r} goes on with --resume, or begins with --branch-from.")
        if self.rewind is not None and (not self.resume or self.branch_from is not None):
            raise UserError("--rewind gives up chunks of a branch that goes on; give --resume and no --branch-from.")

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | None, **choices: Any) -> SessionRequest | None:
        """The session in a folder; None without one. Raises UserError for a choice that needs a folder."""
        if folder is not None:
            return cls(folder=Path(folder), **choices)
        usual = {field.name: field.default for field in fields(cls)}
        for name, choice in choices.items():
            if choice != usual[name]:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is about a saved session; give --checkpoint DIR (in Python `session`).")
        return None

    @property
    def is_new(self) -> bool:
        """Whether the session is to be started."""
        return not self.resume and self.branch_from is None

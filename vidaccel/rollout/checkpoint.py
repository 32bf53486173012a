"""The session that a rollout is kept in: whether it is to be there, what must agree, which branch, from where.

The command line (`--checkpoint`, `--resume`, ...) and Python (`pipe.stream(session=..., resume=True, ...)`) ask here,
so that both refuse the same things in the same words, and each goes on with what the other began.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vidaccel.errors import UserError
from vidaccel.files.text import plain_values
from vidaccel.memory import MemoryPolicy
from vidaccel.rollout.resume import check_prompts
from vidaccel.rollout.timeline import PromptChange
from vidaccel.sessions import MAIN
from vidaccel.sessions.branch import Branch
from vidaccel.sessions.session import SESSION_FILE, Session


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
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
        if self.snapshot_every is not None and self.snapshot_every < 0:
            raise UserError(f"`snapshot_every` must be at least 0 chunks, got {self.snapshot_every}.")
        if self.branch_from is not None and self.branch == MAIN:
            raise UserError("--branch-from makes a new branch; name it with --branch.")
        if self.branch_from is None and self.from_branch != MAIN:
            raise UserError("--from-branch is the branch that a new one begins with; say how far: --branch-from N.")
        if self.branch != MAIN and self.branch_from is None and not self.resume:
            raise UserError(f"Branch {self.branch!r} goes on with --resume, or begins with --branch-from.")
        if self.rewind is not None and (not self.resume or self.branch_from is not None):
            raise UserError("--rewind gives up chunks of a branch that goes on; give --resume and no --branch-from.")

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | None, **choices: Any) -> Checkpoint | None:
        """The checkpoint in a folder; None without one. Raises UserError for a choice that needs a folder."""
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

    def check(self) -> None:
        """Raise UserError where there is a session and should be none, or the other way round."""
        is_there = (self.folder / SESSION_FILE).exists()
        if self.is_new and is_there:
            raise UserError(f"{self.folder} is a session already; give --resume to go on, or another folder.")
        if not self.is_new and not is_there:
            raise UserError(f"There is no session in {self.folder}; leave out --resume and --branch-from to start one.")

    def open(
        self,
        settings: SessionSettings,
        planned: Sequence[PromptChange],
        *,
        num_chunks: int | None = None,
        num_given_chunks: int = 0,
    ) -> tuple[Session, Branch]:
        """The session for writing, and its branch made, rewound and compared with what is asked for.

        planned: the prompts, each with its first chunk. num_chunks: of the whole rollout, None for no end.
        num_given_chunks: what the video begins with; a branch that was interrupted within it begins again.

        Raises UserError as `check` and `Session.open` do, for a branch that is there or is not, and for one whose
        chunks were made with other prompts. Nothing is given up then.
        """
        self.check()
        if self.is_new:
            session = Session.create(self.folder, settings.to_dict())
            return session, session.branch(self.branch)
        with ExitStack() as stack:
            session = stack.enter_context(Session.open(self.folder, settings.to_dict()))
            branch = self._branch(session)
            kept = branch.num_chunks if self.rewind is None else min(branch.num_chunks, self.rewind)
            check_prompts(branch, planned, kept if num_chunks is None else min(kept, num_chunks))
            if 0 < kept < num_given_chunks:
                branch = session.rewind(self.branch, 0)
            elif self.rewind is not None:
                branch = session.rewind(self.branch, self.rewind)
            stack.pop_all()
        return session, branch

    def _branch(self, session: Session) -> Branch:
        is_there = self.branch in session.branches
        if self.branch_from is None or (is_there and self.resume):
            return session.branch(self.branch)
        if is_there:
            raise UserError(f"{self.folder} has a branch {self.branch!r}; give --resume to go on, or another name.")
        return session.new_branch(self.branch, self.from_branch, self.branch_from)


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """Everything that decides the pixels of a rollout but its prompts and its length; a session has them once.

    seeds: one for each video. model_digests: of the folders or the weights. start: as `start_settings` gives it.
    decoder: sha256 of a small decoder's file, "none" where nothing is decoded; None: the autoencoder.
    dtype: of the components, as `{"default": ..., "vae": ...}`. attention, passes: how the transformer is run.
    adapters: names and weights of what is loaded beside the model's own weights.
    """

    seeds: tuple[int, ...]
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float | None
    negative_prompt: str | Sequence[str] | None
    max_sequence_length: int
    model_digests: Sequence[str]
    memory: MemoryPolicy
    fps: float
    start: Mapping[str, Any]
    decoder: str | None
    device: str
    dtype: Mapping[str, torch.dtype]
    attention: str = "native"
    passes: str = "eager"
    adapters: Sequence[Any] = ()

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON; what is seldom used has no entry where it is not."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        seeds, start, adapters = (values.pop(name) for name in ("seeds", "start", "adapters"))
        dtype = {name: str(one).removeprefix("torch.") for name, one in self.dtype.items()}
        plain: dict[str, Any] = plain_values(
            {
                **values,
                **start,
                **({"adapters": adapters} if adapters else {}),
                "seed": seeds[0] if len(seeds) == 1 else seeds,
                "memory": self.memory.to_dict(),
                "dtype": dtype,
            }
        )
        return plain

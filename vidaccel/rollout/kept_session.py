"""The session that a rollout is kept in: whether it is there as asked for, its settings, and its branch, opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vidaccel.errors import UserError
from vidaccel.files.text import plain_values
from vidaccel.memory import MemoryPolicy
from vidaccel.rollout.branch_camera import check_camera
from vidaccel.rollout.camera import PlacedPath
from vidaccel.rollout.resume import check_prompts
from vidaccel.rollout.session_request import SessionRequest
from vidaccel.rollout.timeline import PromptChange
from vidaccel.sessions.branch import Branch
from vidaccel.sessions.session import SESSION_FILE, Session


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """Everything that decides the pixels of a rollout but its prompts and its length; a session has them once.

    seeds: one for each video. model_digests: of the folders or the weights. start: as `start_settings` gives it.
    decoder: sha256 of a small decoder's file, "none" where nothing is decoded; None: the autoencoder.
    dtype: of the components, as `{"default": ..., "vae": ...}`. attention, passes: how the transformer is run.
    adapters: names and weights of what is loaded beside the model's own weights. skip_steps: as `StepSkipping` is
    written, None where every step is computed.
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
    skip_steps: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON; what is seldom used has no entry where it is not."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        seeds, start, adapters, skip = (values.pop(name) for name in ("seeds", "start", "adapters", "skip_steps"))
        dtype = {name: str(one).removeprefix("torch.") for name, one in self.dtype.items()}
        plain: dict[str, Any] = plain_values(
            {
                **values,
                **start,
                **({"adapters": adapters} if adapters else {}),
                **({"skip_steps": skip} if skip else {}),
                "seed": seeds[0] if len(seeds) == 1 else seeds,
                "memory": self.memory.to_dict(),
                "dtype": dtype,
            }
        )
        return plain


def check_session(asked: SessionRequest) -> None:
    """Raise UserError where there is a session and should be none, or the other way round."""
    is_there = (asked.folder / SESSION_FILE).exists()
    if asked.is_new and is_there:
        raise UserError(f"{asked.folder} is a session already; give --resume to go on, or another folder.")
    if not asked.is_new and not is_there:
        raise UserError(f"There is no session in {asked.folder}; leave out --resume and --branch-from to start one.")


def open_session(
    asked: SessionRequest,
    settings: SessionSettings,
    planned: Sequence[PromptChange],
    *,
    num_chunks: int | None = None,
    num_given_chunks: int = 0,
    camera: PlacedPath | None = None,
) -> tuple[Session, Branch]:
    """The session for writing, and its branch made, rewound and compared with what is asked for.

    planned: the prompts, each with its first chunk. num_chunks: of the whole rollout, None for no end.
    num_given_chunks: what the video begins with; a branch that was interrupted within it begins again.
    camera: of the whole rollout, None for a student that is not told of one.

    Raises UserError as `check_session` and `Session.open` do, for a branch that is there or is not, and for one whose
    chunks were made with other prompts or another camera. Nothing is given up then.
    """
    check_session(asked)
    if asked.is_new:
        session = Session.create(asked.folder, settings.to_dict())
        return session, session.branch(asked.branch)
    _check_model(asked.folder, settings)
    with ExitStack() as stack:
        session = stack.enter_context(Session.open(asked.folder, settings.to_dict()))
        branch = _branch(asked, session)
        kept = branch.num_chunks if asked.rewind is None else min(branch.num_chunks, asked.rewind)
        compared = kept if num_chunks is None else min(kept, num_chunks)
        check_prompts(branch, planned, compared)
        check_camera(branch, camera, compared)
        if 0 < kept < num_given_chunks:
            branch = session.rewind(asked.branch, 0)
        elif asked.rewind is not None:
            branch = session.rewind(asked.branch, asked.rewind)
        stack.pop_all()
    return session, branch


def _check_model(folder: Path, settings: SessionSettings) -> None:
    """Raise UserError where the session is of another model: digests would tell that nobody anything."""
    with Session.open(folder, read_only=True) as there:
        is_same = there.settings.get("model_digests") == list(settings.model_digests)
    if not is_same:
        raise UserError(
            f"{folder} was made by another model, by other weights of this one, or by one that was put together in "
            "another way; go on with the one that began it, or start another session."
        )


def _branch(asked: SessionRequest, session: Session) -> Branch:
    is_there = asked.branch in session.branches
    if asked.branch_from is None or (is_there and asked.resume):
        return session.branch(asked.branch)
    if is_there:
        raise UserError(f"{asked.folder} has a branch {asked.branch!r}; give --resume to go on, or another name.")
    return session.new_branch(asked.branch, asked.from_branch, asked.branch_from)

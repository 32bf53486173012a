"""The latents of every frame of a shot, for frames that come back into the memory: cheap, and all that it takes.

The latents of a frame are many times smaller than its keys and values, which one clean pass gives back. They
are kept in main memory; of a rollout with a session, which has them on disk anyway, only the last few are.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from vidaccel.errors import UserError

if TYPE_CHECKING:
    from vidaccel.sessions.branch import Branch

_HELD_CHUNKS = 4  # in main memory beside a session, which may not have the last one or two yet


class LatentArchive:
    """Latents (B, C, H, W) on the host by frame of the shot."""

    def __init__(self) -> None:
        self._frames: dict[int, Tensor] = {}
        self._branch: Branch | None = None
        self._is_written = False
        self._shot_start = 0
        self._starts: list[int] = []  # first frames of the branch's chunks, in frames of the rollout

    @property
    def frames(self) -> Mapping[int, Tensor]:
        """What is in main memory."""
        return self._frames

    def read_from(self, branch: Branch, *, is_written: bool = False) -> None:
        """Read what is not in main memory from a branch.

        is_written: it gets every chunk from now on, so that only what it may not have yet stays in main memory.
        """
        self._branch, self._is_written, self._starts = branch, is_written, []

    def add(self, first: int, latents: Tensor) -> None:
        """Take the latents (B, C, F, H, W) of a chunk that begins with frame `first` of the shot; they are copied."""
        self._frames |= enumerate(latents.detach().to("cpu", copy=True).unbind(2), first)
        if self._is_written:
            held = _HELD_CHUNKS * latents.shape[2]
            self._frames = {frame: part for frame, part in self._frames.items() if frame >= first - held}

    def load(self, frames: Mapping[int, Tensor], *, shot_start: int) -> None:
        """Hold these frames and no others, of a shot that begins with frame `shot_start` of the rollout."""
        self._frames, self._shot_start = {frame: latents.cpu() for frame, latents in frames.items()}, shot_start

    def __getitem__(self, frame: int) -> Tensor:
        """The latents of a frame of the shot. Raises UserError where they are nowhere."""
        if frame in self._frames:
            return self._frames[frame]
        found = None if self._branch is None else self._read(self._branch, frame + self._shot_start)
        if found is None:
            raise UserError(
                f"The latents of frame {frame} are not at hand, and it comes back into the memory; go on with the "
                "session that has them, or begin anew."
            )
        return found

    def _read(self, branch: Branch, frame: int) -> Tensor | None:
        self._starts += [values["first_frame"] for values in branch.chunks(len(self._starts))]
        chunk = bisect.bisect(self._starts, frame) - 1
        if chunk < 0:
            return None
        latents, place = branch.latents(chunk)["latents"], frame - self._starts[chunk]
        return latents[:, :, place] if place < latents.shape[2] else None

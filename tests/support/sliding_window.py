"""The smallest memory policy: what the documentation shows under "Write a memory policy"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vidaccel.memory.entry import Entry, Part
from vidaccel.memory.policy import ChunkPass, MemoryPolicy, being_made


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(MemoryPolicy):
    """The last `window_frames` latent frames, the chunk that is being made among them, and nothing else."""

    window_frames: int
    chunk_frames: int = 3

    def __post_init__(self) -> None:
        if self.window_frames < self.chunk_frames:
            raise ValueError(f"`window_frames` must be at least {self.chunk_frames}; got {self.window_frames}.")

    @property
    def part_frames(self) -> Mapping[Part, int]:
        return {"fast": self.window_frames}

    def start(self) -> list[int]:
        return []

    def begin(self, kept: list[int], frames: range) -> list[int]:
        return [frame for frame in kept if frame >= frames.stop - self.window_frames]

    def commit(self, kept: list[int], done: ChunkPass) -> tuple[list[int], bool]:
        return [*kept, *done.frames], False

    def entries(self, kept: list[int], current: range) -> tuple[Entry, ...]:
        return (*(Entry(frame, "fast") for frame in kept), *being_made(current))


def read_sliding_window(text: str, chunk_frames: int) -> SlidingWindow | None:
    """The row of the table: `last:21` is a window of 21 frames."""
    return SlidingWindow(window_frames=int(text), chunk_frames=chunk_frames) if text.isdecimal() else None

"""The control of the recall benchmark: a memory that forgets certain frames and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vidaccel.memory import DepthMap, MemoryPolicy
from vidaccel.memory.entry import Entry, Part
from vidaccel.memory.policy import ChunkPass, Kept
from vidaccel.memory.retrieval import Retrieval


@dataclass(frozen=True, kw_only=True)
class MemoryWithout(MemoryPolicy):
    """Another memory, of which some frames are never attended to once their chunk is finished.

    They are left out and not replaced: what else is remembered, and which chunks are keyframes, is as it would be. The
    frames behind them move up, as positions have no gaps.
    memory: the other one. frames: that are left out. chunk_frames: as the other one's.
    """

    memory: MemoryPolicy
    frames: tuple[int, ...]
    chunk_frames: int

    @property
    def part_frames(self) -> Mapping[Part, int]:
        """Of the other."""
        return self.memory.part_frames

    @property
    def max_frames(self) -> int | None:
        """Of the other."""
        return self.memory.max_frames

    @property
    def uses_similarity(self) -> bool:
        """Of the other."""
        return self.memory.uses_similarity

    @property
    def retrieval(self) -> Retrieval | None:
        """Of the other."""
        return self.memory.retrieval

    def retrieve(self, kept: Kept, wanted: Sequence[int]) -> Kept:
        """Of the other, which is not asked for what is left out."""
        return self.memory.retrieve(kept, [frame for frame in wanted if frame not in self.frames])

    def depth_map(self, num_layers: int) -> DepthMap:
        """Of the other."""
        return self.memory.depth_map(num_layers)

    def start(self) -> Kept:
        """Of the other."""
        return self.memory.start()

    def begin(self, kept: Kept, frames: range) -> Kept:
        """Of the other."""
        return self.memory.begin(kept, frames)

    def commit(self, kept: Kept, done: ChunkPass) -> tuple[Kept, bool]:
        """Of the other."""
        return self.memory.commit(kept, done)

    def entries(self, kept: Kept, current: range) -> tuple[Entry, ...]:
        """Those of the other that are not left out; the chunk being made stays whole."""
        found = self.memory.entries(kept, current)
        return tuple(entry for entry in found if entry.frame in current or entry.frame not in self.frames)

    def check(self, kept: Kept, current: range) -> None:
        """As the other does."""
        self.memory.check(kept, current)

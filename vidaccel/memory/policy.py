"""What a memory policy is: it decides which frames of a video stay in reach of a causal student, with integers alone.

A policy is a frozen dataclass: its fields are settings, its methods are functions of what one sample of one rollout has
kept so far. `MemoryIndex` counts chunks and holds what is kept, `KeyValueMemory` lets keys and values follow. A chunk
goes through a policy like this, the frames of the chunk being 6, 7, 8:

    kept = policy.begin(kept, range(6, 9))         # who makes room?
    kept = policy.retrieve(kept, [1, 2])           # who comes back? Only with a `retrieval`
    policy.entries(kept, range(6, 9))              # what every pass over the chunk attends to, itself last
    kept, is_keyframe = policy.commit(kept, ChunkPass(range(6, 9), ...))    # after its clean pass
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol, Self, cast

from vidaccel.memory.depth import DepthMap
from vidaccel.memory.entry import Entry, Part, Source
from vidaccel.memory.retrieval import Retrieval

Kept = Any  # plain JSON values of a policy's own making: they are saved as they are, and never changed in place


class ChunkPass(NamedTuple):
    """One pass of the transformer over a chunk, as a policy sees it.

    frames: of the chunk. number: of the chunk, from 0. source: which pass; "clean" is the one at timestep 0, the last.
    similarity: cosine similarity of its keys with those of the chunk before, for policies with `uses_similarity`; None
        where there is no chunk before.
    """

    frames: range
    number: int
    source: Source
    similarity: float | None


class MemoryPolicy(Protocol):
    """The decisions of a memory. To be inherited from by a frozen dataclass; what is not abstract has a usual answer.

    chunk_frames: latent frames that are made together; a field of the dataclass. It must be what the student was made
        for, which is not compared.
    A class that leaves out an abstract method cannot be instantiated: a TypeError names what is missing.
    """

    chunk_frames: int

    @property
    @abstractmethod
    def part_frames(self) -> Mapping[Part, int]:
        """Most frames of each part of the memory ("sink", "slow", "fast").

        The chunk being made is counted in "fast", although its entries say "current".
        """
        ...

    @abstractmethod
    def start(self) -> Kept:
        """What is kept before the first chunk."""
        ...

    @abstractmethod
    def begin(self, kept: Kept, frames: range) -> Kept:
        """What is still kept when a chunk of `frames` begins: it needs `len(frames)` of the `total_frames` places."""
        ...

    @abstractmethod
    def commit(self, kept: Kept, done: ChunkPass) -> tuple[Kept, bool]:
        """What is kept after the clean pass over a chunk, and whether the chunk is a keyframe (reports show it)."""
        ...

    @abstractmethod
    def entries(self, kept: Kept, current: range) -> tuple[Entry, ...]:
        """The frames that a pass attends to, in the order of their positions; `current`, the chunk being made, last.

        Between chunks `current` is empty and begins where the next chunk will. A frame must have been an entry before,
        or be of the chunk just made; once left out, its keys are gone, unless `retrieval` lets frames come back.
        """
        ...

    @property
    def total_frames(self) -> int:
        """Most frames a student attends to, the chunk that is being made included: what buffers are reserved for."""
        return sum(self.part_frames.values())

    @property
    def max_frames(self) -> int | None:
        """Longest video; None for any length."""
        return None

    @property
    def uses_similarity(self) -> bool:
        """Whether `commit` wants the similarity of chunks, which is calculated for those that do."""
        return False

    @property
    def observes_passes(self) -> bool:
        """Whether noisy passes change what is kept, so that `observe` must be called."""
        return False

    @property
    def retrieval(self) -> Retrieval | None:
        """How frames that left are found again, for policies whose `retrieve` lets them come back; None: never."""
        return None

    def retrieve(self, kept: Kept, wanted: Sequence[int]) -> Kept:
        """What is kept once the frames `wanted` came back, or as many of them as there shall be, the first foremost.

        Asked after `begin`, where there is a `retrieval`; `wanted` may be empty.
        """
        del wanted
        return kept

    def depth_map(self, num_layers: int) -> DepthMap:
        """Which layer's remembered keys and values a layer reads: its own."""
        return DepthMap.every(1, num_layers)

    def observe(self, kept: Kept, done: ChunkPass) -> tuple[Kept, bool]:
        """As `commit`, for a noisy pass."""
        del done
        return kept, False

    def positions(self, kept: Kept, current: range) -> tuple[int, ...]:
        """The temporal RoPE position of each of `entries`, below `total_frames`: its place among them."""
        return tuple(range(len(self.entries(kept, current))))

    def check(self, kept: Kept, current: range) -> None:
        """Raise UserError if no rollout can have left `kept`; whether `entries` can be read was checked before."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON; sessions compare them."""
        return {"policy": type(self).__name__, **asdict(cast(Any, self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings of `to_dict`. Raises ValueError."""
        try:
            return cls(**{name: value for name, value in values.items() if name != "policy"})
        except TypeError as error:
            raise ValueError(str(error)) from error


def being_made(current: range) -> tuple[Entry, ...]:
    """The entries of the chunk that is being made."""
    return tuple(Entry(frame, "current", source=None) for frame in current)

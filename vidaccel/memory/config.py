"""Slow-fast memory as a policy (Context Forcing, arXiv 2602.06028, section 3.3), and the memories it includes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vidaccel.errors import check_count
from vidaccel.memory.clean import CleanParts
from vidaccel.memory.depth import DepthMap
from vidaccel.memory.entry import Entry, Part
from vidaccel.memory.official import OfficialParts
from vidaccel.memory.policy import ChunkPass, Kept, MemoryPolicy
from vidaccel.memory.retrieval import Retrieval
from vidaccel.memory.settings import SlowFastSettings


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(SlowFastSettings, MemoryPolicy):
    """Which frames a causal student can look back to; all sizes in latent frames.

    sink_frames: first frames of the video, kept for good (Ns).
    slow_frames: places for keyframes of the past; the oldest leaves when there is one too many (Nc).
    fast_frames: last frames, the chunk that is being made included, so at least `chunk_frames` (Nl). With exactly
        these and no slow memory a student sees the first frames only.
    chunk_frames: frames that are made together (F).
    keyframe_rule: a chunk is a keyframe if its keys are less similar to the previous chunk's than the threshold
        ("similarity"), at every `keyframe_interval`-th frame ("uniform"), or never ("none"). Chunks that start before
        frame `fast_frames` are never keyframes; without slow memory none are.
    similarity_threshold: a chunk whose cosine similarity is strictly below is a keyframe.
    keyframe_interval: frames between keyframes of the "uniform" rule. It is counted in whole chunks: a chunk is one if
        its number times `chunk_frames` is divisible, so that a short first chunk (an image) moves nothing.
    mode: "clean" (default) keeps the parts disjoint and in order of time and remembers what the clean pass wrote;
        "official" is the bookkeeping of the released code, see `vidaccel.memory.official`.
    prefill: with "linear" the places of slow memory extend the fast one as long as no keyframe needs them: nothing is
        forgotten in the first `total_frames` frames, and afterwards frames that are no keyframes leave first. The
        "official" mode fills its memory linearly anyway.
    keyframe_frames: most frames that are kept of a keyframe chunk, its first ones: what follows the keyframe itself
        stays as long as no keyframe needs its place.
    max_frames: longest video; a chunk beyond is refused. None for any length.
    depth_every: layers that share one memory: keys and values of every `depth_every`-th layer are kept, and the layers
        up to the next read those (`DepthMap.every`). For students that were trained so, or with routing.
    retrieve_by: whether frames that left come back into slow memory: "none", or those whose camera saw what the coming
        chunk will see ("view"), or of earlier chunks that the last one resembles ("keys"); `keyframe_frames` of what is
        coming are to be in reach. See `vidaccel.memory.retrieval`. It takes their latents, which are kept outside.
    retrieved_frames: places of slow memory that they may take at most, None for half of them; they stay until others
        come back.

    Raises ValueError for a value outside these choices.
    """

    @property
    def part_frames(self) -> Mapping[Part, int]:
        """Places of the three parts."""
        return {"sink": self.sink_frames, "slow": self.slow_frames, "fast": self.fast_frames}

    @property
    def uses_similarity(self) -> bool:
        """Whether keyframes depend on it, or what comes back."""
        return self.keyframe_rule == "similarity" or self.retrieve_by == "keys"

    @property
    def retrieval(self) -> Retrieval | None:
        """How frames come back, if they do."""
        if self.retrieve_by == "none":
            return None
        return Retrieval(
            by=self.retrieve_by,
            num_frames=self.most_retrieved,
            depth=self.keyframe_frames,
            threshold=self.similarity_threshold,
        )

    @property
    def observes_passes(self) -> bool:
        """Whether noisy passes are remembered."""
        return self.mode == "official"

    @property
    def _parts(self) -> CleanParts | OfficialParts:
        return CleanParts(self) if self.mode == "clean" else OfficialParts(self)

    def depth_map(self, num_layers: int) -> DepthMap:
        """Groups of `depth_every` layers."""
        return DepthMap.every(self.depth_every, num_layers)

    def start(self) -> Kept:
        """Nothing, in the form of the mode."""
        return self._parts.start()

    def begin(self, kept: Kept, frames: range) -> Kept:
        """Make room for a chunk."""
        return self._parts.begin(kept, frames)

    def observe(self, kept: Kept, done: ChunkPass) -> tuple[Kept, bool]:
        """Remember a noisy pass, in the official mode."""
        return self._parts.run(kept, done, self._is_keyframe(done))

    def commit(self, kept: Kept, done: ChunkPass) -> tuple[Kept, bool]:
        """Remember the clean pass, and whether the chunk is a keyframe."""
        return self._parts.run(kept, done, self._is_keyframe(done))

    def retrieve(self, kept: Kept, wanted: Sequence[int]) -> Kept:
        """Let frames that left come back into slow memory."""
        parts = self._parts
        assert isinstance(parts, CleanParts), "only the clean mode retrieves"
        return parts.retrieve(kept, wanted)

    def entries(self, kept: Kept, current: range) -> tuple[Entry, ...]:
        """Sink, slow, fast, current."""
        return self._parts.entries(kept, current)

    def positions(self, kept: Kept, current: range) -> tuple[int, ...]:
        """The place of each entry, but for odd sizes in the official mode."""
        return self._parts.positions(kept, current)

    def check(self, kept: Kept, current: range) -> None:
        """Raise UserError if no rollout can have left `kept`."""
        self._parts.check(kept, current)

    def _is_keyframe(self, done: ChunkPass) -> bool:
        if done.frames.start < self.fast_frames or not self.slow_frames:
            return False
        if self.keyframe_rule == "uniform":
            return done.number * self.chunk_frames % self.keyframe_interval == 0
        if done.similarity is None or self.keyframe_rule == "none":
            return False
        return done.similarity < self.similarity_threshold

    # Other memories as slow-fast ones

    @classmethod
    def sliding_window(cls, window_frames: int, chunk_frames: int = 3) -> MemoryConfig:
        """The last `window_frames` frames and nothing else (Self-Forcing: 21)."""
        return cls(
            sink_frames=0,
            slow_frames=0,
            fast_frames=window_frames,
            chunk_frames=chunk_frames,
            keyframe_rule="none",
        )

    @classmethod
    def sink_and_window(cls, sink_frames: int = 3, window_frames: int = 9, chunk_frames: int = 3) -> MemoryConfig:
        """The first and the last frames (LongLive: 3 and 9, the chunk being made included)."""
        return cls(
            sink_frames=sink_frames,
            slow_frames=0,
            fast_frames=window_frames,
            chunk_frames=chunk_frames,
            keyframe_rule="none",
        )

    @classmethod
    def full(cls, num_frames: int, chunk_frames: int = 3) -> MemoryConfig:
        """Every frame of a video of at most `num_frames` frames; a chunk beyond them is refused."""
        check_count("chunk_frames", chunk_frames, minimum=1)
        check_count("num_frames", num_frames, minimum=1)
        return cls(
            sink_frames=0,
            slow_frames=0,
            fast_frames=math.ceil(num_frames / chunk_frames) * chunk_frames,
            chunk_frames=chunk_frames,
            keyframe_rule="none",
            max_frames=num_frames,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON; without the name of a policy, as sessions of 0.3.0 have them.

        Without `depth_every` too, where it is 1, and without what is said of retrieval, where there is none.
        """
        values = asdict(self)
        usual = {"depth_every"} if self.depth_every == 1 else set()
        usual |= {"retrieve_by", "retrieved_frames"} if self.retrieve_by == "none" else set()
        return {name: value for name, value in values.items() if name not in usual}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryConfig:
        """The settings of `to_dict`; missing keys take their defaults. Raises ValueError, for an unknown name too."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise ValueError(f"The settings of a memory must be names with values; got {values!r}.")
        unknown = sorted(str(name) for name in values if name not in names)
        if unknown:
            raise ValueError(f"A memory has no setting {unknown[0]!r}; it has {', '.join(names)}.")
        return cls(**values)

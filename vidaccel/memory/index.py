"""Which frames a causal student remembers, chunk by chunk: plain integers, no tensors.

Paper: Context Forcing, arXiv 2602.06028, section 3.3. One index belongs to one sample of one rollout. It decides; the
keys and values of the frames it names are somebody else's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vidaccel.errors import UserError
from vidaccel.memory.clean import CleanParts, Entry, Part
from vidaccel.memory.config import MemoryConfig

Similarity = float | Sequence[float | None] | None


class MemoryIndex:
    """The frames in sink, slow and fast memory of one rollout, and their positions.

    Per chunk: `begin_chunk`, any number of denoising passes, `commit` after the clean pass. Between the first and the
    last the frames of `current` are being made and see themselves and all others in `entries`.
    """

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        self._parts = CleanParts(config)
        self._num_frames = 0
        self._num_chunks = 0
        self._current = range(0)
        self._is_keyframe = False

    @property
    def num_frames(self) -> int:
        """Finished frames of the video."""
        return self._num_frames

    @property
    def is_keyframe(self) -> bool:
        """Whether the last finished chunk is a keyframe."""
        return self._is_keyframe

    @property
    def current(self) -> tuple[int, ...]:
        """Frames of the chunk that is being made; empty between chunks."""
        return tuple(self._current)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The frames a pass attends to, in the order of their positions: sink, slow, fast, current."""
        return self._parts.entries(self._num_frames, self._current)

    @property
    def positions(self) -> tuple[int, ...]:
        """The temporal RoPE position of each of `entries`; the queries have those of the chunk that is being made."""
        return tuple(range(len(self.entries)))

    @property
    def sink(self) -> tuple[int, ...]:
        """Frames in the sink."""
        return self._frames_of("sink")

    @property
    def slow(self) -> tuple[int, ...]:
        """Frames in slow memory."""
        return self._frames_of("slow")

    @property
    def fast(self) -> tuple[int, ...]:
        """Frames in fast memory, without the chunk that is being made."""
        return self._frames_of("fast")

    def _frames_of(self, part: Part) -> tuple[int, ...]:
        return tuple(entry.frame for entry in self.entries if entry.part == part)

    def begin_chunk(self, num_frames: int | None = None) -> None:
        """Starts a chunk of `num_frames` frames (1 to `chunk_frames`; None for all) and makes room for it.

        A chunk that was begun and not committed starts again, with as many frames as before. Raises UserError for
        another number of frames and for a chunk that goes beyond `max_frames`.
        """
        count = self._checked_size(self.config.chunk_frames if num_frames is None else num_frames)
        self._current = range(self._num_frames, self._num_frames + count)
        self._parts.begin(count)

    def commit(self, similarity: Similarity = None) -> None:
        """Ends a chunk after its clean pass: it is remembered and, if the rule says so, marked as a keyframe.

        similarity: cosine similarity of its keys to the previous chunk's, for the rule "similarity"; without it the
            chunk is no keyframe. The values of all passes in their order may be given, the clean pass's last.
        Raises UserError for a similarity that is no finite number and RuntimeError without a chunk.
        """
        if not self._current:
            raise RuntimeError("There is no chunk to commit; call `begin_chunk` first.")
        values = similarity if isinstance(similarity, Sequence) else [similarity]
        self._is_keyframe = self._decides(values[-1])
        self._parts.commit(self._current, self._is_keyframe)
        self._num_frames = self._current.stop
        self._num_chunks += 1
        self._current = range(0)

    def _decides(self, similarity: float | None) -> bool:
        if similarity is not None and not math.isfinite(similarity):
            raise UserError(f"The similarity of two chunks must be a finite number; got {similarity}.")
        config = self.config
        if self._current.start < config.fast_frames or not config.slow_frames:
            return False
        if config.keyframe_rule == "uniform":
            return self._num_chunks * config.chunk_frames % config.keyframe_interval == 0
        return (
            config.keyframe_rule == "similarity" and similarity is not None and similarity < config.similarity_threshold
        )

    def _checked_size(self, count: int) -> int:
        most, longest = self.config.chunk_frames, self.config.max_frames
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= most:
            raise UserError(f"A chunk must have 1 to {most} frames (`chunk_frames`); got {count!r}.")
        if self._current and count != len(self._current):
            raise UserError(
                f"The chunk at frame {self._num_frames} was begun with {len(self._current)} frames; got {count}."
            )
        if longest is not None and self._num_frames + count > longest:
            raise UserError(
                f"This memory is for at most {longest} frames; the next chunk would end at frame "
                f"{self._num_frames + count}. Take a larger or a sliding one."
            )
        return count

"""Which frames a causal student remembers, chunk by chunk: plain integers, no tensors.

One index belongs to one sample of one rollout. It counts, a `MemoryPolicy` decides, and the keys and values of the
frames that it names are somebody else's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vidaccel.errors import UserError
from vidaccel.memory.entry import Entry, Part, Source
from vidaccel.memory.policy import ChunkPass, MemoryPolicy

_COUNTS = ("num_frames", "num_chunks", "num_current", "num_passes")
_FLAGS = ("is_keyframe", "is_marked")


class MemoryIndex:
    """The frames in sink, slow and fast memory of one rollout, and their positions.

    Per chunk: `begin_chunk`, `observe` for each denoising pass, `commit` for the clean pass. In between the frames of
    `current` are being made, and a pass over them attends to `entries`. Where the policy does not observe passes,
    `observe` may be left out. Where it does (the official mode), each pass may copy frames of the chunk to slow memory
    before it attends: after `observe` (or `commit`) of a pass `entries` and `positions` are what that pass attends to.
    """

    def __init__(self, policy: MemoryPolicy) -> None:
        self.policy = policy
        self._kept = policy.start()
        self._num_frames = 0
        self._num_chunks = 0
        self._num_passes = 0
        self._current = range(0)
        self._is_keyframe = False
        self._begun = self._kept  # what was kept when the chunk began, before frames came back
        self._became_keyframe = False  # whether a pass over the current chunk made it a keyframe

    @property
    def num_frames(self) -> int:
        """Finished frames of the video."""
        return self._num_frames

    @property
    def is_keyframe(self) -> bool:
        """Whether the last finished chunk is a keyframe ("official": whether it was copied to slow memory)."""
        return self._is_keyframe

    @property
    def current(self) -> tuple[int, ...]:
        """Frames of the chunk that is being made; empty between chunks."""
        return tuple(self._current)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The frames a pass attends to, in the order of their positions: sink, slow, fast, current."""
        return self.policy.entries(self._kept, self._now)

    @property
    def positions(self) -> tuple[int, ...]:
        """The temporal RoPE position of each of `entries`, from 0 to `total_frames` - 1."""
        return self.policy.positions(self._kept, self._now)

    @property
    def _now(self) -> range:
        """The chunk that is being made; between chunks nothing, where the next one will begin."""
        return self._current or range(self._num_frames, self._num_frames)

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

        A chunk that was begun and not committed starts again, with as many frames as before; what "official" passes
        copied to slow memory stays, what came back for it does not. Raises UserError for another number of frames and
        for a chunk that goes beyond `max_frames`.
        """
        count = self._checked_size(self.policy.chunk_frames if num_frames is None else num_frames)
        self._num_passes = 0
        if not self._current:
            frames = range(self._num_frames, self._num_frames + count)
            self._kept = self.policy.begin(self._kept, frames)
            self._current, self._became_keyframe = frames, False
            self._begun = self._kept
        elif self.policy.retrieval is not None:
            self._kept = self._begun

    def retrieve(self, wanted: Sequence[int]) -> None:
        """Lets frames that left come back for the chunk that was begun, if the policy takes them."""
        if self.policy.retrieval is not None:
            self._kept = self.policy.retrieve(self._kept, wanted)

    def observe(self, similarity: float | None = None) -> None:
        """Counts a denoising pass over the chunk. Arguments and errors are those of `commit`."""
        self._run(similarity, self._num_passes)
        self._num_passes += 1

    def commit(self, similarity: float | Sequence[float | None] | None = None) -> None:
        """Ends a chunk with its clean pass: it is remembered and, if the rule says so, a keyframe.

        similarity: cosine similarity of the keys of this pass to those before, for the rule "similarity": in "clean"
            mode to the previous chunk's clean pass, in "official" mode to the previous pass. None is no keyframe. A
            sequence stands for `observe` with each of its values and `commit` with the last.
        Raises UserError for a similarity that is no finite number and RuntimeError without a chunk.
        """
        values = similarity if isinstance(similarity, Sequence) else (similarity,)
        for value in values:
            _check_similarity(value)
        for value in values[:-1]:
            self.observe(value)
        self._run(values[-1] if values else None, "clean")
        self._is_keyframe = self._became_keyframe
        self._num_frames = self._current.stop
        self._num_chunks += 1
        self._num_passes = 0
        self._current = range(0)

    def state(self) -> dict[str, Any]:
        """Everything as plain values for JSON; what it takes does not grow with the video."""
        return {
            "config": self.policy.to_dict(),
            "num_frames": self._num_frames,
            "num_chunks": self._num_chunks,
            "num_current": len(self._current),
            "num_passes": self._num_passes,
            "is_keyframe": self._is_keyframe,
            "is_marked": self._became_keyframe,
            "parts": self._begun if self._current and self.policy.retrieval is not None else self._kept,
        }

    @classmethod
    def from_state(cls, policy: MemoryPolicy, state: Mapping[str, Any]) -> MemoryIndex:
        """The index that goes on where `state()` was taken. Raises UserError for other settings or a damaged state."""
        if not isinstance(state, Mapping) or set(state) != {"config", "parts", *_COUNTS, *_FLAGS}:
            raise UserError("This is not the saved index of a memory; take one that `MemoryIndex.state` made.")
        _check_is_of(policy, state["config"])
        try:
            saved = type(policy).from_dict(state["config"])
        except ValueError as error:
            raise UserError(f"The settings of the saved index are damaged: {error}") from error
        for name in {**saved.to_dict(), **policy.to_dict()}:
            old, new = (one.to_dict().get(name, getattr(one, name, None)) for one in (saved, policy))
            if old != new:
                raise UserError(f"The memory was saved with `{name}` {old!r}; now it is {new!r}. Take the same.")
        index = cls(policy)
        try:
            index._load_state(state)
        except UserError as error:
            raise UserError(f"The saved index of the memory is damaged: {error}. Take an older one.") from error
        return index

    def _load_state(self, state: Mapping[str, Any]) -> None:
        num_frames, num_chunks, num_current, num_passes = (state[name] for name in _COUNTS)
        for name in (*_COUNTS, *_FLAGS):
            if type(state[name]) is not (int if name in _COUNTS else bool) or state[name] < 0:
                raise UserError(f"{name} is {state[name]!r}")
        most = self.policy.chunk_frames
        if not num_chunks <= num_frames <= num_chunks * most or num_current > most or (num_passes and not num_current):
            raise UserError(f"{num_chunks} chunks of at most {most} frames are not {num_frames} frames")
        current, kept = range(num_frames, num_frames + num_current), state["parts"]
        try:
            self.policy.check(kept, current)
            entries = self.policy.entries(kept, current)
            fits = len(entries) <= self.policy.total_frames and all(
                0 <= entry.frame < current.stop for entry in entries
            )
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"what it keeps cannot be read ({type(error).__name__})") from error
        if not fits:
            raise UserError("it holds more frames than there is place for, or one that does not exist yet")
        self._num_frames, self._num_chunks, self._num_passes = num_frames, num_chunks, num_passes
        self._current, self._kept, self._begun = current, kept, kept
        self._is_keyframe, self._became_keyframe = (state[name] for name in _FLAGS)

    def _run(self, similarity: float | None, source: Source) -> None:
        if not self._current:
            raise RuntimeError("No chunk was begun; call `begin_chunk` before its passes.")
        _check_similarity(similarity)
        done = ChunkPass(self._current, self._num_chunks, source, similarity)
        name = "commit" if source == "clean" else "observe"
        kept, is_keyframe = _checked_decision(self.policy, name, getattr(self.policy, name)(self._kept, done))
        self._kept, self._became_keyframe = kept, self._became_keyframe or is_keyframe

    def _checked_size(self, count: int) -> int:
        most, longest = self.policy.chunk_frames, self.policy.max_frames
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= most:
            raise UserError(f"A chunk must have 1 to {most} frames (`chunk_frames`); got {count!r}.")
        begun = len(self._current)
        if begun and count != begun:
            raise UserError(f"The chunk at frame {self._num_frames} was begun with {begun} frames; got {count}.")
        end = self._num_frames + count
        if longest is not None and end > longest:
            raise UserError(
                f"This memory is for {longest} frames at most, and a chunk would end at frame {end}. "
                f"Take one for more frames or a sliding window."
            )
        return count


def _check_is_of(policy: MemoryPolicy, settings: object) -> None:
    """Raise UserError for the settings of another policy; those of slow-fast memory have no name (`to_dict`)."""
    if isinstance(settings, Mapping):
        before, now = (values.get("policy", "MemoryConfig") for values in (settings, policy.to_dict()))
        if before != now:
            raise UserError(f"The memory was saved by the policy {before}; now it is {now}. Take the same.")


def _checked_decision(policy: MemoryPolicy, method: str, decision: Any) -> tuple[Any, bool]:
    if not isinstance(decision, tuple) or len(decision) != 2 or not isinstance(decision[1], bool):
        raise UserError(
            f"The memory policy {type(policy).__name__} cannot be used: its `{method}` gives {str(decision)[:80]}; it "
            "must give what is kept and whether the chunk is a keyframe."
        )
    return decision


def _check_similarity(similarity: float | None) -> None:
    if similarity is not None and not math.isfinite(similarity):
        raise UserError(f"The similarity of two chunks must be a finite number; got {similarity}.")

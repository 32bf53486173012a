"""The recommended bookkeeping of slow and fast memory: disjoint parts, in order of time, changed once per chunk.

Paper: Context Forcing, arXiv 2602.06028, section 3.3. A keyframe is marked when its chunk is finished and moves to slow
memory when it leaves the fast one, so no frame is in two parts and all that is remembered is from the clean pass.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vidaccel.memory.config import MemoryConfig

Part = Literal["sink", "slow", "fast", "current"]
Source = int | Literal["clean"] | None


class Entry(NamedTuple):
    """One latent frame that a chunk attends to.

    frame: index of the frame in the video.
    part: where it is remembered; "current" is the chunk that is being made.
    is_copy: whether it was copied to slow memory before its chunk was finished ("official" mode only).
    source: which pass over its chunk its keys and values are from: 0, 1, ... a denoising pass, "clean" the pass over
        the finished chunk, None the pass that is to come.
    """

    frame: int
    part: Part
    is_copy: bool = False
    source: Source = "clean"


class Mark(NamedTuple):
    """A remembered frame and whether it is a keyframe."""

    frame: int
    is_keyframe: bool


class CleanParts:
    """Slow and fast memory; which frames are in the sink follows from the number of frames."""

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self.slow: list[Mark] = []
        self.fast: list[Mark] = []

    def begin(self, num_frames: int) -> None:
        """Makes room for a chunk: what leaves fast memory goes to slow memory if it is a keyframe, else it is lost."""
        config = self._config
        while self.fast and len(self.fast) + num_frames > config.fast_frames:
            oldest = self.fast.pop(0)
            if oldest.is_keyframe or config.prefill == "linear":
                self.slow.append(oldest)
        while len(self.slow) > config.slow_frames:
            surplus = next((mark for mark in self.slow if not mark.is_keyframe), self.slow[0])
            self.slow.remove(surplus)

    def commit(self, frames: range, is_keyframe: bool) -> None:
        """Remembers a finished chunk: the first frames of the video in the sink, all others in fast memory."""
        for number, frame in enumerate(frames):
            if frame >= self._config.sink_frames:
                self.fast.append(Mark(frame, is_keyframe and number < self._config.keyframe_frames))

    def entries(self, num_frames: int, current: range) -> tuple[Entry, ...]:
        """What a pass attends to, in the order of the positions, when `num_frames` frames are finished."""
        sink = range(min(num_frames, self._config.sink_frames))
        return (
            *(Entry(frame, "sink") for frame in sink),
            *(Entry(mark.frame, "slow") for mark in self.slow),
            *(Entry(mark.frame, "fast") for mark in self.fast),
            *(Entry(frame, "current", source=None) for frame in current),
        )

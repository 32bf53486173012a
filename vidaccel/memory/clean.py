"""The recommended bookkeeping of slow and fast memory: disjoint parts, in order of time, changed once per chunk.

Paper: Context Forcing, arXiv 2602.06028, section 3.3. A keyframe is marked when its chunk is finished and moves to slow
memory when it leaves the fast one, so no frame is in two parts and all that is remembered is from the clean pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vidaccel.errors import UserError
from vidaccel.memory.config import MemoryConfig
from vidaccel.memory.entry import Entry, Source


class Mark(NamedTuple):
    """A remembered frame and whether it is a keyframe."""

    frame: int
    is_keyframe: bool


class CleanParts:
    """Slow and fast memory; which frames are in the sink follows from the number of frames."""

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._slow: list[Mark] = []
        self._fast: list[Mark] = []

    def begin(self, frames: range) -> None:
        """Makes room for a chunk: what leaves fast memory goes to slow memory if it is a keyframe, else it is lost."""
        config, slow, fast = self._config, list(self._slow), list(self._fast)
        while fast and len(fast) + len(frames) > config.fast_frames:
            oldest = fast.pop(0)
            if oldest.is_keyframe or config.prefill == "linear":
                slow.append(oldest)
        while len(slow) > config.slow_frames:
            surplus = next((mark for mark in slow if not mark.is_keyframe), slow[0])
            slow.remove(surplus)
        self._slow, self._fast = slow, fast

    def run(self, frames: range, is_keyframe: bool, source: Source) -> bool:
        """One pass over a chunk; only the clean one is remembered. Returns whether it made the chunk a keyframe.

        The first frames of the video go to the sink and stay there, all others to fast memory.
        """
        if source != "clean":
            return False
        new = [
            Mark(frame, is_keyframe and number < self._config.keyframe_frames)
            for number, frame in enumerate(frames)
            if frame >= self._config.sink_frames
        ]
        self._fast = [*self._fast, *new]
        return is_keyframe

    def entries(self, num_frames: int, current: range) -> tuple[Entry, ...]:
        """What a pass attends to, in the order of the positions, when `num_frames` frames are finished."""
        sink = range(min(num_frames, self._config.sink_frames))
        return (
            *(Entry(frame, "sink") for frame in sink),
            *(Entry(mark.frame, "slow") for mark in self._slow),
            *(Entry(mark.frame, "fast") for mark in self._fast),
            *(Entry(frame, "current", source=None) for frame in current),
        )

    def positions(self, num_frames: int, current: range) -> tuple[int, ...]:
        """The position of each entry: its place among them."""
        return tuple(range(len(self.entries(num_frames, current))))

    def query_positions(self, num_frames: int, current: range) -> tuple[int, ...]:
        """The positions of the chunk that is being made: the last ones."""
        positions = self.positions(num_frames, current)
        return positions[len(positions) - len(current) :]

    def state(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"slow": [list(mark) for mark in self._slow], "fast": [list(mark) for mark in self._fast]}

    def load_state(self, values: dict[str, Any], num_frames: int, current: range) -> None:
        """Takes over `state()`; raises UserError if no rollout can have left it."""
        config = self._config
        if set(values) != {"slow", "fast"}:
            raise UserError("slow and fast memory are missing")
        slow, fast = (_marks(values[part]) for part in ("slow", "fast"))
        remembered = [mark.frame for mark in (*slow, *fast)]
        if remembered != sorted(set(remembered)) or any(frame < config.sink_frames for frame in remembered):
            raise UserError("its frames are not in order")
        if [mark.frame for mark in fast] != list(range(num_frames - len(fast), num_frames)):
            raise UserError("fast memory does not hold the last frames")
        if len(slow) > config.slow_frames or len(fast) + len(current) > config.fast_frames:
            raise UserError("it holds more frames than there is place for")
        if config.prefill == "none" and not all(mark.is_keyframe for mark in slow):
            raise UserError("slow memory holds a frame that is no keyframe")
        self._slow, self._fast = slow, fast


def _marks(values: object) -> list[Mark]:
    marks = []
    for value in values if isinstance(values, list) else [None]:
        match value:
            case [int(frame), bool(is_keyframe)] if not isinstance(frame, bool):
                marks.append(Mark(frame, is_keyframe))
            case _:
                raise UserError(f"a remembered frame is {value!r}")
    return marks

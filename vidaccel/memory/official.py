"""The bookkeeping of slow and fast memory as in the released code of Context Forcing, with all that is odd about it.

Followed: one self-attention layer of wan/modules/causal_model.py in TIGER-AI-Lab/Context-Forcing (commit 1b94149), for
checkpoints and comparisons; `vidaccel.memory.clean` is what to use otherwise. What is odd: a chunk is copied to slow
memory by the first pass that asks for it, so mostly from the noisiest one, and never refreshed; while the memory fills
the copies overwrite the oldest linear frames, so that slow memory is out of order and shares frames with the fast one;
with sizes that `chunk_frames` does not divide the last places stay empty and a position is left out; a copy of more
than one frame is not recognised by later passes and is made again, and may push empty places among the used ones. These
the released code attends to as zeros; here they are left out, with their positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vidaccel.errors import UserError
from vidaccel.memory.entry import Entry, Part, Source
from vidaccel.memory.policy import ChunkPass
from vidaccel.memory.settings import SlowFastSettings


class Held(NamedTuple):
    """What a slot holds: a frame, the pass that wrote it, and whether it was copied here for slow memory."""

    frame: int
    source: Source
    is_copy: bool


class OfficialParts:
    """What a `MemoryConfig` in the official mode decides, for what was kept of a row of slots."""

    def __init__(self, config: SlowFastSettings) -> None:
        self._config = config

    def start(self) -> dict[str, Any]:
        """Empty slots."""
        return _Slots(self._config).kept()

    def begin(self, kept: dict[str, Any], frames: range) -> dict[str, Any]:
        """Find the slots of a new chunk."""
        slots = _Slots(self._config, kept)
        slots.begin(len(frames))
        return slots.kept()

    def run(self, kept: dict[str, Any], done: ChunkPass, is_keyframe: bool) -> tuple[dict[str, Any], bool]:
        """One pass over a chunk writes its slots; also whether it copied frames to slow memory before that."""
        slots = _Slots(self._config, kept)
        is_copied = slots.run(done.frames, is_keyframe, done.source)
        return slots.kept(), is_copied

    def entries(self, kept: dict[str, Any], current: range) -> tuple[Entry, ...]:
        """What a pass attends to, in the order of the slots."""
        return _Slots(self._config, kept).entries(current)

    def positions(self, kept: dict[str, Any], current: range) -> tuple[int, ...]:
        """The position of each entry: the sink's from 0 on, the others so that the last one has the chunk's last."""
        return _Slots(self._config, kept).positions(current)

    def check(self, kept: dict[str, Any], current: range) -> None:
        """Raise UserError if no rollout can have left `kept`."""
        if set(kept) != {"slots", "num_copied", "end"}:
            raise UserError("its slots are missing")
        _Slots(self._config, kept).check(current)


class _Slots:
    """A row of slots, sink first, then slow, then fast memory; the first `_end` of them are attended to."""

    def __init__(self, config: SlowFastSettings, kept: dict[str, Any] | None = None) -> None:
        self._config = config
        self._slots: list[Held | None] = [None] * config.total_frames
        self._num_copied: int = 0
        self._end: int = 0
        if kept is not None:
            self._slots = [_slot(value) for value in kept["slots"]]
            self._num_copied, self._end = kept["num_copied"], kept["end"]

    def kept(self) -> dict[str, Any]:
        """Everything as plain values."""
        slots = [None if slot is None else list(slot) for slot in self._slots]
        return {"slots": slots, "num_copied": self._num_copied, "end": self._end}

    def begin(self, count: int) -> None:
        """Find the slots of a new chunk; if they are used up, fast memory moves on by a chunk.

        The released code copies to slow memory first, which touches other slots.
        """
        if self._end + count <= len(self._slots):
            self._end += count
            return
        first = len(self._slots) - self._config.fast_frames
        self._slots[first : len(self._slots) - count] = self._slots[first + count :]

    def run(self, frames: range, is_keyframe: bool, source: Source) -> bool:
        """One pass over a chunk writes its slots; returns whether it copied frames to slow memory before that."""
        is_copied = (
            is_keyframe
            and not self._is_known(frames.start)
            and self._copy(frames[: self._config.keyframe_frames], source)
        )
        self._slots[self._end - len(frames) : self._end] = [Held(frame, source, False) for frame in frames]
        return is_copied

    def _is_known(self, frame: int) -> bool:
        newest = self._slots[self._config.sink_frames + self._num_copied - 1] if self._num_copied else None
        return newest is not None and newest.frame == frame

    def _copy(self, frames: range, source: Source) -> bool:
        config, count = self._config, len(frames)
        copies = [Held(frame, source, True) for frame in frames]
        first, end = config.sink_frames, config.sink_frames + config.slow_frames
        if self._num_copied + count <= config.slow_frames:
            self._slots[first + self._num_copied : first + self._num_copied + count] = copies
            self._num_copied += count
            return True
        if count >= config.slow_frames:
            return False
        self._slots[first:end] = [*self._slots[first + count : end], *copies]
        return True

    def entries(self, current: range) -> tuple[Entry, ...]:
        """What a pass attends to, in the order of the slots."""
        first_current = self._end - len(current)
        entries = []
        for place, slot in enumerate(self._slots[: self._end]):
            if place >= first_current:
                frame = current[place - first_current]
                source = slot.source if slot is not None and slot.frame == frame else None
                entries.append(Entry(frame, "current", source=source))
            elif slot is not None:
                entries.append(Entry(slot.frame, self._part(place), slot.is_copy, slot.source))
        return tuple(entries)

    def _part(self, place: int) -> Part:
        if place < self._config.sink_frames:
            return "sink"
        return "slow" if place < self._config.sink_frames + self._config.slow_frames else "fast"

    def positions(self, current: range) -> tuple[int, ...]:
        """The position of each entry, places that are left out having theirs too."""
        num_sink = min(self._config.sink_frames, self._end)
        count = self._end - num_sink
        first = max(0, min(current.stop, len(self._slots)) - count)
        positions = (*range(num_sink), *range(first, first + count))
        first_current = self._end - len(current)
        return tuple(
            position
            for place, position in enumerate(positions)
            if place >= first_current or self._slots[place] is not None
        )

    def check(self, current: range) -> None:
        """Raise UserError if no rollout can have left these slots."""
        most = self._config.total_frames
        if len(self._slots) != most or type(self._end) is not int or not len(current) <= self._end <= most:
            raise UserError(f"it has not {most} slots")
        if type(self._num_copied) is not int or not 0 <= self._num_copied <= self._config.slow_frames:
            raise UserError(f"it says that {self._num_copied!r} frames are in slow memory")
        if any(self._slots[place] is None and self._part(place) != "slow" for place in range(self._end - len(current))):
            raise UserError("a slot is empty")
        if any(slot is not None and not 0 <= slot.frame < current.stop for slot in self._slots):
            raise UserError("it holds a frame that does not exist yet")


def check_keys_can_follow(config: SlowFastSettings) -> None:
    """Raise ValueError for sizes with which the released code copies into slots in use, or in use only later."""
    least = max(config.sink_frames, config.chunk_frames + config.total_frames % config.chunk_frames)
    if config.mode == "official" and (config.keyframe_frames > 1 or config.fast_frames < least):
        raise ValueError(
            f"In the official mode keys can be kept with `keyframe_frames` 1 and, for these sizes, `fast_frames` of at "
            f"least {least}; got {config.keyframe_frames} and {config.fast_frames}."
        )


def _slot(value: object) -> Held | None:
    match value:
        case None:
            return None
        case [int(frame), "clean" | int() as source, bool(is_copy)] if not isinstance(source, bool):
            return Held(frame, source, is_copy)
    raise UserError(f"a slot holds {value!r}")

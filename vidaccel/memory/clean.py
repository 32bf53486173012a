"""The recommended bookkeeping of slow and fast memory: disjoint parts, in order of time, changed once per chunk.

Paper: Context Forcing, arXiv 2602.06028, section 3.3. A keyframe is marked when its chunk is finished and moves to slow
memory when it leaves the fast one, so no frame is in two parts and all that is remembered is from the clean pass. Kept
are lists of marks, a mark being a frame and whether it is a keyframe. With sizes 3+3+6, chunk by chunk:

    finished 0..11, 9 is a keyframe:   sink 0 1 2  slow -   fast 6 7 8 9k 10 11
    begin 12..14:                      sink 0 1 2  slow -   fast 9k 10 11             6 7 8 are lost
    begin 15..17:                      sink 0 1 2  slow 9   fast 12 13 14             9 moves, 10 and 11 are lost

Further frames of a keyframe's chunk (`keyframe_frames`) follow it into slow memory and stay while no keyframe needs
their places; the last frames of chunks leave first, and of these the latest, of whose time fast memory has more.
Frames that come back (`retrieve_by`) take places of slow memory until others do, and stand in it in order of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidaccel.errors import UserError
from vidaccel.memory.entry import Entry
from vidaccel.memory.policy import ChunkPass, being_made
from vidaccel.memory.settings import SlowFastSettings

Mark = list[Any]  # [frame, is_keyframe]
Marks = dict[str, list[Any]]  # "slow", "fast": marks; with retrieval also "back": frames, the last to come back last


class CleanParts:
    """What a `MemoryConfig` in the clean mode decides; which frames are in the sink follows from their number."""

    def __init__(self, config: SlowFastSettings) -> None:
        self._config = config

    def start(self) -> Marks:
        """Nothing."""
        kept: Marks = {"slow": [], "fast": []}
        return kept if self._config.retrieve_by == "none" else {**kept, "back": []}

    def begin(self, kept: Marks, frames: range) -> Marks:
        """Make room for a chunk: keyframes, and what is to be kept behind them, go from fast memory to slow memory."""
        config, slow = self._config, list(kept["slow"])
        leaving = max(0, len(kept["fast"]) + len(frames) - config.fast_frames)
        ranks = self._ranks(kept)
        slow += [mark for mark in kept["fast"][:leaving] if mark[0] in ranks or config.prefill == "linear"]
        return self._fitting({**kept, "slow": slow, "fast": kept["fast"][leaving:]}, ranks)

    def retrieve(self, kept: Marks, wanted: Sequence[int]) -> Marks:
        """Let frames that left come back, in place of those that came back before them, and of the least of others."""
        most = self._config.most_retrieved
        back = [*kept["back"], *reversed(wanted)][-most:]  # the first of them is the last to leave
        return self._fitting({**kept, "back": back}, self._ranks(kept))

    def _fitting(self, kept: Marks, ranks: dict[int, int]) -> Marks:
        """`kept` with what slow memory has places for beside what came back."""
        slow = list(kept["slow"])
        while len(slow) + len(kept.get("back", ())) > self._config.slow_frames:
            slow.remove(_least(slow, ranks))
        return {**kept, "slow": slow}

    def _ranks(self, kept: Marks) -> dict[int, int]:
        """Of keyframes and of the frames that follow them, how far they are behind the keyframe."""
        keyframes = [frame for frame, is_keyframe in (*kept["slow"], *kept["fast"]) if is_keyframe]
        behind = range(self._config.keyframe_frames)
        return {frame + rank: rank for rank in reversed(behind) for frame in keyframes}

    def run(self, kept: Marks, done: ChunkPass, is_keyframe: bool) -> tuple[Marks, bool]:
        """Only the clean pass is remembered: the first frames of the video in the sink, all others in fast memory."""
        if done.source != "clean":
            return kept, False
        new = [
            [frame, is_keyframe and number == 0]
            for number, frame in enumerate(done.frames)
            if frame >= self._config.sink_frames
        ]
        return {**kept, "fast": [*kept["fast"], *new]}, is_keyframe

    def entries(self, kept: Marks, current: range) -> tuple[Entry, ...]:
        """Sink, slow, fast, current."""
        return (
            *(Entry(frame, "sink") for frame in range(min(current.start, self._config.sink_frames))),
            *(Entry(frame, "slow") for frame in sorted([*(frame for frame, _ in kept["slow"]), *kept.get("back", ())])),
            *(Entry(frame, "fast") for frame, _ in kept["fast"]),
            *being_made(current),
        )

    def positions(self, kept: Marks, current: range) -> tuple[int, ...]:
        """The position of each entry: its place among them."""
        return tuple(range(len(self.entries(kept, current))))

    def check(self, kept: Marks, current: range) -> None:
        """Raise UserError if no rollout can have left `kept`."""
        config = self._config
        if set(kept) != set(self.start()):
            raise UserError("slow and fast memory are missing")
        slow, fast, back = kept["slow"], kept["fast"], kept.get("back", [])
        if not all(type(frame) is int for frame in back) or len(back) > config.most_retrieved:
            raise UserError(f"the frames that came back are {back!r}")
        for frame, is_keyframe in (*slow, *fast):
            if type(frame) is not int or type(is_keyframe) is not bool:
                raise UserError(f"a remembered frame is {[frame, is_keyframe]!r}")
        marked = [frame for frame, _ in (*slow, *fast)]
        if marked != sorted(set(marked)) or any(frame < config.sink_frames for frame in (*marked, *back)):
            raise UserError("its frames are not in order")
        if len({*marked, *back}) < len(marked) + len(back) or any(frame >= current.start for frame in back):
            raise UserError(f"frames {back} cannot have come back")
        if [frame for frame, _ in fast] != list(range(current.start - len(fast), current.start)):
            raise UserError("fast memory does not hold the last frames")
        if len(slow) + len(back) > config.slow_frames or len(fast) + len(current) > config.fast_frames:
            raise UserError("it holds more frames than there is place for")
        ranks = self._ranks(kept)
        if config.prefill == "none" and not all(frame in ranks for frame, _ in slow):
            raise UserError("slow memory holds a frame that is no keyframe and follows none")


def _least(slow: list[Mark], ranks: dict[int, int]) -> Mark:
    """What leaves slow memory: the oldest frame that is of no keyframe's chunk, else the latest of those farthest
    behind their keyframe, else the oldest keyframe."""
    others = [mark for mark in slow if mark[0] not in ranks]
    if others:
        return others[0]
    most = max(ranks[frame] for frame, _ in slow)
    return [mark for mark in slow if ranks[mark[0]] == most][-1 if most else 0]

"""Does a rollout show what its timeline says? Read by the oracles, stretch by stretch.

A stretch is a time in which neither the prompt changes nor the camera moves. A soft change of the prompt has three
seconds to be obeyed; a hard cut has none. While the camera is elsewhere the subject is out of view; back at a place it
has to show the landmark that it showed before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vidaccel.bench.student.changes import PART, WAITS
from vidaccel.bench.student.readings import STILL_FRAMES, SUBJECT, Shown, read_part
from vidaccel.rollout.timeline import PromptChange, PromptTimeline
from vidaccel.world import FPS, FRAME_SIZE, Asked, asked_by, read_clip
from vidaccel.world.landmark_oracle import SAME_PLACE

_LEAST_MOTION = 32  # frames in which the slowest motion goes round
_AWAY = 0.3  # screens from where the subject is out of view, or cut by the border
_SAME_VIEW = 0.15  # screens between two stands of a camera that shows the same


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Pixel frames `start` to `stop` of a rollout, in which prompt and camera stay.

    shot: number of hard cuts before. screens: where the camera is by the timeline.
    """

    start: int
    stop: int
    prompt: str
    shot: int
    screens: float

    @property
    def asked(self) -> Asked:
        """What its prompt asks for."""
        return asked_by(self.prompt)

    @property
    def is_home(self) -> bool:
        """Whether the subject is in view."""
        return abs(self.screens) < _AWAY

    @property
    def is_panned(self) -> bool:
        """Whether the prompt moves the camera by words."""
        return self.asked.camera not in (None, "hold")


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A stretch, what its end shows, and in plain words what of it is not as it is asked for."""

    stretch: Stretch
    shown: Shown
    misses: tuple[str, ...]


def follow(
    pipe: Any, timeline: PromptTimeline, *, seconds: float, seed: int = 0, places: bool = True, **options: Any
) -> list[Followed]:
    """Make the rollout of a timeline in the words of the storybook world, and read it.

    pipe: a causal student of the world. places: whether the landmark of a place has to stay.
    options: of `pipe.stream`, such as `max_sequence_length`.
    Raises UserError as `pipe.stream` does.
    """
    grid = pipe.grid(fps=FPS)
    num_chunks = timeline.num_chunks(grid, seconds)
    chunks = pipe.stream(
        timeline, num_chunks=num_chunks, seeds=(seed,), height=FRAME_SIZE, width=FRAME_SIZE, fps=FPS, **options
    )
    video = torch.cat([chunk.frames[0] for chunk in chunks])
    found: list[Followed] = []
    for stretch in stretches_of(timeline, grid, num_chunks=num_chunks):
        clip = video[max(stretch.start, stretch.stop - PART) : stretch.stop]
        shown = read_part(clip)
        camera = read_clip(video[stretch.start : stretch.stop].float() / 255).camera if stretch.is_panned else None
        misses = (
            *_misses(stretch, shown, len(clip), camera),
            *(_changed_places(stretch, shown, found) if places else ()),
        )
        found.append(Followed(stretch=stretch, shown=shown, misses=misses))
    return found


def stretches_of(timeline: PromptTimeline, grid: Any, *, num_chunks: int) -> list[Stretch]:
    """The stretches of a timeline that are long enough to be read, in order of time."""
    grid = timeline.grid_with_cuts(grid)
    changes = timeline.changes(grid, num_chunks=num_chunks)
    moves = timeline.camera.on(grid).moves
    ends = [change.chunk for change in changes[1:]] + [num_chunks]
    found = []
    for number, (change, end) in enumerate(zip(changes, ends, strict=True)):
        shot = sum(one.span.cut == "hard" for one in changes[1 : number + 1])
        waits = number > 0 and change.span.cut == "soft"
        settled = grid.first_pixel_frame(change.chunk) + waits * WAITS[-1] * FPS
        for first, last, screens in _holds(moves, change, end):
            start, stop = max(settled, grid.first_pixel_frame(first)), grid.first_pixel_frame(last)
            if stop - start >= STILL_FRAMES:
                found.append(Stretch(start=start, stop=stop, prompt=change.span.prompt, shot=shot, screens=screens))
    return found


def _holds(moves: Sequence[Any], change: PromptChange, end: int) -> Iterator[tuple[int, int, float]]:
    """First chunk, the one after the last, and the place of the camera, for its holds between two changes."""
    at, screens = change.chunk, 0.0
    for placed in moves:
        if placed.end > change.chunk and placed.chunk < end:
            if placed.chunk > at:
                yield at, placed.chunk, screens
            at = placed.end
        if placed.chunk < end:
            screens += placed.move.screens
    if at < end:
        yield at, end, screens


def _misses(stretch: Stretch, shown: Shown, num_frames: int, camera: str | None) -> Iterator[str]:
    """What the prompt asks for and is not there."""
    asked = stretch.asked
    names = ["background"]
    if stretch.is_home and not stretch.is_panned:
        names += [name for name in SUBJECT if name != "motion" or num_frames >= _LEAST_MOTION]
    for name in names:
        wanted, got = getattr(asked, name), getattr(shown, name)
        if wanted is not None and got != wanted:
            yield f"{name} {wanted}, shown {got}"
    if camera is not None and camera != asked.camera:
        yield f"camera {asked.camera}, shown {camera}"
    mark = shown.landmark
    if not stretch.is_home and not mark.is_valid:
        yield "a landmark where the camera went, shown none"
    if stretch.is_home and asked.landmark is not None and not (mark.is_valid and mark.kind == asked.landmark):
        yield f"landmark {asked.landmark}, shown {mark.kind if mark.is_valid else None}"


def _changed_places(stretch: Stretch, shown: Shown, before: Sequence[Followed]) -> Iterator[str]:
    """Whether the landmark is another than when the camera was here last, in this shot and with this landmark named."""
    for earlier in reversed(before):
        other, moved = earlier.stretch, (stretch.screens - earlier.stretch.screens) * FRAME_SIZE
        is_same = other.shot == stretch.shot and other.asked.landmark == stretch.asked.landmark
        if not is_same or abs(moved) > _SAME_VIEW * FRAME_SIZE or not earlier.shown.landmark.is_valid:
            continue
        was, now = earlier.shown.landmark, shown.landmark
        apart = abs(was.x - moved - now.x)
        if (was.kind, was.colour) != (now.kind, now.colour) or apart > SAME_PLACE:
            yield (
                f"the {was.colour} {was.kind} at {was.x - moved:.0f} again, "
                f"shown a {now.colour} {now.kind} at {now.x:.0f}"
            )
        return

"""Soft changes of the prompt: is the new one obeyed, and does everything stay that it did not change?

The student makes a video under the first prompt of a trip and goes on with the second by a soft cut; the camera holds.
What it showed before the cut is what it has to keep, whatever the first prompt asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vidaccel.bench.student.readings import SUBJECT, Shown, read_part
from vidaccel.bench.student.rollouts import CHUNK_PIXELS, Filming, Script, encoded_trips, first_pixel
from vidaccel.bench.student.sheet import Measured, Row
from vidaccel.world import FPS, FRAME_SIZE, Trip, TripSpan, change_trip, render_trips, trip_caption
from vidaccel.world.landmark_oracle import SAME_PLACE

WAITS = (1, 2, 3)  # seconds from the change to the part that is read
PART = 44  # pixel frames of a part: all there are before the change, and just enough to tell the slowest walk
KEPT = (*SUBJECT, "background", "landmark", "landmark colour", "landmark place")


def measure_changes(filming: Filming, attribute: str, *, count: int, seed: int, is_given: bool = False) -> Measured:
    """`count` changes of one attribute, in prompts that training never sees.

    is_given: all up to the change is the world's own video, so that nothing the student drew can be at fault.
    """
    trips = [change_trip(seed * 1_000_003 + number, attribute) for number in range(count)]
    chunk = trips[0].spans[1].start_chunk
    change = first_pixel(chunk)
    end = change + WAITS[-1] * FPS + PART
    starts = encoded_trips(filming.pipe.vae, trips, chunk) if is_given else [None] * count
    scripts = [_script(trip, given) for trip, given in zip(trips, starts, strict=True)]
    latents = filming.film(scripts, chunk - (change - end) // CHUNK_PIXELS)
    video = filming.decode(latents, change - PART, end)
    parts = _parts(video)
    world = _parts(render_trips(trips, start=change - PART, num_frames=len(video[0]), device=video.device))
    tries = [
        {
            "seed": trip.seed,
            "prompts": [text for _, text in scripts[number].prompts],
            "asked": [_asked(trip, span) for span in trip.spans],
            "shown": {name: read_part(part[number]).to_dict() for name, part in parts.items()},
            "world": {name: read_part(world[name][number]).to_dict() for name in ("before", str(WAITS[-1]))},
        }
        for number, trip in enumerate(trips)
    ]
    name = f"given, {attribute}" if is_given else attribute
    rows = [
        Row(label=f"{name}, before", pictures=parts["before"][:, -1]),
        *(Row(label=f"{name}, {wait} s after", pictures=parts[str(wait)][:, 0]) for wait in (1, WAITS[-1])),
    ]
    return Measured(tries=tries, rows=rows)


def is_obeyed(shown: Shown, asked: Mapping[str, Any], attribute: str) -> bool:
    """Whether a video shows the value of `attribute` that is asked for; a landmark must be valid."""
    return _value(shown, attribute) == asked[attribute]


def kept_of(before: Shown, after: Shown, asked: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """For everything that both prompts agree on and that could be read before: is it still the same?

    asked: of the span before and of the span after. What could not be read before is left out.
    """
    kept = {}
    for name in KEPT:
        earlier = _value(before, name)
        if asked[0][name] != asked[1][name] or earlier is None:
            continue
        later = _value(after, name)
        if name == "landmark place":
            kept[name] = later is not None and abs(later - earlier) <= SAME_PLACE
        else:
            kept[name] = later == earlier
    return kept


def _value(shown: Shown, name: str) -> Any:
    """None where nothing can be made out; of a landmark, where it is not valid."""
    if not name.startswith("landmark"):
        return getattr(shown, name)
    if not shown.landmark.is_valid:
        return None
    return {
        "landmark": shown.landmark.kind,
        "landmark colour": shown.landmark.colour,
        "landmark place": shown.landmark.x,
    }[name]


def _script(trip: Trip, given: Tensor | None) -> Script:
    prompts = tuple((span.start_chunk, trip_caption(trip, span.start_chunk)) for span in trip.spans)
    return Script(seed=trip.seed, prompts=prompts, given=given)


def _asked(trip: Trip, span: TripSpan) -> dict[str, Any]:
    mark = span.landmarks[trip.subject_stop]
    return {name: getattr(span.subject, name) for name in SUBJECT} | {
        "background": span.background,
        "landmark": mark.kind,
        "landmark colour": mark.colour,
        "landmark place": round(mark.x - FRAME_SIZE * trip.subject_stop, 2),
    }


def _parts(video: Tensor) -> dict[str, Tensor]:
    """What is read, by name, of videos that begin `PART` frames before the change."""
    starts = {"before": 0} | {str(wait): PART + wait * FPS for wait in WAITS}
    return {name: video[:, start : start + PART] for name, start in starts.items()}

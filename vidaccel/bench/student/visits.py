"""First visits: how sharp is a place that the student has to invent, because its camera has never been there?

Trips of the recall benchmark up to the end of their first visit. The student makes the way there and the place, after a
beginning that the world gives or from nothing. The same trips after the autoencoder are what it can be measured by.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidaccel.bench.student.readings import STILL_FRAMES, SeenLandmark, seen_landmarks
from vidaccel.bench.student.rollouts import CHUNK_FRAMES, Filming, Script, encoded_trips, first_pixel
from vidaccel.bench.student.sheet import Measured, Row
from vidaccel.video.frames import as_float
from vidaccel.world import FRAME_SIZE, ReturnTrip, latent_cameras, test_trip, trip_caption

BEGINNINGS = ("given", "nothing")
TRUTH = "truth"


def measure_visits(filming: Filming, beginning: str, *, count: int, seed: int) -> Measured:
    """What is seen at `count` places for the first time.

    beginning: "given", by the world, up to where the camera sets off; "nothing"; or "truth" for the world's own video
        of all after the autoencoder.
    """
    trips = [test_trip(seed * 1_000_003 + number) for number in range(count)]
    end = trips[0].first_visit.stop
    if beginning == TRUTH:
        latents = encoded_trips(filming.pipe.vae, trips, end)
    else:
        given = encoded_trips(filming.pipe.vae, trips, _departure(trips[0])) if beginning == "given" else None
        latents = filming.film([_script(trip, given, number) for number, trip in enumerate(trips)], end)
    last = first_pixel(end)
    frames = as_float(filming.decode(latents, last - STILL_FRAMES, last))
    stills = frames.median(dim=1).values
    tries = [
        {"seed": trip.seed, "prompt": trip_caption(trip, 0), "landmark": vars(mark)}
        for trip, mark in zip(trips, seen_landmarks(stills), strict=True)
    ]
    return Measured(tries=tries, rows=[Row(label=f"first visit, {beginning}", pictures=stills)])


def landmark_of(one: dict[str, Any]) -> SeenLandmark:
    """The landmark of a try."""
    return SeenLandmark(**one["landmark"])


def _departure(trip: ReturnTrip) -> int:
    """The chunk with which the camera sets off for its first visit."""
    return max(chunk for chunk in range(trip.first_visit.start) if trip.holds(chunk) is not None) + 1


def _script(trip: ReturnTrip, given: Tensor | None, number: int) -> Script:
    columns, _ = latent_cameras(trip)
    screens = tuple((column - columns[0]) / FRAME_SIZE for column in columns)
    return Script(
        seed=trip.seed,
        prompts=((0, trip_caption(trip, 0)),),
        camera=screens[: trip.first_visit.stop * CHUNK_FRAMES],
        given=None if given is None else given[number],
    )

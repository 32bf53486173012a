"""Whether a rollout follows its timeline: the stretches of a timeline, and videos of the world that do and do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidaccel.bench.student.follow import follow, stretches_of
from vidaccel.rollout.camera import CameraPath
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.rollout.timeline import PromptSpan, PromptTimeline
from vidaccel.world import (
    ReturnTrip,
    Trip,
    asked_by,
    change_trip,
    render_trips,
    swapped,
    trip_caption,
)
from vidaccel.world import (
    test_trip as return_trip,
)

GRID = ChunkGrid(chunk_frames=3, fps=16)


@dataclass(frozen=True)
class Playing:
    """A pipeline whose rollouts are a video of the world, (F, 3, H, W)."""

    video: Tensor

    def grid(self, **_: Any) -> ChunkGrid:
        return GRID

    def stream(self, timeline: PromptTimeline, *, num_chunks: int, **_: Any) -> Iterator[Any]:
        frames = (self.video * 255).round().to(torch.uint8)
        for chunk in range(num_chunks):
            first, stop = GRID.first_pixel_frame(chunk), GRID.first_pixel_frame(chunk + 1)
            yield SimpleNamespace(frames=frames[None, first:stop])


def played(trip: Trip) -> Playing:
    return Playing(render_trips([trip])[0])


def told(trip: Trip, *, camera: str = "") -> PromptTimeline:
    spans = [
        PromptSpan(GRID.start_seconds(span.start_chunk), trip_caption(trip, span.start_chunk)) for span in trip.spans
    ]
    return PromptTimeline(tuple(spans), CameraPath.parse(camera))


def seconds(trip: Trip) -> float:
    return trip.num_frames / 16


def way_of(trip: ReturnTrip) -> str:
    """The moves of a return trip: the first visit, back, and the second visit."""
    way = trip.camera_moves[1].distance
    there, back = ("right 1", "left 1") if way > 0 else ("left 1", "right 1")
    pans = [move for move in trip.camera_moves if move.distance]
    times = [f"{move.start / 16:.4f}-{(move.start + move.num_frames) / 16:.4f}" for move in pans]
    return ", ".join(f"{time} {words}" for time, words in zip(times, (there, back, there), strict=True))


def home_trip() -> ReturnTrip:
    """One that begins at the subject's stop."""
    trips = (return_trip(seed) for seed in range(50))
    return next(trip for trip in trips if trip.camera_x(0) == 128 * trip.subject_stop)


def test_stretches_are_the_times_in_which_nothing_changes() -> None:
    timeline = PromptTimeline(
        (PromptSpan(0, "a red ball"), PromptSpan(6, "a blue ball"), PromptSpan(12, "a red star", "hard")),
        CameraPath.parse("2-2.75 right 1, 8-8.75 left 0.5"),
    )
    found = stretches_of(timeline, GRID, num_chunks=20)
    places = [(one.prompt, one.shot, one.screens) for one in found]
    assert places == [
        ("a red ball", 0, 0),
        ("a red ball", 0, 1),
        ("a blue ball", 0, 0.5),
        ("a red star", 1, 0.5),
    ]
    grid = timeline.grid_with_cuts(GRID)
    assert found[0].stop == grid.first_pixel_frame(grid.chunk_from(2))
    assert found[2].start == grid.first_pixel_frame(grid.chunk_from(6)) + 48  # three seconds to obey
    assert found[3].start == found[2].stop  # a hard cut has none
    assert found[3].stop == grid.first_pixel_frame(20)


@pytest.mark.parametrize("attribute", ["colour", "landmark"])
def test_the_world_follows_a_change_and_a_video_without_it_does_not(attribute: str) -> None:
    trip = change_trip(4, attribute)
    timeline = told(trip)
    found = follow(played(trip), timeline, seconds=seconds(trip))
    assert [one.misses for one in found] == [(), ()]
    assert found[1].stretch.asked == asked_by(trip_caption(trip, 4))
    never = follow(played(change_trip(4, attribute)), told(change_trip(5, attribute)), seconds=seconds(trip))
    assert all(one.misses for one in never)


def test_coming_back_to_another_landmark_is_a_miss() -> None:
    trip = home_trip()
    timeline = told(trip, camera=way_of(trip))
    found = follow(played(trip), timeline, seconds=seconds(trip))
    assert [one.stretch.screens for one in found] == [0, found[1].stretch.screens, 0, found[1].stretch.screens]
    assert [one.misses for one in found] == [()] * 4
    other = render_trips([swapped(trip, 0)])[0]
    video = torch.cat([render_trips([trip])[0][: found[2].stretch.stop], other[found[2].stretch.stop :]])
    *same, last = follow(Playing(video), timeline, seconds=seconds(trip))
    assert not any(one.misses for one in same)
    (miss,) = last.misses
    assert trip.target.kind in miss
    assert "again, shown a" in miss


def test_an_empty_place_where_the_camera_went_is_a_miss() -> None:
    trip = home_trip()
    video = render_trips([trip])[0]
    away = follow(Playing(video), told(trip, camera=way_of(trip)), seconds=seconds(trip))[1].stretch
    bare = video[away.start : away.stop].median(dim=-1, keepdim=True).values.expand(-1, -1, -1, 128)
    emptied = torch.cat([video[: away.start], bare, video[away.stop :]])
    found = follow(Playing(emptied), told(trip, camera=way_of(trip)), seconds=seconds(trip))
    assert "a landmark where the camera went, shown none" in found[1].misses

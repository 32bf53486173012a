"""The way of the camera: what its text may say, the chunks that a move takes, and where the camera is in between."""

import json
import math
from itertools import pairwise

import pytest

from vidaccel.errors import UserError
from vidaccel.rollout.camera import CameraMove, CameraPath, check_takes_camera
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.world.scene import FRAME_SIZE
from vidaccel.world.trip import Trip, latent_cameras
from vidaccel.world.trips import random_trip
from vidaccel.world.trips import test_trip as trip_of_kind

GRID = ChunkGrid(chunk_frames=3, fps=16)  # chunks begin at pixel frames 0, 9, 21, 33, 45, ...
CUT = ChunkGrid(chunk_frames=3, fps=16, cuts=(3,))  # at 0, 9, 21, 33, 42, 54, ...
GIVEN = ChunkGrid(chunk_frames=3, fps=16, given_frames=7)


def frames_of(grid: ChunkGrid, num_chunks: int) -> list[range]:
    """The pixel frames of every latent frame, counted one after the other."""
    firsts = {grid.first_frame(chunk) for chunk in (0, *grid.cuts)}
    found, pixel = [], 0
    for frame in range(grid.first_frame(num_chunks)):
        found.append(range(pixel, pixel := pixel + (1 if frame in firsts else grid.temporal_stride)))
    return found


def way(path: CameraPath, grid: ChunkGrid, num_chunks: int) -> list[float]:
    return [position for chunk in range(num_chunks) for position in path.positions(chunk, grid)]


def test_a_text_gives_the_moves_and_the_moves_their_text() -> None:
    path = CameraPath.parse("2-2.75 right 1, 0:58 - 1:02.5   left 0.25,1:00:00-1:00:01 right 3")
    moves = (CameraMove(2, 2.75, 1), CameraMove(58, 62.5, -0.25), CameraMove(3600, 3601, 3))
    assert path.moves == moves
    assert str(path) == "2-2.75 right 1, 58-62.5 left 0.25, 3600-3601 right 3"
    assert CameraPath.parse(str(path)) == path
    assert CameraPath.from_dict(json.loads(json.dumps(path.to_dict()))) == path
    assert CameraPath.of(path) is path
    assert CameraPath.of(str(path)) == path
    assert CameraPath.of(None) == CameraPath.of(" ") == CameraPath() == CameraPath.from_dict(CameraPath().to_dict())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("right 1", "no camera move"),
        ("2 right 1", "no camera move"),
        ("2-3", "no camera move"),
        ("2-3 right 1,", "'' is no camera move"),
        ("2-3 right 1; 4-5 left 1", "no way of a camera"),
        ("2-3 up 1", "no way of a camera"),
        ("2-3 right", "no way of a camera"),
        ("2-3 right one", "no way of a camera"),
        ("2-3 right inf", "no way of a camera"),
        ("2-3 right 0", "no way of a camera"),
        ("2-3 right -1", "no way of a camera"),
        ("3-2 right 1", "ends after its start"),
        ("2-2 right 1", "ends after its start"),
        ("1:60-2:00 right 1", "below 60"),
        ("2-3 right 1, 2.5-4 left 1", "has ended, got 2.5 s and 3 s"),
        ("4-5 right 1, 2-3 left 1", "has ended"),
    ],
)
def test_another_text_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        CameraPath.parse(text)


@pytest.mark.parametrize(
    "move", [(-1, 2, 1), (math.nan, 2, 1), (0, math.inf, 1), (0, 1, math.nan), (0, 1, 0), (0, True, 1), ("0", 1, 1)]
)
def test_a_move_of_no_sense_is_refused(move: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match="camera move"):
        CameraMove(*move)


@pytest.mark.parametrize("values", [{}, {"moves": ["a"]}, {"moves": [{"screens": 1}]}, {"moves": "2-3 right 1"}])
def test_other_values_are_no_path(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match="list `moves`"):
        CameraPath.from_dict(values)
    with pytest.raises(UserError, match="or a `CameraPath`"):
        CameraPath.of(values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("move", "chunks"),
    [
        ("0-0.5 right 1", (0, 1)),  # of 9 pixel frames
        ("0-0.9 right 1", (0, 1)),  # 14.4 are nearer to 9
        ("0-1 right 1", (0, 2)),  # and 16 to 21
        ("2-2.75 right 1", (3, 4)),
        ("2.0625-2.8125 right 1", (3, 4)),
        ("2.07-2.8 right 1", (4, 5)),
        ("2-2.1 right 1", (3, 4)),
        ("2-3.1 right 1", (3, 4)),  # 17.6 of 12 each
        ("2-3.2 right 1", (3, 5)),  # 19.2
        ("2-3.125 right 1", (3, 4)),  # as near to one as to two
        ("60-75 right 1", (81, 101)),
    ],
)
def test_a_move_begins_with_the_next_chunk_and_takes_the_nearest_number(move: str, chunks: tuple[int, int]) -> None:
    (placed,) = CameraPath.parse(move).on(GRID).moves
    assert (placed.chunk, placed.end) == chunks
    assert not placed.is_late


def test_within_its_chunks_a_move_is_eased_and_a_latent_frame_has_the_mean_of_its_pixel_frames() -> None:
    positions = way(CameraPath.parse("2-2.75 right 1"), GRID, 6)
    shares = [pixel / 12 for pixel in range(12)]
    eased = [share - math.sin(2 * math.pi * share) / (4 * math.pi) for share in shares]
    assert positions[:9] == [0] * 9
    assert positions[9:12] == pytest.approx([sum(eased[first : first + 4]) / 4 for first in (0, 4, 8)], abs=1e-6)
    assert positions[12:] == [1] * 6


@pytest.mark.parametrize("grid", [GRID, CUT, GIVEN, ChunkGrid(chunk_frames=1, fps=24, temporal_stride=8)])
@pytest.mark.parametrize("text", ["0-1 right 1", "0.5-2.5 left 0.7, 2.5-3 right 2", "1-1.1 right 1, 1.2-1.3 left 1"])
def test_the_way_is_the_sum_of_the_moves_in_every_pixel_frame(grid: ChunkGrid, text: str) -> None:
    path = CameraPath.parse(text)
    ways = [
        (grid.first_pixel_frame(move.chunk), grid.first_pixel_frame(move.end), move.move.screens)
        for move in path.on(grid).moves
    ]

    def at(pixel: int) -> float:
        total = 0.0
        for first, end, screens in ways:
            share = min(max((pixel - first) / (end - first), 0), 1)
            total += screens * (share - math.sin(2 * math.pi * share) / (4 * math.pi))
        return total

    expected = [sum(map(at, pixels)) / len(pixels) for pixels in frames_of(grid, 12)]
    assert way(path, grid, 12) == pytest.approx(expected, abs=1e-6)
    motions = [motion for chunk in range(12) for motion in path.motions(chunk, grid)]
    assert motions == [0, *(after - before for before, after in pairwise(way(path, grid, 12)))]
    assert any(motions)


def test_a_camera_that_comes_back_is_exactly_where_it_was() -> None:
    path = CameraPath.parse("1-2 right 0.1, 3-4 right 0.2, 5-6 left 0.3")
    assert path.positions(12, GRID) == path.positions(0, GRID) == [0.0] * 3


def test_a_hard_cut_makes_its_move_shorter_and_the_path_goes_on() -> None:
    path = CameraPath.parse("1.4-2.8 right 1")  # of the two chunks before and after the cut
    (placed,) = path.on(CUT).moves
    assert (placed.chunk, placed.end) == (3, 5)
    assert (CUT.first_pixel_frame(3), CUT.first_pixel_frame(5)) == (33, 54)
    earlier = CameraPath.parse("1-2 right 1")
    assert earlier.positions(3, CUT)[0] == 1
    assert sum(earlier.motions(chunk, CUT)[0] for chunk in range(3)) > 0


def test_given_frames_hold_unless_a_move_lies_in_them() -> None:
    assert [GIVEN.first_frame(chunk) for chunk in range(5)] == [0, 3, 6, 7, 10]
    after = CameraPath.parse("1.5-2 right 1")
    assert [after.positions(chunk, GIVEN) for chunk in range(3)] == [[0, 0, 0], [0, 0, 0], [0]]
    assert CameraPath.parse("0.5-1 right 1").on(GIVEN).moves[0].chunk == 1
    assert CameraPath.parse("0.5-1 right 1").positions(2, GIVEN) == [1]


def test_moves_that_are_not_made_as_asked_are_named() -> None:
    path = CameraPath.parse("1-1.1 right 1, 1.2-1.3 left 0.5, 6-9 right 2, 60-61 left 1")
    late, short, never = path.problems(GRID, num_chunks=10)
    assert "'left 0.5' at 1.2 s begins at 2.0625 s, where the move before it ends" in late
    assert "leave more time between the two" in late
    assert "'right 2' at 6 s is not made to its end" in short
    assert "the video has 7.3125 s" in short
    assert "'left 1' at 60 s is not made: the video of 7.3125 s has its last chunk at 6.5625 s" in never
    assert [(placed.chunk, placed.end) for placed in path.on(GRID).moves[:2]] == [(2, 3), (3, 4)]
    assert CameraPath.parse("1-1.1 right 1").problems(GRID, num_chunks=10) == ()


def test_moves_are_for_students_that_are_told_of_a_camera() -> None:
    check_takes_camera(CameraPath(), takes_camera=False, student="'plain'")
    check_takes_camera(CameraPath.parse("1-2 right 1"), takes_camera=True, student="'plain'")
    with pytest.raises(UserError, match=r"\(--camera, .*'plain' is not: leave it out and say the move in the prompt"):
        check_takes_camera(CameraPath.parse("1-2 right 1"), takes_camera=False, student="'plain'")


@pytest.mark.parametrize("trip", [*map(random_trip, range(6)), trip_of_kind(3, kind="shift", pan_chunks=2)])
def test_the_camera_of_a_trip_of_the_storybook_world_is_where_a_path_of_its_moves_is(trip: Trip) -> None:
    moves = tuple(
        CameraMove(move.start / 16, (move.start + move.num_frames) / 16, move.distance / FRAME_SIZE)
        for move in trip.camera_moves
        if move.distance
    )
    path, start = CameraPath(moves), trip.camera_x(0)
    columns, motions = latent_cameras(trip)
    positions = way(path, GRID, trip.num_chunks)
    assert [start + FRAME_SIZE * position for position in positions] == pytest.approx(columns, abs=1e-3)
    moved = [FRAME_SIZE * motion for chunk in range(trip.num_chunks) for motion in path.motions(chunk, GRID)]
    assert moved == pytest.approx(motions, abs=1e-3)
    assert any(moved)


@pytest.mark.parametrize("digits", [9, 17, 40, 300])
def test_the_chunk_of_a_time_is_found_however_late_it_is(digits: int) -> None:
    pixel = 10**digits + 1
    chunk = GRID.chunk_from_pixel(pixel)
    assert GRID.first_pixel_frame(chunk - 1) < pixel <= GRID.first_pixel_frame(chunk)


@pytest.mark.parametrize(
    "moves",
    ["1-2 right 10001", "1-2 left 1e300", "1-2 right 1e308", "1-" + "9" * 308 + " right 1", "9" * 20 + "-1 right 1"],
)
def test_moves_beyond_all_measure_are_refused_in_one_short_line(moves: str) -> None:
    with pytest.raises(UserError, match="must be a finite number of at most") as caught:
        CameraPath.parse(moves)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("moves", ["1-2 right 1 " + "x" * 5000, "x" * 5000])
def test_a_long_text_that_is_no_move_is_shown_in_short(moves: str) -> None:
    with pytest.raises(UserError, match="is no") as caught:
        CameraPath.parse(moves)
    assert len(str(caught.value)) < 250

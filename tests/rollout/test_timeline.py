"""Prompt timelines: what a file may say, where it may err, and which chunk a prompt starts with."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vidaccel.errors import UserError
from vidaccel.rollout.camera import CameraMove, CameraPath
from vidaccel.rollout.grid import ChunkGrid, pixel_frames, seconds_of
from vidaccel.rollout.timeline import PromptSpan, PromptTimeline

GRID = ChunkGrid(chunk_frames=3, fps=16)


def written(folder: Path, text: str, name: str = "timeline.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_gives_times_cuts_and_prompts(tmp_path: Path) -> None:
    text = (
        "# a comment\n0:00 a red ball, #1\n\n12.5\tit rolls | left\n1:05 | hard | a street | at night\n1:00:30 dawn\n"
    )
    timeline = PromptTimeline.from_file(written(tmp_path, text))
    assert timeline.spans == (
        PromptSpan(0, "a red ball, #1"),
        PromptSpan(12.5, "it rolls | left"),
        PromptSpan(65, "a street | at night", "hard"),
        PromptSpan(3630, "dawn"),
    )


@pytest.mark.parametrize("name", ["timeline.json", "timeline.txt"])
def test_a_list_of_objects_gives_the_same(tmp_path: Path, name: str) -> None:
    entries = [{"start_seconds": 0, "prompt": "a"}, {"start_seconds": "1:05", "prompt": "b", "cut": "hard"}]
    timeline = PromptTimeline.from_file(written(tmp_path, json.dumps(entries), name))
    assert timeline == PromptTimeline((PromptSpan(0, "a"), PromptSpan(65, "b", "hard")))


@pytest.mark.parametrize("line", ["0:02-0:02.75 | camera | right 1", "2 - 2.75|camera|right 1"])
def test_lines_of_the_camera_stand_among_the_prompts(tmp_path: Path, line: str) -> None:
    timeline = PromptTimeline.from_file(written(tmp_path, f"{line}\n0 a\n5 b\n1:06-1:07\t|\tcamera | left 0.5\n"))
    assert timeline.spans == (PromptSpan(0, "a"), PromptSpan(5, "b"))
    assert timeline.camera == CameraPath((CameraMove(2, 2.75, 1), CameraMove(66, 67, -0.5)))
    entries = [
        {"start_seconds": 0, "prompt": "a"},
        {"start_seconds": 2, "end_seconds": 2.75, "camera": "right 1"},
        {"start_seconds": "1:06", "end_seconds": "1:07", "camera": "left 0.5"},
        {"start_seconds": 5, "prompt": "b"},
    ]
    assert PromptTimeline.from_file(written(tmp_path, json.dumps(entries), "timeline.json")) == timeline


def test_a_prompt_may_speak_of_a_camera_between_bars(tmp_path: Path) -> None:
    timeline = PromptTimeline.from_file(written(tmp_path, "0 a ball | camera | right 1\n3 | hard | camera | left 2\n"))
    assert [span.prompt for span in timeline.spans] == ["a ball | camera | right 1", "camera | left 2"]
    assert not timeline.camera.moves


def test_a_camera_line_that_overlaps_the_one_before_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "0 a\n1-2 | camera | right 1\n# so\n1.5-3 | camera | left 1\n")
    with pytest.raises(UserError, match=r"line 4: a camera move must start when the one before it has ended"):
        PromptTimeline.from_file(path)
    with pytest.raises(UserError, match="has no prompts"):
        PromptTimeline.from_file(written(tmp_path, "1-2 | camera | right 1\n"))


def test_a_timeline_has_one_camera() -> None:
    still = PromptTimeline.single("a")
    moving = still.with_camera("1-2 right 1")
    assert moving.camera == CameraPath.parse("1-2 right 1")
    assert moving.with_camera(None) == moving.with_camera("") == moving
    assert still.with_camera(None) is still
    with pytest.raises(UserError, match="camera lines and --camera"):
        moving.with_camera("3-4 left 1")
    assert "camera" not in still.to_dict()
    assert PromptTimeline.from_dict(json.loads(json.dumps(moving.to_dict()))) == moving
    (problem,) = still.with_camera("60-61 right 1").problems(GRID, num_chunks=10)
    assert "camera move 'right 1' at 60 s is not made" in problem


def test_a_mark_of_byte_order_and_windows_line_ends_are_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "timeline.txt"
    path.write_bytes("\ufeff0:00 a\r\n5 b\r\n".encode())
    assert PromptTimeline.from_file(path).spans == (PromptSpan(0, "a"), PromptSpan(5, "b"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("a red ball", "is no time"),
        ("-3 a red ball", "is no time"),
        ("1:75 a", "below 60"),
        ("1:61:00 a", "below 60"),
        ("nan a", "is no time"),
        ("7", "needs a prompt"),
        ("7 | hard |", "needs a prompt"),
        ("7 | sudden | b", "one of soft, hard"),
        ("7 | b", "stands nothing or the cut"),
        ("0:00 again", "must start after"),
        ("7 | camera | right 1", "no span of time"),
        ("7-8 | camera | up 1", "no way of a camera"),
        ("7-8 | camera | right", "no way of a camera"),
        ("7-8 | camera | right nan", "no way of a camera"),
        ("7-8 | camera | left -1", "no way of a camera"),
        ("8-7 | camera | left 1", "ends after its start"),
        ("1:99-2:00 | camera | left 1", "below 60"),
        ("7-8 | hard | night", "is no time"),
    ],
)
def test_a_wrong_line_is_named_with_its_file(tmp_path: Path, line: str, complaint: str) -> None:
    path = written(tmp_path, f"# comment\n0 a\n{line}\n")
    with pytest.raises(UserError, match=complaint) as error:
        PromptTimeline.from_file(path)
    assert str(error.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ('{"prompt": "b"}', "a span is an object"),
        ('{"start_seconds": 2, "prompt": "b", "fade": 1}', "a span is an object"),
        ('"b"', "a span is an object"),
        ('{"start_seconds": true, "prompt": "b"}', "must be a number"),
        ('{"start_seconds": NaN, "prompt": "b"}', "must be a number"),
        ('{"start_seconds": null, "prompt": "b"}', "must be a number"),
        ('{"start_seconds": 1e308, "prompt": "b"}', "must be a number"),
        ('{"start_seconds": 3, "prompt": 4}', "needs a prompt"),
        ('{"start_seconds": 0, "prompt": "b"}', "must start after"),
        ('{"start_seconds": 1, "camera": "right 1"}', "a camera move is an object"),
        ('{"start_seconds": 1, "end_seconds": 2, "camera": "right 1", "prompt": "b"}', "a camera move is an object"),
        ('{"start_seconds": 1, "end_seconds": true, "camera": "right 1"}', "must be a finite number"),
        ('{"start_seconds": 1, "end_seconds": 2, "camera": 1}', "no way of a camera"),
    ],
)
def test_a_wrong_entry_is_named_with_its_file(tmp_path: Path, entry: str, complaint: str) -> None:
    path = written(tmp_path, f'[{{"start_seconds": 0, "prompt": "a"}}, {entry}]', "timeline.json")
    with pytest.raises(UserError, match=complaint) as error:
        PromptTimeline.from_file(path)
    assert str(error.value).startswith(f"{path}, entry 2: ")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has no prompts"),
        ("# only\n", "has no prompts"),
        ("[", "line 1: this is not JSON"),
        ("[" * 100_000, "this is not JSON"),
        ("[]", "list of objects"),
        ("2 a\n", "line 1: the first prompt must start at 0"),
    ],
)
def test_a_file_without_a_timeline_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=complaint) as error:
        PromptTimeline.from_file(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.txt cannot be read: there is no such file\.$"):
        PromptTimeline.from_file(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"0 \xff\xfe")
    with pytest.raises(UserError, match="cannot be read: it is no UTF-8 text"):
        PromptTimeline.from_file(tmp_path / "bytes.txt")


def test_a_timeline_survives_json_and_refuses_other_values() -> None:
    timeline = PromptTimeline((PromptSpan(0, "a"), PromptSpan(1.25, "b", "hard")))
    assert PromptTimeline.from_dict(json.loads(json.dumps(timeline.to_dict()))) == timeline
    assert PromptTimeline.single("a").spans == (PromptSpan(0, "a"),)
    for values in ({}, {"spans": []}, {"spans": ["a"]}, {"spans": "a"}):
        with pytest.raises(UserError):
            PromptTimeline.from_dict(values)


@pytest.mark.parametrize("fps", [8, 16, 24, 30000 / 1001, 30])
@pytest.mark.parametrize(("chunk_frames", "given"), [(1, 0), (3, 0), (4, 0), (3, 1), (3, 7), (3, 6), (1, 4)])
def test_the_chunk_of_a_time_is_the_first_that_starts_no_earlier(fps: float, chunk_frames: int, given: int) -> None:
    grid = ChunkGrid(chunk_frames=chunk_frames, fps=fps, given_frames=given)
    whole, rest = divmod(given, chunk_frames)
    lengths = [*[chunk_frames] * whole, *([rest] if rest else []), *[chunk_frames] * 60]
    firsts = [pixel_frames(sum(lengths[:chunk]), 4) for chunk in range(len(lengths))]
    assert [grid.first_pixel_frame(chunk) for chunk in range(len(lengths))] == firsts
    for pixel in range(firsts[-1] + 1):
        expected = next(chunk for chunk, frame in enumerate(firsts) if frame >= pixel)
        assert grid.chunk_from(pixel / fps) == expected
        assert grid.chunk_from((pixel - 0.5) / fps) == expected  # between two frames the later counts


def test_the_pixel_frames_of_chunks_of_three_are_nine_then_twelve() -> None:
    firsts = [GRID.first_pixel_frame(chunk) for chunk in range(4)]
    assert firsts == [0, 9, 21, 33]
    assert GRID.start_seconds(1) == 9 / 16
    assert GRID.num_chunks(0.1) == 1
    assert GRID.num_chunks(60) == math.ceil((60 * 16 + 3) / 12)
    assert GRID.first_pixel_frame(GRID.num_chunks(60)) >= 60 * 16


def test_a_prompt_changes_exactly_at_its_chunk() -> None:
    timeline = PromptTimeline((PromptSpan(0, "a"), PromptSpan(9 / 16, "b"), PromptSpan(1.4, "c", "hard")))
    changes = timeline.changes(GRID, num_chunks=5)
    assert [(change.chunk, change.span.prompt) for change in changes] == [(0, "a"), (1, "b"), (3, "c")]
    assert timeline.problems(GRID, num_chunks=5) == ()
    assert timeline.grid_with_cuts(GRID).cuts == (3,)


def test_a_prompt_that_is_never_shown_is_reported_with_the_reason() -> None:
    timeline = PromptTimeline((PromptSpan(0, "a"), PromptSpan(1, "b"), PromptSpan(1.2, "c"), PromptSpan(60, "d")))
    changes = timeline.changes(GRID, num_chunks=10)
    assert [(change.chunk, change.span.prompt) for change in changes] == [(0, "a"), (2, "c")]
    short, late = timeline.problems(GRID, num_chunks=10)
    assert "'b' at 1 s" in short
    assert "starts with the same chunk; leave at least 0.75 s between two" in short
    assert "'d' at 60 s" in late
    assert "the video of 7.3125 s has its last chunk at 6.5625 s" in late


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunk_frames": 0},
        {"fps": 0},
        {"fps": 1000},
        {"temporal_stride": 0},
        {"given_frames": -1},
        {"cuts": (0,)},
        {"cuts": (4, 2)},
    ],
)
def test_a_grid_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        ChunkGrid(**{"chunk_frames": 3, "fps": 16, **wrong})


def test_times_are_read_as_people_write_them() -> None:
    assert [seconds_of(text) for text in ("0", "12.5", "1:05", "90:00", "1:00:30.5")] == [0, 12.5, 65, 5400, 3630.5]


def test_a_hard_cut_makes_its_chunk_shorter_and_all_later_ones_earlier() -> None:
    # 9 frames, then 12 each; the cut's chunk has 9 again.
    timeline = PromptTimeline((PromptSpan(0, "a"), PromptSpan(21 / 16, "b", "hard"), PromptSpan(42 / 16, "c", "hard")))
    changes = timeline.changes(GRID, num_chunks=9)
    assert [(change.chunk, change.span.prompt) for change in changes] == [(0, "a"), (2, "b"), (4, "c")]
    lengths = [9, 12, 9, 12, 9, 12, 12]
    starts = [timeline.start_seconds(chunk, GRID) * 16 for chunk in range(8)]
    assert starts == [sum(lengths[:chunk]) for chunk in range(8)]
    for count in range(1, 8):
        assert timeline.num_chunks(GRID, sum(lengths[:count]) / 16) == count
        assert timeline.num_chunks(GRID, (sum(lengths[:count]) - 0.5) / 16) == count
    soft = PromptTimeline(tuple(PromptSpan(span.start_seconds, span.prompt) for span in timeline.spans))
    assert [soft.num_chunks(GRID, seconds) for seconds in (0, 1, 60)] == [GRID.num_chunks(s) for s in (0, 1, 60)]


def test_a_hard_cut_that_is_not_shown_moves_nothing() -> None:
    timeline = PromptTimeline((PromptSpan(0, "a"), PromptSpan(0.6, "b", "hard"), PromptSpan(0.7, "c")))
    assert [change.span.prompt for change in timeline.changes(GRID, num_chunks=9)] == ["a", "c"]
    assert timeline.start_seconds(5, GRID) == GRID.start_seconds(5)


@pytest.mark.parametrize(("chunk_frames", "given"), [(1, 0), (2, 0), (3, 0), (4, 0), (3, 1), (3, 7), (1, 4), (4, 9)])
def test_any_number_of_frames_takes_as_few_chunks_as_hold_it_with_any_number_of_hard_cuts(
    chunk_frames: int, given: int
) -> None:
    grid = ChunkGrid(chunk_frames=chunk_frames, fps=16, given_frames=given)
    for count in range(5):
        cuts = tuple(PromptSpan(0.3 + 1.1 * number, f"cut {number}", "hard") for number in range(count))
        timeline = PromptTimeline((PromptSpan(0, "a"), *cuts))
        new_videos = {0} | {change.chunk for change in timeline.changes(grid, num_chunks=99)}
        firsts = [0]  # of every chunk, one latent frame after the other
        for chunk in range(98):
            latent_frames = grid.first_frame(chunk + 1) - grid.first_frame(chunk)
            firsts.append(firsts[-1] + 4 * latent_frames - 3 * (chunk in new_videos))
        assert [timeline.first_pixel_frame(chunk, grid) for chunk in range(99)] == firsts
        for pixels in range(1, 120):
            expected = next(chunk for chunk, first in enumerate(firsts) if first >= pixels)
            assert timeline.num_chunks_of(grid, pixels) == expected
            assert timeline.num_chunks(grid, pixels / 16) == expected


def test_a_prompt_that_would_start_within_given_frames_starts_with_the_first_chunk_that_is_made() -> None:
    grid = ChunkGrid(chunk_frames=3, fps=16, given_frames=7)
    timeline = PromptTimeline((PromptSpan(0, "a"), PromptSpan(0.5, "b", "hard"), PromptSpan(1, "c", "hard")))
    assert [(change.chunk, change.span.prompt) for change in timeline.changes(grid, num_chunks=9)] == [
        (0, "a"),
        (3, "c"),
    ]
    assert timeline.first_pixel_frame(4, grid) == 25 + 9
    assert "'b' at 0.5 s is not shown" in timeline.problems(grid, num_chunks=9)[0]

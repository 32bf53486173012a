"""`vidaccel rollout --camera` from outside: flag and lines of a timeline, sessions, what is said and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support import rollout_command
from tests.support.rollout_command import Command, interrupted_after
from vidaccel.cli import rollout_run
from vidaccel.rollout.camera import CameraPath
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.sessions.session import Session

plain_student_folder, plans, rollout = rollout_command.student_folder, rollout_command.plans, rollout_command.rollout
student_folder, no_pictures = rollout_command.camera_student_folder, rollout_command.no_pictures
MOVES = "1-1.6 right 1, 2.5-3 left 0.5"  # of chunks 2 and 4
GRID = ChunkGrid(chunk_frames=3, fps=16)


def positions(moves: str, num_chunks: int = 5) -> list[float]:
    path = CameraPath.parse(moves)
    return [position for chunk in range(num_chunks) for position in path.positions(chunk, GRID)]


def cameras(folder: Path, branch: str = "main") -> list[float]:
    """Where the camera was in every latent frame of a branch."""
    with Session.open(folder, read_only=True) as session:
        return [position for values in session.branch(branch).chunks() for position in values["camera"][0]]


@pytest.mark.usefixtures("no_pictures")
def test_the_flag_and_the_lines_of_a_timeline_move_the_camera_alike(rollout: Command, tmp_path: Path) -> None:
    (tmp_path / "timeline.txt").write_text("0 a red circle\n1-1.6 | camera | right 1\n2.5-3 | camera | left 0.5\n")
    assert rollout("a red circle", "--camera", MOVES, "--report", output=tmp_path / "flag.mp4") == 0
    assert rollout("--timeline", str(tmp_path / "timeline.txt"), output=tmp_path / "lines.mp4") == 0
    assert rollout("a red circle", output=tmp_path / "hold.mp4") == 0
    flag, lines, hold = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("flag", "lines", "hold"))
    assert flag == lines != hold
    assert json.loads((tmp_path / "flag.report.json").read_text())["camera"] == positions(MOVES)
    settings = json.loads((tmp_path / "flag.json").read_text())["settings"]
    assert settings["timeline"]["camera"] == CameraPath.parse(MOVES).to_dict()
    assert rollout("a red circle", output=tmp_path / "flag.mp4") == 2  # another video


def test_the_picture_of_a_report_shows_the_way_of_the_camera(rollout: Command, tmp_path: Path) -> None:
    heights = {}
    for name, flags in (("moved", ("--camera", MOVES)), ("held", ())):
        assert rollout("a red circle", *flags, "--report", output=tmp_path / f"{name}.mp4") == 0
        with Image.open(tmp_path / f"{name}.report.png") as picture:
            heights[name] = picture.size[1]
            colours = {pixel for _, pixel in picture.convert("RGB").getcolors(2**24) or ()}
        assert ((0x2A, 0x7F, 0x7F) in colours) == (name == "moved")
    assert heights["moved"] > heights["held"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("snapshot_every", ["0", "1"])
def test_a_rollout_that_goes_on_within_its_moves_gives_the_same_bytes(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot_every: str
) -> None:
    flags = ("a red circle", "--camera", MOVES, "--report")
    folder = ("--checkpoint", str(tmp_path / "session"), "--snapshot-every", snapshot_every)
    with monkeypatch.context() as patched:
        interrupted_after(3, patched, KeyboardInterrupt())
        assert rollout(*flags, *folder) == 130
    assert rollout(*flags, *folder, "--resume") == 0
    assert rollout(*flags, output=tmp_path / "whole.mp4") == 0
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    reports = [json.loads((tmp_path / f"{name}.report.json").read_text()) for name in ("video", "whole")]
    assert reports[0]["camera"] == reports[1]["camera"] == cameras(tmp_path / "session") == positions(MOVES)


def test_chunks_that_were_made_with_another_camera_are_not_gone_on_with(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = ("--checkpoint", str(tmp_path / "session")), tmp_path / "other.mp4"
    assert rollout("a red circle", "--camera", MOVES, *folder) == 0
    before = cameras(tmp_path / "session")
    none, moved = "no camera move there", "the camera move {!r} of {} there"
    for flags, chunk, made, wanted in (
        ((), 2, moved.format("right 1", "1 chunk"), none),
        (("--camera", "1-1.6 right 1"), 4, moved.format("left 0.5", "1 chunk"), none),
        (("--camera", f"0.5-0.9 left 1, {MOVES}"), 1, none, moved.format("left 1", "1 chunk")),
        (("--camera", "1-2.3 right 1"), 2, moved.format("right 1", "1 chunk"), moved.format("right 1", "2 chunks")),
    ):
        assert rollout("a red circle", *flags, *folder, "--resume", "--seconds", "4", output=output) == 2
        error = capsys.readouterr().err
        assert f"Chunk {chunk} of branch 'main' was made with {made}, and asked for is {wanted}" in error
        assert "--branch-from 5" in error
    assert not output.exists()
    assert cameras(tmp_path / "session") == before
    longer = f"{MOVES}, 3.5-4 right 2"  # what is to come may change
    assert rollout("a red circle", "--camera", longer, *folder, "--resume", "--seconds", "4", output=output) == 0
    assert cameras(tmp_path / "session") == positions(longer, 6)
    rewound = ("--camera", "1-1.6 right 1", "--rewind", "4")
    assert rollout("a red circle", *rewound, *folder, "--resume", output=tmp_path / "rewound.mp4") == 0
    assert cameras(tmp_path / "session") == positions("1-1.6 right 1")


@pytest.mark.parametrize(
    ("past", "moves", "together"),
    [
        ("1-1.6 right 0.3", "2.1-2.8 left 1", "1-1.6 right 0.3, 2.1-2.8 left 1"),  # after the move
        ("1-2.5 right 0.3", "2-2.7 left 1", "1-2.5 right 0.3, 2.5-3.2 left 1"),  # within it: it ends first
        ("1-1.6 right 0.3, 3-3.5 right 1", "1-1.6 left 0.5", "1-1.6 right 0.3"),  # what is past is past
    ],
)
def test_a_branch_goes_on_from_where_the_camera_was(
    rollout: Command, tmp_path: Path, past: str, moves: str, together: str
) -> None:
    folder = ("--checkpoint", str(tmp_path / "session"), "--snapshot-every", "0")
    assert rollout("a red circle", "--camera", past, *folder) == 0
    branch = (*folder, "--camera", moves, "--branch", "back")
    assert rollout("a red circle", *branch, "--branch-from", "3", output=tmp_path / "back.mp4") == 0
    whole = ("--camera", together, "--seconds", "4")
    assert rollout("a red circle", *whole, output=tmp_path / "whole.mp4") == 0
    again = (*branch, "--resume", "--seconds", "4")
    assert rollout("a red circle", *again, output=tmp_path / "again.mp4") == 0
    assert cameras(tmp_path / "session", "back") == positions(together, 6)
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.usefixtures("no_pictures")
def test_what_the_camera_saw_comes_back_from_the_session_and_an_interrupt_changes_nothing(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = "0.6-1.2 right 2, 1.3-1.9 right 2, 2.1-2.7 left 2, 4-4.6 right 2"
    flags = ("a red circle", "--camera", way, "--memory", "slow-fast:3+3+6", "--keyframe-rule", "none")
    flags = (*flags, "--retrieve-by", "view", "--report")
    folder = ("--checkpoint", str(tmp_path / "session"), "--seconds", "6")
    with monkeypatch.context() as patched:
        interrupted_after(6, patched, KeyboardInterrupt())
        assert rollout(*flags, *folder) == 130
    assert rollout(*flags, *folder, "--resume") == 0
    assert rollout(*flags, "--seconds", "6", output=tmp_path / "whole.mp4") == 0
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    reports = [json.loads((tmp_path / f"{name}.report.json").read_text()) for name in ("video", "whole")]
    assert reports[0]["num_returns"] == reports[1]["num_returns"] > 0
    assert reports[0]["memory"]["retrieve_by"] == "view"
    assert rollout(*flags[:-3], *folder, "--resume") == 2  # another memory


def test_the_plan_says_what_an_archive_takes_and_wrong_words_are_refused(
    rollout: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rollout("a red circle", "--plan") == 0
    assert "archive" not in capsys.readouterr().out
    assert rollout("a red circle", "--retrieve-by", "view", "--plan") == 0
    assert "archive" in capsys.readouterr().out
    for flags, words in (
        (("--retrieve-by", "text"), "`retrieve_by` must be one of none, view, keys; got 'text'"),
        (("--retrieve-by", "view", "--memory", "window:21"), "and there are 0 `slow_frames`"),
    ):
        assert rollout("a red circle", *flags, "--plan") == 2
        assert words in capsys.readouterr().err


def test_a_branch_remembers_the_hard_cuts_that_its_moves_were_made_over(rollout: Command, tmp_path: Path) -> None:
    (tmp_path / "timeline.txt").write_text("0 a red circle\n1-2.3 | camera | right 1\n2 | hard | a blue square\n")
    folder = ("--checkpoint", str(tmp_path / "session"), "--snapshot-every", "0")
    timeline = ("--timeline", str(tmp_path / "timeline.txt"))
    assert rollout(*timeline, *folder) == 0
    assert rollout("a blue square", *folder, "--branch", "on", "--branch-from", "4", output=tmp_path / "on.mp4") == 0
    assert (tmp_path / "on.mp4").read_bytes() == (tmp_path / "video.mp4").read_bytes()
    assert cameras(tmp_path / "session", "on") == cameras(tmp_path / "session")


def test_moves_are_said_by_the_plan_and_those_that_are_not_made_before_the_run(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rollout("a red circle", "--camera", MOVES, "--plan") == 0
    output = capsys.readouterr().out
    assert "Camera: right 1 from 1.3125 to 2.0625 s." in output
    assert "Camera: left 0.5 from 2.8125 to 3.5625 s." in output
    assert rollout("a red circle", "--camera", "90-91 right 1", "--seconds", "0.5") == 0
    assert "The camera move 'right 1' at 90 s is not made" in capsys.readouterr().err
    assert rollout("a red circle", "--camera", "1-2 right 1, 90-91 left 1", "--seconds", "3", "--plan") == 0
    output = capsys.readouterr().out
    assert "Camera: right 1 from " in output
    assert "Camera: left" not in output


def test_two_ways_to_share_a_memory_are_refused(rollout: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert rollout("a red circle", "--memory", "slow-fast:3+12+6%2", "--depth-every", "1", "--plan") == 2
    assert "--memory slow-fast:3+12+6%2 and --depth-every 1 say the same; give one" in capsys.readouterr().err


def test_two_cameras_and_what_is_none_are_refused(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollout_run, "load_pipeline", None)
    timeline = tmp_path / "timeline.txt"
    timeline.write_text("0 a red circle\n1-2 | camera | right 1\n")
    assert rollout("--timeline", str(timeline), "--camera", "2-3 left 1") == 2
    assert "The timeline has camera lines and --camera" in capsys.readouterr().err
    assert rollout("a red circle", "--camera", "two to the right") == 2
    assert "'two to the right' is no camera move; write `2-2.75 right 1" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"timeline.txt"}


def test_a_student_that_is_not_told_of_a_camera_refuses_one(
    rollout: Command,
    plain_student_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rollout_run, "load_pipeline", None)
    (tmp_path / "timeline.txt").write_text("0 a red circle\n1-2 | camera | right 1\n")
    for flags in (("a red circle", "--camera", MOVES), ("--timeline", str(tmp_path / "timeline.txt"))):
        assert rollout(*flags, "--model", str(plain_student_folder)) == 2
        error = capsys.readouterr().err
        assert "Moves of the camera (--camera, " in error
        assert f"{str(plain_student_folder)!r} is not: leave it out and say the move in the prompt" in error


def test_a_plan_warns_of_a_move_that_the_video_is_too_short_for(
    rollout: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rollout("a red circle", "--camera", "100-101 right 1", "--plan") == 0
    assert "is not made" in capsys.readouterr().err

"""Sessions of `vidaccel rollout` from outside: interrupts of every kind, going on, branches, what does not agree."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support import rollout_command
from tests.support.rollout_command import Command, interrupted_after
from tests.support.tiny_models import FPS
from vidaccel.cli import rollout_run, run
from vidaccel.rollout import resume
from vidaccel.sessions.session import Session
from vidaccel.video.files import read_video, save_frames
from vidaccel.video.streams import encode_segment

student_folder, plans, rollout = rollout_command.student_folder, rollout_command.plans, rollout_command.rollout
pytestmark = pytest.mark.usefixtures("no_pictures")
no_pictures = rollout_command.no_pictures
Whole = Callable[..., bytes]


@pytest.fixture(scope="module")
def wholes() -> dict[tuple[str, ...], bytes]:
    """Videos that were made in one go, by the arguments of the command."""
    return {}


@pytest.fixture
def whole(rollout: Command, tmp_path: Path, wholes: dict[tuple[str, ...], bytes]) -> Whole:
    """The bytes of a video that is made in one go, without a session; each once for all tests."""

    def made(*arguments: str) -> bytes:
        if arguments not in wholes:
            assert rollout(*arguments, output=tmp_path / "whole.mp4") == 0
            wholes[arguments] = (tmp_path / "whole.mp4").read_bytes()
        return wholes[arguments]

    return made


@pytest.mark.parametrize(
    ("error", "snapshot_every"),
    [(KeyboardInterrupt(), "0"), (SystemExit(143), "0"), (RuntimeError(), "2")],
    ids=["ctrl-c", "terminated", "crash"],
)
def test_an_interrupted_rollout_goes_on_to_the_same_bytes(
    rollout: Command,
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    snapshot_every: str,
) -> None:
    flags = ("a red circle", "--checkpoint", str(tmp_path / "session"), "--snapshot-every", snapshot_every)
    known = 2 if isinstance(error, RuntimeError) else 3
    with monkeypatch.context() as patched:
        interrupted_after(3, patched, error)
        if isinstance(error, KeyboardInterrupt):
            assert rollout(*flags) == 130
        else:
            with pytest.raises(type(error)):
                rollout(*flags)
    assert f"{known} chunks are kept in {tmp_path / 'session'}; go on with" in capsys.readouterr().err
    assert not (tmp_path / "video.mp4").exists()
    assert rollout(*flags) == 2
    assert "--resume" in capsys.readouterr().err
    assert rollout(*flags, "--resume", "--report") == 0
    assert (tmp_path / "video.mp4").read_bytes() == whole("a red circle")
    report = json.loads((tmp_path / "video.report.json").read_text())
    assert report["chunks"]["first_frame"] == [0, 3, 6, 9, 12]
    assert report["chunks"]["seconds"]["chunk"][:known] == [None] * known


def test_a_finished_session_gives_its_video_without_the_model_and_can_be_made_longer(
    rollout: Command, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("a red circle", "--checkpoint", str(tmp_path / "session"))
    assert rollout(*flags) == 0
    with monkeypatch.context() as patched:
        patched.setattr(rollout_run, "load_pipeline", None)
        assert rollout(*flags, "--resume", output=tmp_path / "again.mp4") == 0
        assert rollout(*flags, "--resume", "--seconds", "1", output=tmp_path / "short.mp4") == 0
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "video.mp4").read_bytes()
    assert len(read_video(tmp_path / "short.mp4")[0]) == 21
    assert rollout(*flags, "--resume", "--seconds", "4", output=tmp_path / "longer.mp4") == 0
    assert (tmp_path / "longer.mp4").read_bytes() == whole("a red circle", "--seconds", "4")


def test_a_killed_process_goes_on_to_the_same_bytes(
    rollout: Command, whole: Whole, student_folder: Path, tmp_path: Path
) -> None:
    flags = ["a red circle", "--seconds", "60", "--checkpoint", str(tmp_path / "session")]
    command = [sys.executable, "-m", "vidaccel", "rollout", "--model", str(student_folder)]
    command += ["--similarity-threshold", "1", "--output", str(tmp_path / "video.mp4"), *flags]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    journals = tmp_path / "session" / "journals"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sum(path.read_bytes().count(b"\n") for path in journals.glob("*")) >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with Session.open(tmp_path / "session", read_only=True) as session:
        kept = session.branch().num_chunks
    assert kept >= 2
    seconds = str((9 + 12 * (kept + 1)) / FPS)
    resumed = ("--checkpoint", str(tmp_path / "session"), "--resume", "--seconds", seconds)
    assert rollout("a red circle", *resumed) == 0
    assert (tmp_path / "video.mp4").read_bytes() == whole("a red circle", "--seconds", seconds)


def test_a_branch_shares_its_beginning_and_goes_on_under_another_prompt(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("--checkpoint", str(tmp_path / "session"))
    assert rollout("a red circle", *folder, output=tmp_path / "main.mp4") == 0
    branch = ("--branch", "other", "--branch-from", "2")
    assert rollout("a blue square", *folder, *branch, output=tmp_path / "other.mp4") == 0
    main, other = (read_video(tmp_path / name)[0] for name in ("main.mp4", "other.mp4"))
    assert torch.equal(main[:21], other[:21])
    assert not torch.equal(main[21:], other[21:])
    (tmp_path / "timeline.txt").write_text(f"0 a red circle\n{21 / FPS} a blue square\n")
    timeline = ("--timeline", str(tmp_path / "timeline.txt"))
    assert rollout(*timeline, output=tmp_path / "timeline.mp4") == 0
    assert (tmp_path / "timeline.mp4").read_bytes() == (tmp_path / "other.mp4").read_bytes()
    assert rollout("a blue square", *folder, *branch, output=tmp_path / "twice.mp4") == 2
    assert "a branch 'other'; give --resume to go on" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "num_given"), [("image", 1), ("video", 3)])
def test_a_start_is_the_beginning_of_the_video_and_of_its_session(
    rollout: Command, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, num_given: int
) -> None:
    torch.manual_seed(0)
    frames = torch.rand(1 if kind == "image" else 25, 3, 40, 40)
    if kind == "image":
        pixels = (frames[0] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "start.png")
    save_frames(tmp_path / "start.safetensors", frames)
    file = tmp_path / ("start.png" if kind == "image" else "start.safetensors")
    flags = ("a red circle", f"--{kind}", str(file), "--checkpoint", str(tmp_path / "session"))
    with monkeypatch.context() as patched:
        interrupted_after(num_given - 1, patched, KeyboardInterrupt())  # among what was given, for the clip
        assert rollout(*flags) == 130
    assert rollout(*flags, "--resume", "--report") == 0
    assert (tmp_path / "video.mp4").read_bytes() == whole("a red circle", f"--{kind}", str(file))
    report = json.loads((tmp_path / "video.report.json").read_text())
    firsts = report["chunks"]["first_frame"]
    assert firsts[: num_given + 2] == ([0, 1, 4] if kind == "image" else [0, 3, 6, 7, 10])
    assert report["num_passes"] == num_given + 3 * (len(firsts) - num_given)


def test_a_branch_begins_with_any_other_and_its_video_is_never_taken_for_another_one(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("--checkpoint", str(tmp_path / "session"), "--seconds", "2")  # three chunks
    assert rollout("a red circle", *folder, output=tmp_path / "red.mp4") == 0
    branch = ("--branch", "blue", "--branch-from", "1")
    assert rollout("a blue square", *folder, *branch, output=tmp_path / "blue.mp4") == 0
    branch = ("--branch", "green", "--branch-from", "2", "--from-branch", "blue")
    assert rollout("a green sky", *folder, *branch, output=tmp_path / "green.mp4") == 0
    with Session.open(tmp_path / "session", read_only=True) as session:
        prompts = [values["prompt"] for values in session.branch("green").chunks()]
        assert prompts == ["a red circle", "a blue square", "a green sky"]
        blue, green = (session.branch(name).latents(1)["latents"] for name in ("blue", "green"))
        assert torch.equal(blue, green)
    # The same words and settings, another video: it is not skipped as finished.
    assert rollout("a green sky", "--seconds", "2", output=tmp_path / "green.mp4") == 2
    error = capsys.readouterr().err
    assert "was not made with these settings (" in error
    assert " there, asked for " in error or " there and was not asked for" in error
    assert rollout("a green sky", *folder, *branch, "--resume", output=tmp_path / "green.mp4") == 0
    assert "finished before, skipped" in capsys.readouterr().out


def test_a_session_of_other_settings_or_prompts_is_not_gone_on_with(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = ("--checkpoint", str(tmp_path / "session"), "--seconds", "1"), tmp_path / "other.mp4"
    timeline = tmp_path / "timeline.txt"
    assert rollout("a red circle", *folder) == 0
    with Session.open(tmp_path / "session", read_only=True) as session:
        before = list(session.branch().chunks())
    for flags, complaint in (
        (("--seed", "3"), "seed is 0 there, asked for 3"),
        (("--width", "64"), "width is 48 there, asked for 64"),
        (("--memory", "window:6"), "memory.sink_frames is 3 there, asked for 0"),
        (("--guidance-scale", "2"), "guidance_scale is 1.0 there, asked for 2.0"),
        (("--fps", "8"), "fps is 16 there, asked for 8.0"),
    ):
        assert rollout("a red circle", *folder, "--resume", *flags, output=output) == 2
        assert complaint in capsys.readouterr().err
    assert rollout("a blue square", *folder, "--resume", output=output) == 2
    error = capsys.readouterr().err
    assert "Chunk 0 of branch 'main' was made with 'a red circle', and asked for is 'a blue square'" in error
    assert "--branch-from 2" in error
    timeline.write_text("0 a red circle\n0.5 | hard | a blue square\n")
    assert rollout("--timeline", str(timeline), *folder, "--resume", output=output) == 2
    assert "Chunk 1 of branch 'main'" in (error := capsys.readouterr().err)
    assert "'a blue square' from a hard cut at chunk 1 on" in error
    assert not output.exists()
    with Session.open(tmp_path / "session", read_only=True) as session:
        assert list(session.branch().chunks()) == before
    timeline.write_text("0 a red circle\n1 a blue square\n")  # what is to come may change
    assert rollout("--timeline", str(timeline), *folder, "--seconds", "2", "--resume", output=output) == 0
    assert rollout("--timeline", str(timeline), "--seconds", "2") == 2
    assert rollout("--timeline", str(timeline), "--seconds", "2", "--overwrite") == 0
    assert output.read_bytes() == (tmp_path / "video.mp4").read_bytes()


def test_rewinding_and_going_on_gives_the_same_video(rollout: Command, tmp_path: Path) -> None:
    (tmp_path / "timeline.txt").write_text("0 a red circle\n1 | hard | a blue square\n2 a green sky\n")
    flags = ("--timeline", str(tmp_path / "timeline.txt"), "--checkpoint", str(tmp_path / "session"))
    assert rollout(*flags) == 0
    for kept in (4, 1):
        assert run(["session", "rewind", str(tmp_path / "session"), "--to", str(kept)]) == 0
        assert rollout(*flags, "--resume", output=tmp_path / f"{kept}.mp4") == 0
        assert (tmp_path / f"{kept}.mp4").read_bytes() == (tmp_path / "video.mp4").read_bytes()


def test_small_states_are_kept_after_every_chunk_and_large_ones_seldom(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in (("small", 2**30), ("large", 2**10)):
        monkeypatch.setattr(resume, "_SMALL_STATE_BYTES", limit)
        with monkeypatch.context() as patched:
            interrupted_after(2, patched, KeyboardInterrupt())
            assert rollout("a red circle", "--checkpoint", str(tmp_path / name)) == 130
    for name, states in (("small", (2,)), ("large", ())):
        with Session.open(tmp_path / name, read_only=True) as session:
            assert session.branch().num_chunks == 2
            assert session.branch().snapshots == states


def test_a_full_disk_ends_it_with_what_is_finished(
    rollout: Command, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("a red circle", "--checkpoint", str(tmp_path / "session"))
    replace, left = os.replace, [20]

    def full(source: str, target: str) -> None:
        left[0] -= "session" in str(target)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        assert rollout(*flags) == 2
    error = capsys.readouterr().err
    assert "chunks are kept" in error
    assert "No space left on device" in error
    assert not (tmp_path / "video.mp4").exists()
    assert rollout(*flags, "--resume") == 0
    assert (tmp_path / "video.mp4").read_bytes() == whole("a red circle")


def test_two_processes_cannot_write_one_session(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("a red circle", "--checkpoint", str(tmp_path / "session"), "--seconds", "0.5")
    assert rollout(*flags) == 0
    with Session.open(tmp_path / "session"):
        assert rollout(*flags, "--resume", output=tmp_path / "other.mp4") == 2
    assert f"written by process {os.getpid()} (this one); wait for it or end it" in capsys.readouterr().err


def test_rewinding_on_the_way_gives_chunks_up_and_makes_them_anew(rollout: Command, tmp_path: Path) -> None:
    folder = ("--checkpoint", str(tmp_path / "session"))
    assert rollout("a red circle", *folder) == 0
    (tmp_path / "timeline.txt").write_text(f"0 a red circle\n{21 / FPS} a blue square\n")
    timeline = ("--timeline", str(tmp_path / "timeline.txt"))
    assert rollout(*timeline, *folder, "--resume", "--rewind", "2", output=tmp_path / "rewound.mp4") == 0
    assert rollout(*timeline, output=tmp_path / "whole.mp4") == 0
    assert (tmp_path / "rewound.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    with Session.open(tmp_path / "session", read_only=True) as session:
        prompts = [values["prompt"] for values in session.branch().chunks()]
    assert prompts == ["a red circle"] * 2 + ["a blue square"] * 3


def test_a_clip_stays_as_it_was_given_or_is_shown_as_it_is_decoded(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = torch.randint(256, (25, 3, 32, 48), dtype=torch.uint8)
    save_frames(tmp_path / "clip.safetensors", pixels)
    flags = ("a red circle", "--video", str(tmp_path / "clip.safetensors"), "--seconds", "2")
    assert rollout(*flags, "--checkpoint", str(tmp_path / "own"), output=tmp_path / "own.mp4") == 0
    assert "The video begins with the 25 frames of the clip, with the pixels that were given" in capsys.readouterr().err
    decoded = (*flags, "--checkpoint", str(tmp_path / "decoded"), "--decode-start")
    assert rollout(*decoded, output=tmp_path / "decoded.mp4") == 0
    assert "as the autoencoder decodes them" in capsys.readouterr().err
    with Session.open(tmp_path / "own") as own, Session.open(tmp_path / "decoded") as other:
        one, two = own.branch(), other.branch()
        assert one.num_chunks == two.num_chunks == 4
        assert [one.segment(chunk) == two.segment(chunk) for chunk in range(4)] == [False, False, False, True]
        assert one.segment(0) == encode_segment(pixels[:9], fps=FPS)
        assert all(torch.equal(one.latents(n)["latents"], two.latents(n)["latents"]) for n in range(4))
    wrong = ("--checkpoint", str(tmp_path / "own"), "--resume", "--decode-start")
    assert rollout(*flags, *wrong, output=tmp_path / "other.mp4") == 2
    assert "start_pixels is 'as given' there" in capsys.readouterr().err


def test_a_clip_as_long_as_the_video_is_refused(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_frames(tmp_path / "clip.safetensors", torch.rand(25, 3, 32, 48))
    monkeypatch.setattr(rollout_run, "load_pipeline", None)
    flags = ("a red circle", "--video", str(tmp_path / "clip.safetensors"), "--checkpoint", str(tmp_path / "session"))
    for seconds in ("1", str(25 / FPS)):
        assert rollout(*flags, "--seconds", seconds) == 2
        error = capsys.readouterr().err
        assert "The clip that the video begins with has 25 frames, 1.5625 s at 16 frames a second" in error
    assert {path.name for path in tmp_path.iterdir()} == {"clip.safetensors"}


@pytest.mark.parametrize("cuts", [1, 3])
def test_a_video_with_hard_cuts_is_as_long_as_was_asked_for(rollout: Command, tmp_path: Path, cuts: int) -> None:
    lines = [f"{0.6 + 0.7 * cut} | hard | a blue square" for cut in range(cuts)]
    (tmp_path / "timeline.txt").write_text("\n".join(["0 a red circle", *lines]))
    timeline = ("--timeline", str(tmp_path / "timeline.txt"), "--num-inference-steps", "1")
    assert rollout(*timeline, "--seconds", "3", output=tmp_path / "cut.mp4") == 0
    frames = len(read_video(tmp_path / "cut.mp4")[0])
    assert 48 <= frames < 48 + 12  # whole chunks of at most 12 frames, none too many

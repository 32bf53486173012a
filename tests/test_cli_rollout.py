"""`vidaccel rollout` from outside: its video, its session after every kind of interrupt, what it says and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import tiny_student

from vidaccel.cli import rollout_run, run
from vidaccel.cli.rollout_progress import ChunkCounter
from vidaccel.cli.rollout_request import RolloutRequest
from vidaccel.rollout import plan
from vidaccel.rollout.chunk import Chunk
from vidaccel.rollout.plan import RolloutPlan
from vidaccel.rollout.session import Session
from vidaccel.video import read_video, save_frames

Command = Callable[..., int]
FPS = 16


@pytest.fixture(scope="session")
def student_folder(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny random causal student."""
    folder = tmp_path_factory.mktemp("student")
    tiny_student(tiny_wan_folder).save_pretrained(folder)
    settings = {"defaults": {"height": 32, "width": 48, "fps": FPS, "max_sequence_length": 16}}
    (folder / "vidaccel.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def rollout(student_folder: Path, tmp_path: Path) -> Command:
    """`vidaccel rollout` with the tiny student; 3 seconds are 5 chunks: 9 + 4 * 12 pixel frames."""

    def call(*arguments: str, output: Path | str = tmp_path / "video.mp4") -> int:
        sizes = ("--seconds", "3", "--similarity-threshold", "1")
        return run(["rollout", "--model", str(student_folder), "--output", str(output), *sizes, *arguments])

    return call


@pytest.fixture(autouse=True)
def _planned_once(monkeypatch: pytest.MonkeyPatch, plans: dict[Any, RolloutPlan]) -> None:
    """Measure every size once for all tests of this file, for the time it takes."""
    measure = RolloutRequest.plan

    def plan_of(request: RolloutRequest) -> RolloutPlan:
        size = (request.memory, request.request.height, request.request.width, request.is_guided)
        key = (*size, plan.available_bytes)
        if key not in plans:
            plans[key] = measure(request)
        return plans[key]

    monkeypatch.setattr(RolloutRequest, "plan", plan_of)


@pytest.fixture(scope="module")
def plans() -> dict[Any, RolloutPlan]:
    return {}


@pytest.fixture(autouse=True)
def _no_half_written_files(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]


def interrupted_after(num_chunks: int, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    """Let the rollout be interrupted while the chunk after `num_chunks` is made."""
    chunks = rollout_run._chunks

    def stopping(*arguments: Any) -> Iterator[Chunk]:
        for chunk in chunks(*arguments):
            if chunk.index == num_chunks:
                raise kind
            yield chunk

    monkeypatch.setattr(rollout_run, "_chunks", stopping)


def test_a_prompt_becomes_a_video_with_a_sidecar(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rollout("a red circle", "--report") == 0
    names = {"video.mp4", "video.json", "video.report.json", "video.report.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    frames, fps = read_video(tmp_path / "video.mp4")
    assert frames.shape == (9 + 4 * 12, 3, 32, 48)
    assert fps == FPS
    sidecar = json.loads((tmp_path / "video.json").read_text())
    assert sidecar["settings"]["memory"]["slow_frames"] == 3
    assert sidecar["settings"]["timeline"] == {"spans": [{"start_seconds": 0, "prompt": "a red circle", "cut": "soft"}]}
    assert sidecar["result"]["num_passes"] == 5 * (2 + 1)
    assert sidecar["result"]["memory_bytes"]["reserved"] > 0
    assert set(sidecar["files"]) == names
    report = json.loads((tmp_path / "video.report.json").read_text())
    assert report["chunks"]["first_frame"] == [0, 3, 6, 9, 12]
    assert set(report["seconds"]) >= {"denoising", "commit", "decoding", "chunk"}
    assert "3.56 s, 57 frames of 48x32, 5 chunks" in capsys.readouterr().out


def test_a_finished_video_is_skipped_and_another_one_not_written_over(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rollout("a red circle") == 0
    before = (tmp_path / "video.mp4").read_bytes()
    assert rollout("a red circle") == 0
    assert "finished before, skipped" in capsys.readouterr().out
    assert rollout("a blue square") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "video.mp4").read_bytes() == before
    assert rollout("a blue square", "--overwrite") == 0
    assert (tmp_path / "video.mp4").read_bytes() != before


def test_the_beginning_does_not_depend_on_the_length(rollout: Command, tmp_path: Path) -> None:
    assert rollout("a red circle", output=tmp_path / "long.mp4") == 0
    assert rollout("a red circle", "--seconds", "1", output=tmp_path / "short.mp4") == 0
    long, short = (read_video(tmp_path / name)[0] for name in ("long.mp4", "short.mp4"))
    assert torch.equal(long[: len(short)], short)
    assert len(short) == 21


@pytest.mark.parametrize(
    ("kind", "snapshot_every"), [(KeyboardInterrupt, "0"), (RuntimeError, "2")], ids=["ctrl-c", "crash"]
)
def test_an_interrupted_rollout_goes_on_to_the_same_bytes(
    rollout: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type[BaseException],
    snapshot_every: str,
) -> None:
    flags = ("a red circle", "--checkpoint", str(tmp_path / "session"), "--snapshot-every", snapshot_every)
    assert rollout("a red circle", output=tmp_path / "whole.mp4") == 0
    with monkeypatch.context() as patched:
        interrupted_after(3, patched, kind)
        if kind is KeyboardInterrupt:
            assert rollout(*flags) == 130
            assert "3 chunks are kept" in capsys.readouterr().err
        else:
            with pytest.raises(RuntimeError):
                rollout(*flags)
    assert not (tmp_path / "video.mp4").exists()
    assert rollout(*flags) == 2
    assert "--resume" in capsys.readouterr().err
    assert rollout(*flags, "--resume", "--report") == 0
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    report = json.loads((tmp_path / "video.report.json").read_text())
    assert report["chunks"]["first_frame"] == [0, 3, 6, 9, 12]
    known = 3 if kind is KeyboardInterrupt else 2
    assert report["chunks"]["seconds"]["chunk"][:known] == [None] * known


def test_a_finished_session_gives_its_video_without_the_model_and_can_be_made_longer(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert rollout("a red circle", "--seconds", "4", output=tmp_path / "whole.mp4") == 0
    assert (tmp_path / "longer.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_killed_process_goes_on_to_the_same_bytes(rollout: Command, student_folder: Path, tmp_path: Path) -> None:
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
    assert rollout("a red circle", "--seconds", seconds, output=tmp_path / "whole.mp4") == 0
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


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
    assert "a branch 'other'" in capsys.readouterr().err


def test_prompts_change_at_their_chunks_and_those_not_shown_are_said(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "timeline.txt").write_text("0 a red circle\n1 | hard | a blue square\n90 a green sky\n")
    assert rollout("--timeline", str(tmp_path / "timeline.txt"), "--report") == 0
    assert "'a green sky' at 90 s is not shown" in capsys.readouterr().err
    report = json.loads((tmp_path / "video.report.json").read_text())
    assert report["prompts"] == [{"chunk": 0, "prompt": "a red circle"}, {"chunk": 2, "prompt": "a blue square"}]
    frames, _ = read_video(tmp_path / "video.mp4")
    assert len(frames) == report["num_pixel_frames"] == 9 + 12 + 9 + 12 + 12  # a hard cut begins a video


def test_words_that_have_no_effect_are_named(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "timeline.txt").write_text("0 a red zebra\n1 a blue circle, quagga\n")
    assert rollout("--timeline", str(tmp_path / "timeline.txt"), "--negative-prompt", "okapi") == 0
    assert "does not know zebra, quagga, okapi" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "num_given"), [("image", 1), ("video", 3)])
def test_a_start_is_the_beginning_of_the_video_and_of_its_session(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, num_given: int
) -> None:
    torch.manual_seed(0)
    frames = torch.rand(1 if kind == "image" else 25, 3, 40, 40)
    if kind == "image":
        pixels = (frames[0] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "start.png")
    save_frames(tmp_path / "start.safetensors", frames)
    file = tmp_path / ("start.png" if kind == "image" else "start.safetensors")
    flags = ("a red circle", f"--{kind}", str(file), "--checkpoint", str(tmp_path / "session"))
    assert rollout("a red circle", f"--{kind}", str(file), output=tmp_path / "whole.mp4") == 0
    with monkeypatch.context() as patched:
        interrupted_after(num_given - 1, patched, KeyboardInterrupt)  # among what was given, for the clip
        assert rollout(*flags) == 130
    assert rollout(*flags, "--resume", "--report") == 0
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    report = json.loads((tmp_path / "video.report.json").read_text())
    firsts = report["chunks"]["first_frame"]
    assert firsts[: num_given + 2] == ([0, 1, 4] if kind == "image" else [0, 3, 6, 7, 10])
    assert report["num_passes"] == num_given + 3 * (len(firsts) - num_given)


def test_guidance_has_twice_the_passes(rollout: Command, tmp_path: Path) -> None:
    assert rollout("a red circle", "--guidance-scale", "3", "--num-inference-steps", "3") == 0
    sidecar = json.loads((tmp_path / "video.json").read_text())
    assert sidecar["result"]["num_passes"] == 2 * 5 * (3 + 1)


def test_the_plan_is_said_and_nothing_else_done(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollout_run, "load_pipeline", None)
    assert rollout("a red circle", "--plan") == 0
    output = capsys.readouterr().out
    for word in ("slow", "keyframes", "denoising", "decoding", "most at once", "It fits."):
        assert word in output
    assert not list(tmp_path.iterdir())


def test_a_video_that_does_not_fit_is_refused_before_the_model_is_loaded(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollout_run, "load_pipeline", None)
    monkeypatch.setattr("vidaccel.rollout.plan.available_bytes", lambda device: 2**10)
    assert rollout("a red circle") == 2
    assert "of memory on cpu and 1 MiB are free" in capsys.readouterr().err
    assert rollout("a red circle", "--checkpoint", str(tmp_path / "session")) == 2
    assert not list(tmp_path.iterdir())
    assert rollout("a red circle", "--plan") == 0
    assert "It does not fit" in capsys.readouterr().out


def test_a_player_gets_the_video_and_nothing_else(
    rollout: Command, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert rollout("a red circle", output="-") == 0
    stream = capfdbinary.readouterr().out
    assert len(stream) % 188 == 0
    assert stream[0] == 0x47  # packets of a transport stream
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "with --timeline; one of them"),
        (("a", "--timeline", "none.txt"), "one of them"),
        (("--timeline", "none.txt"), "cannot be read"),
        (("a", "--seconds", "0"), "`seconds` must be above 0"),
        (("a", "--seconds", "inf"), "`seconds` must be above 0"),
        (("a", "--fps", "0"), "`fps` must be above 0"),
        (("a", "--height", "40"), "multiples of 16"),
        (("a", "--memory", "slow:3"), "A memory must be"),
        (("a", "--memory", "slow-fast:3+4+6"), "divisible by `chunk_frames`"),
        (("a", "--memory", "full:9"), "at most 9 latent frames and the video has 15"),
        (("a", "--memory", "window:9999"), "has 32 positions"),
        (("a", "--keyframe-rule", "often"), "`keyframe_rule` must be one of"),
        (("a", "--keyframe-rule", "uniform", "--keyframe-interval", "0"), "`keyframe_interval`"),
        (("a", "--num-inference-steps", "0"), "`num_inference_steps` must be at least 1"),
        (("a", "--seed", "-1"), "`seed`"),
        (("a", "--passes", "fast"), "`passes` must be one of"),
        (("a", "--passes", "captured", "--device", "cpu"), "on CUDA only"),
        (("a", "--resume"), "give --checkpoint DIR"),
        (("a", "--branch", "b"), "give --checkpoint DIR"),
        (("a", "--checkpoint", "none", "--resume"), "no session in none"),
        (("a", "--checkpoint", "none", "--branch-from", "2"), "name it with --branch"),
        (("a", "--checkpoint", "none", "--branch", "b"), "goes on with --resume"),
        (("a", "--checkpoint", "none", "--snapshot-every", "-1"), "`snapshot_every`"),
        (("a", "--image", "none.png"), "no file or folder none.png"),
        (("a", "--image", "a.png", "--video", "b.mp4"), "--image or --video"),
        (("a", "--output", "video.avi"), "must end in"),
        (("a", "--output", "-", "--report"), "give --output a file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    rollout: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rollout(*arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_kind_is_refused(tiny_wan_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rollout", "a", "--model", str(tiny_wan_folder)]) == 2
    assert "is a WanPipeline; make one with `vidaccel convert causal-wan`" in capsys.readouterr().err


def test_a_session_of_other_settings_is_not_gone_on_with(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--checkpoint", str(tmp_path / "session"))
    assert rollout("a red circle", *flags) == 0
    assert rollout("a red circle", *flags, "--resume", "--seed", "3", output=tmp_path / "other.mp4") == 2
    assert "seed is 0 there, asked for 3" in capsys.readouterr().err
    assert not (tmp_path / "other.mp4").exists()


def test_the_progress_line_says_time_speed_memory_and_keyframes() -> None:
    times = iter([1.0, 1.5, 2.5])
    counter = ChunkCounter(fps=16, seconds=2.0, clock=lambda: next(times))
    chunk = Chunk(
        index=0,
        first_frame=0,
        latents=torch.zeros(1, 1, 3, 1, 1),
        frames=torch.zeros(1, 12, 3, 1, 1, dtype=torch.uint8),
        prompt="a",
        seconds={},
        sink=(0, 1, 2),
        slow=(6, 9),
        fast=(10, 11),
        is_keyframe=False,
        similarity=None,
    )
    sizes = {"sink": 3 * 2**20, "slow": 0, "fast": 2**30, "reserved": 2**33}
    assert counter.add(chunk, sizes) == "2.8 s of video | memory: sink 3 MiB, fast 1.0 GiB | 2 keyframes"
    assert counter.rate is None
    assert "24.0 frames/s" in counter.add(chunk, sizes)
    assert "16.0 frames/s" in counter.add(chunk, sizes)

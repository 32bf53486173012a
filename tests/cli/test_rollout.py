"""`vidaccel rollout` from outside: its video, its files, what it says and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import rollout_command
from tests.support.rollout_command import Command, decoder_file
from tests.support.tiny_models import FPS
from vidaccel.cli import rollout_run, run
from vidaccel.cli.app import COMMANDS, LazyCommand
from vidaccel.cli.rollout_progress import ChunkCounter
from vidaccel.memory import POLICIES
from vidaccel.models.taehv import TinyWanDecoder
from vidaccel.rollout import PassMode
from vidaccel.rollout.chunk import Chunk, Student
from vidaccel.rollout.plan import RolloutPlan
from vidaccel.rollout.state import RolloutState
from vidaccel.sessions.session import Session
from vidaccel.video.files import read_video
from vidaccel.video.frames import rounded_to_uint8
from vidaccel.video.streams import encode_segment

student_folder, plans, rollout = rollout_command.student_folder, rollout_command.plans, rollout_command.rollout
no_pictures = rollout_command.no_pictures


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
    assert set(report["seconds"]) >= {"denoising", "clean_pass", "decoding", "chunk"}
    assert "3.56 s, 57 frames of 48x32, 5 chunks" in capsys.readouterr().out


def test_the_help_of_memory_shows_every_policy_of_the_table() -> None:
    command: Any = LazyCommand("rollout", module=COMMANDS["rollout"][0], help="").load()
    (text,) = (option.help for option in command.params if option.name == "memory")
    assert all(row.form in text for row in POLICIES.values())


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


@pytest.mark.usefixtures("no_pictures")
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


def test_a_small_decoder_makes_the_pixels_and_is_said_and_planned(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = decoder_file(tmp_path / "tiny.safetensors")
    flags = ("a red circle", "--seconds", "1", "--decoder", str(file))
    assert rollout(*flags, "--plan") == 0
    assert "small decoder" in capsys.readouterr().out
    (tmp_path / "out").mkdir()
    assert rollout(*flags, "--checkpoint", str(tmp_path / "s"), "--report", output=tmp_path / "out" / "video.mp4") == 0
    report = json.loads((tmp_path / "out" / "video.report.json").read_text())
    assert report["decoder"] == "tiny.safetensors"
    with Session.open(tmp_path / "s", read_only=True) as session:
        latents = [session.branch().latents(chunk)["latents"] for chunk in range(2)]
    frames = TinyWanDecoder.from_single_file(file).decode(torch.cat(latents, dim=2))
    encoded = encode_segment(rounded_to_uint8(frames[0, 9:]), fps=FPS)
    with Session.open(tmp_path / "s", read_only=True) as session:
        assert session.branch().segment(1) == encoded
    other = decoder_file(tmp_path / "tiny.safetensors", seed=1)
    resumed = ("a red circle", "--checkpoint", str(tmp_path / "s"), "--resume", "--seconds", "2")
    assert rollout(*resumed, "--decoder", str(other)) == 2
    assert "decoder is '" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"latent_channels": 48, "patch_size": 2}, "channels are 48, and"),
        ({"time_factors": (1, 1, 2)}, "pixel frames a latent frame are 2, and"),
        ({"patch_size": 2}, "pixels a side are 16, and"),
    ],
)
def test_a_decoder_of_other_latents_is_refused(
    rollout: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: dict[str, Any], complaint: str
) -> None:
    assert rollout("a", "--decoder", str(decoder_file(tmp_path / "tiny.safetensors", **sizes))) == 2
    assert complaint in capsys.readouterr().err


def test_passes_are_sped_up_as_asked_for(rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def speed_up(student: Student, state: RolloutState, mode: PassMode) -> Student:
        asked.append((mode, state.num_chunks, type(state.decoder).__name__))
        return student

    monkeypatch.setattr(rollout_run, "speed_up", speed_up)
    assert rollout("a", "--passes", "compiled", "--seconds", "1", output=tmp_path / "fast.mp4") == 0
    assert rollout("a", "--seconds", "1") == 0
    assert asked == [("compiled", 0, "StreamingDecoder"), ("eager", 0, "StreamingDecoder")]


def test_guidance_has_twice_the_passes(rollout: Command, tmp_path: Path) -> None:
    assert rollout("a red circle", "--guidance-scale", "3", "--num-inference-steps", "3") == 0
    sidecar = json.loads((tmp_path / "video.json").read_text())
    assert sidecar["result"]["num_passes"] == 2 * 5 * (3 + 1)


def test_a_step_that_is_left_out_is_a_pass_less_in_every_chunk(rollout: Command, tmp_path: Path) -> None:
    assert rollout("a red circle", "--skip-steps", "2", "--num-inference-steps", "3") == 0
    sidecar = json.loads((tmp_path / "video.json").read_text())
    assert sidecar["settings"]["skip_steps"] == "2"
    assert sidecar["result"]["num_passes"] == 5 * (2 + 1)


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
    rollout: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plans: dict[Any, RolloutPlan],
) -> None:
    monkeypatch.setattr(rollout_run, "load_pipeline", None)
    assert rollout("a red circle", "--plan") == 0
    enough = list(plans.values())[-1].total_bytes
    monkeypatch.setattr("vidaccel.rollout.plan.available_bytes", lambda device: enough - 1)  # one change will do
    capsys.readouterr()
    assert rollout("a red circle") == 2
    assert "are free; change in this order: calculate in bfloat16" in capsys.readouterr().err
    assert rollout("a red circle", "--checkpoint", str(tmp_path / "session")) == 2
    assert not list(tmp_path.iterdir())
    assert rollout("a red circle", "--plan") == 0
    assert "Does not fit" in capsys.readouterr().out


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
        (("a", "--fps", "0"), "`fps` must be"),
        (("a", "--height", "40"), "multiples of 16"),
        (("a", "--memory", "slow:3"), "A memory must be"),
        (("a", "--memory", "slow-fast:3+4+6"), "divisible by `chunk_frames`"),
        (("a", "--memory", "full:9"), "at most 9 latent frames and the video has 15"),
        (("a", "--memory", "window:9999"), "has 32 positions"),
        (("a", "--keyframe-rule", "often"), "`keyframe_rule` must be one of"),
        (("a", "--keyframe-rule", "uniform", "--keyframe-interval", "0"), "`keyframe_interval`"),
        (("a", "--skip-steps", "last"), "are written as '3' or '2+3'"),
        (("a", "--skip-steps", "9"), "Step 9 cannot be left out of 2; name steps up to 2"),
        (("a", "--skip-steps", "1+2"), "compute at least one"),
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
        (("a", "--checkpoint", "none", "--from-branch", "b"), "say how far: --branch-from N"),
        (("a", "--checkpoint", "x" * 300), "File name too long"),
        (("a", "--snapshot-every", "3"), "--snapshot-every is about a saved session"),
        (("a", "--from-branch", "b"), "--from-branch is about a saved session"),
        (("a", "--seconds", "nan"), "`seconds` must be above 0"),
        (("a", "--fps", "nan"), "`fps` must be"),
        (("a", "--similarity-threshold", "nan"), "`similarity_threshold` must be"),
        (("a", "--guidance-scale", "nan"), "`guidance_scale` must be"),
        (("a", "--height", "1e400"), "Invalid value for '--height'"),
        (("a", "--decoder", "none.safetensors"), "no file or folder none.safetensors"),
        (("a", "--decoder", __file__), "no .safetensors file"),
        (("a", "--image", "x" * 300), "File name too long"),
        (("a", "--model", "x" * 300), "File name too long"),
        (("a", "--output", "x" * 300), "File name too long"),
        (("a", "--model", "wan2.1-t2v-1.3b"), "is a WanPipeline"),
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

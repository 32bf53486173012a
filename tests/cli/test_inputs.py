"""Clips that a command is given keep their speed: the frame rate of the file becomes that of the video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import rollout_command as fixtures
from tests.support.clips import numbered_frames, numbers_of, write_moving_picture, write_varying_video
from vidaccel.cli import rollout_run, run, runs
from vidaccel.generation.request import GenerationRequest
from vidaccel.video.clips import read_clip
from vidaccel.video.files import save_frames, write_video

student_folder = fixtures.student_folder
CLIPS = ("video", "mask", "pose_video", "face_video")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the commands would make: the requests that they come to."""
    found: list[Any] = []

    def generated(_: Any, requests: list[GenerationRequest], **__: Any) -> None:
        found.extend(requests)

    monkeypatch.setattr(runs, "run_jobs", generated)
    monkeypatch.setattr(rollout_run, "run_rollout", lambda request, **_: found.append(request))
    return found


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """92 frames at 30 a second: 3.07 s."""
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", numbered_frames(92, 32, 48), fps=30)


@pytest.mark.parametrize("name", CLIPS)
def test_every_clip_of_a_request_is_brought_to_the_rate_of_the_video(
    name: str, clip: Path, requests: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--{name.replace('_', '-')}"
    for flags in ((), ("--fps", "8"), ("--fps", "30"), ("--keep-frames",)):
        assert run(["generate", "a red ball", "--model", "wan2.1-vace-1.3b", flag, str(clip), *flags]) == 0
    counts = [len(request.inputs[name]) for request in requests]
    assert counts == [49, 25, 92, 92]
    assert numbers_of(requests[0].inputs[name]) == list(read_clip(clip, fps=16).chosen)
    said = [line for line in capsys.readouterr().err.splitlines() if "clip.mp4" in line]
    assert said == [
        f"{flag} clip.mp4: 92 frames at 30 a second became {count} at {fps}, so that its 3.07 s stay as long; "
        "--keep-frames takes them as they are."
        for count, fps in ((49, 16), (25, 8))
    ]


def test_the_clip_that_a_rollout_goes_on_from_keeps_its_speed(
    clip: Path, requests: list[Any], student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ((), ("--keep-frames",)):
        command = ["rollout", "a red ball", "--model", str(student_folder), "--video", str(clip), *flags]
        assert run([*command, "--seconds", "10"]) == 0
    assert [len(request.start) for request in requests] == [49, 92]
    assert numbers_of(requests[0].start) == list(read_clip(clip, fps=16).chosen)
    captured = capsys.readouterr()
    assert captured.err.count("92 frames at 30 a second became 49 at 16") == 1
    assert captured.out == ""  # it may be the video itself


def test_varying_rates_and_moving_pictures_are_brought_to_the_rate_too(
    tmp_path: Path, requests: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_varying_video(tmp_path / "clip.mp4", numbered_frames(4), shown=[1, 4, 2, 1], unit=8)
    picture = write_moving_picture(tmp_path / "clip.webp", numbered_frames(3), milliseconds=[500, 125, 375])
    files = ("--video", str(video), "--pose-video", str(picture))
    assert run(["generate", "a red ball", "--model", "wan2.1-vace-1.3b", "--fps", "8", *files]) == 0
    assert numbers_of(requests[0].inputs["video"])[:7] == [0, 1, 1, 1, 1, 2, 2]
    assert numbers_of(requests[0].inputs["pose_video"]) == [0, 0, 0, 0, 1, 2, 2, 2]
    said = capsys.readouterr().err
    assert "4 frames at varying rate became" in said
    assert "3 frames at varying rate became 8 at 8" in said


def test_what_has_no_rate_stays_as_it_is_and_nothing_is_said(
    tmp_path: Path, requests: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "video": save_frames(tmp_path / "frames", numbered_frames(12)),
        "pose_video": save_frames(tmp_path / "frames.safetensors", numbered_frames(12)),
        "mask": tmp_path / "mask.png",
    }
    Image.fromarray(np.full((16, 32), 32768, np.uint16)).save(files["mask"])
    flags = [part for name, file in files.items() for part in (f"--{name.replace('_', '-')}", str(file))]
    assert run(["generate", "a red ball", "--model", "wan2.1-vace-1.3b", "--fps", "5", *flags]) == 0
    inputs = requests[0].inputs
    assert numbers_of(inputs["video"]) == numbers_of(inputs["pose_video"]) == list(range(12))
    torch.testing.assert_close(inputs["mask"], torch.full((1, 3, 16, 32), 0.5), atol=1e-4, rtol=0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", ["--image", "--video", "--mask"])
def test_pictures_that_cannot_be_read_are_one_line(
    flag: str, tmp_path: Path, requests: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((8, 8), 128.0, np.float32)).save(tmp_path / "depth.tif")
    assert run(["generate", "a red ball", "--model", "wan2.1-vace-1.3b", flag, str(tmp_path / "depth.tif")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "vidaccel: depth.tif holds floats from 128 to 128; only 0 to 1 can be read, so divide them."
    ]
    assert not requests

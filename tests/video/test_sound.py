"""Sound beside the pictures: as loud as its numbers say, and no longer than they are."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.clips import moving_blocks
from vidaccel.errors import UserError
from vidaccel.video.files import write_video
from vidaccel.video.sound import as_waveform

RATE = 16000


def heard(path: Path) -> np.ndarray:
    """The sound of a video file, in [-1, 1]."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-vn", "-f", "f32le", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.float32)


def tone(seconds: float) -> Tensor:
    return 0.5 * torch.sin(torch.arange(round(seconds * RATE)) * 0.2)[None]


@pytest.mark.parametrize(
    ("dtype", "scale", "middle"),
    [
        (torch.int16, 2**15, 0),
        (torch.int32, 2**31, 0),
        (torch.uint8, 2**7, 2**7),
        (torch.int8, 2**7, 0),
        (torch.float64, 1, 0),
        (torch.bfloat16, 1, 0),
    ],
)
def test_sound_is_as_loud_whatever_its_numbers(tmp_path: Path, dtype: torch.dtype, scale: int, middle: int) -> None:
    sound = (tone(1).double() * scale + middle).to(dtype)
    torch.testing.assert_close(as_waveform(sound), tone(1), atol=1 / 100, rtol=0)
    path = write_video(tmp_path / "clip.mp4", moving_blocks(8), fps=8, sound=(sound, RATE))
    assert np.abs(heard(path)).max() == pytest.approx(0.5, abs=0.1)


def test_the_ends_of_the_range_are_silence_between_and_full_loudness() -> None:
    assert as_waveform(torch.tensor([0, 128, 255], dtype=torch.uint8)).tolist() == [-1, 0, 127 / 128]
    assert as_waveform(torch.tensor([-(2**15), 0, 2**15 - 1], dtype=torch.int16)).tolist() == [-1, 0, 32767 / 32768]
    assert as_waveform(torch.tensor([-(2**31), 0], dtype=torch.int32)).tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("seconds", "length", "message"),
    [
        (3.0, 1.0, "3.00 s long and the pictures are 1.00 s; it is cut"),
        (0.5, 0.5, "the rest is silent"),
        (1.05, 1.0, ""),
    ],
)
def test_sound_ends_with_the_pictures_and_what_is_heard_of_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seconds: float, length: float, message: str
) -> None:
    path = write_video(tmp_path / "clip.mp4", moving_blocks(8), fps=8, sound=(tone(seconds), RATE))
    assert len(heard(path)) / RATE == pytest.approx(length, abs=2048 / RATE)  # whole blocks of AAC
    assert message in "".join(record.message for record in caplog.records)
    assert bool(caplog.records) == bool(message)


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (torch.zeros(1, 0), "not empty"),
        (torch.zeros(3, 100), "1 or 2 channels"),
        (torch.zeros(100), "1 or 2 channels"),
        (torch.zeros(1, 100, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(1, 100, dtype=torch.bool), "got torch.bool"),
    ],
)
def test_sound_that_cannot_be_is_refused_and_leaves_no_file(tmp_path: Path, sound: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_video(tmp_path / "clip.mp4", moving_blocks(2), fps=8, sound=(sound, RATE))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [0, float("nan"), float("inf")])
def test_a_rate_that_no_sound_has_is_refused(tmp_path: Path, rate: float) -> None:
    with pytest.raises(UserError, match=f"at {rate}"):
        write_video(tmp_path / "clip.mp4", moving_blocks(2), fps=8, sound=(torch.zeros(1, 100), rate))  # type: ignore[arg-type]


def test_sound_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a tensor"):
        write_video(tmp_path / "clip.mp4", moving_blocks(2), fps=8, sound=([0.0, 0.5], RATE))  # type: ignore[arg-type]

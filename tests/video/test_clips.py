"""Clips of every kind of file: all frames, in their order, at their time."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.support.clips import numbered_frames, numbers_of, write_moving_picture, write_varying_video
from vidaccel.errors import UserError
from vidaccel.video.clips import read_clip
from vidaccel.video.files import load_frames, read_video, save_frames, write_video


def by_ffmpeg(path: Path, fps: float) -> list[int]:
    """The numbers of the frames that ffmpeg's own filter takes."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-vf", f"fps={fps}"]
    pixels = subprocess.run([*command, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"], capture_output=True, check=True)
    frames = torch.frombuffer(bytearray(pixels.stdout), dtype=torch.uint8).unflatten(0, (-1, 16, 32, 3))
    return numbers_of(frames.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_video_of_another_rate_keeps_its_speed(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip{suffix}", numbered_frames(92), fps=30)
    clip = read_clip(path, fps=16)
    assert len(clip.frames) == 49
    assert clip.is_resampled
    assert numbers_of(clip.frames) == list(clip.chosen) == by_ffmpeg(path, 16)
    for kept in (read_clip(path), read_clip(path, fps=30)):
        assert numbers_of(kept.frames) == list(range(92))
        assert not kept.is_resampled


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_of_a_varying_rate_are_taken_by_their_own_times(tmp_path: Path, suffix: str) -> None:
    shown = [1, 1, 5, 2, 1, 10, 1, 1, 3, 3]
    path = write_varying_video(tmp_path / f"clip{suffix}", numbered_frames(10), shown=shown, unit=30)
    assert numbers_of(load_frames(path)) == list(range(10))
    expected = [index for index, count in enumerate(shown) for _ in range(count)]
    # The container has no duration of the last frame: how long it stays is a guess.
    assert numbers_of(read_clip(path, fps=30).frames)[:25] == expected[:25]
    assert numbers_of(read_clip(path, fps=30).frames) == by_ffmpeg(path, 30)
    assert numbers_of(read_clip(path, fps=16).frames) == by_ffmpeg(path, 16)


@pytest.mark.parametrize("name", ["clip.webp", "clip.png", "clip.apng", "clip.gif", "clip"])
def test_a_moving_picture_is_a_clip_of_all_its_frames_at_their_times(tmp_path: Path, name: str) -> None:
    milliseconds = [250, 125 if "gif" not in name else 120, 125 if "gif" not in name else 130, 500]
    path = tmp_path / (name if "." in name else "clip.webp")
    write_moving_picture(path, numbered_frames(4), milliseconds=milliseconds)
    path = path.rename(tmp_path / name)
    assert torch.equal(load_frames(path), numbered_frames(4).float() / 255)
    assert numbers_of(read_clip(path, fps=8).frames) == [0, 0, 1, 2, 3, 3, 3, 3]
    assert read_video(path)[1] == 4


def test_the_still_for_old_programs_in_a_moving_png_is_no_frame(tmp_path: Path) -> None:
    still, first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
    still.save(tmp_path / "a.png", save_all=True, append_images=[first, second], default_image=True, duration=100)
    assert load_frames(tmp_path / "a.png")[:, :, 0, 0].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_a_frame_that_says_no_duration_stays_a_tenth_of_a_second(tmp_path: Path) -> None:
    path = write_moving_picture(tmp_path / "a.gif", numbered_frames(5), milliseconds=[0] * 5)
    assert read_video(path)[1] == 10


@pytest.mark.parametrize("name", ["still.webp", "still.png", "still.gif", "still.jpg", "still.tif"])
def test_a_still_is_one_frame_whatever_the_rate(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 6), "white").save(tmp_path / name)
    clip = read_clip(tmp_path / name, fps=16)
    assert clip.frames.shape == (1, 3, 6, 8)
    assert clip.times is None
    with pytest.raises(UserError, match="is no video"):
        read_video(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif", ".gif", ".avif", ".JPG"])
@pytest.mark.parametrize("pattern", ["f{}", "f{:03d}", "frame {} of 12", "{}", "v2_é{}"])
def test_frames_of_a_folder_are_read_as_people_count(tmp_path: Path, suffix: str, pattern: str) -> None:
    for index, frame in enumerate(numbered_frames(12)):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / (pattern.format(index) + suffix))
    (tmp_path / f"._f0{suffix}").write_bytes(b"what some systems keep beside a file")
    (tmp_path / "notes.txt").touch()
    clip = read_clip(tmp_path, fps=5)  # it has no rate of its own, and stays as it is
    assert numbers_of(clip.frames) == list(range(12))
    assert not clip.is_resampled


def test_saved_tensors_stay_as_they_are(tmp_path: Path) -> None:
    save_frames(tmp_path / "raw.safetensors", numbered_frames(7))
    assert numbers_of(read_clip(tmp_path / "raw.safetensors", fps=5).frames) == list(range(7))


def test_pages_of_a_file_are_frames_without_times(tmp_path: Path) -> None:
    first, *others = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in numbered_frames(3))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=others)
    clip = read_clip(tmp_path / "pages.tif", fps=30)
    assert numbers_of(clip.frames) == [0, 1, 2]
    assert clip.times is None


def test_a_moving_picture_among_the_frames_of_a_folder_is_refused(tmp_path: Path) -> None:
    write_moving_picture(tmp_path / "a.webp", numbered_frames(2), milliseconds=[100, 100])
    with pytest.raises(UserError, match="2 frames itself"):
        load_frames(tmp_path)


def test_images_of_different_sizes_are_no_video(tmp_path: Path) -> None:
    for index, size in enumerate(((4, 4), (4, 6))):
        Image.new("RGB", size).save(tmp_path / f"frame_{index}.png")
    with pytest.raises(ValueError, match="differ in size"):
        load_frames(tmp_path)


def test_a_video_that_breaks_off_is_read_as_far_as_it_goes_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video(tmp_path / "clip.mp4", torch.rand(30, 3, 64, 64), fps=16)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 0 < len(load_frames(path)) < 30
    (record,) = caplog.records
    assert "clip.mp4 is damaged" in record.message
    assert "\n" not in record.message


@pytest.mark.parametrize("change", [{"start_seconds": 5.0}, {"angle": 90}])
def test_a_late_start_and_a_turned_camera_are_heeded(tmp_path: Path, change: dict[str, float]) -> None:
    path = write_video(tmp_path / "clip.mp4", numbered_frames(8), fps=8)
    before = ["-itsoffset", str(change["start_seconds"])] if "start_seconds" in change else ["-display_rotation", "90"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *before, "-i", str(path), "-c", "copy"]
    subprocess.run([*command, str(tmp_path / "other.mp4")], check=True)
    frames = read_clip(tmp_path / "other.mp4", fps=8).frames
    assert numbers_of(frames if "angle" not in change else frames.rot90(-1, (2, 3))) == list(range(8))


def tensor_file(path: Path, frames: Tensor) -> Path:
    save_file({"frames": frames}, path)
    return path


@pytest.mark.parametrize(
    "frames", [torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4).byte()]
)
def test_tensors_that_are_no_frames_are_refused(tmp_path: Path, frames: Tensor) -> None:
    with pytest.raises(UserError, match="must hold a uint8 tensor"):
        load_frames(tensor_file(tmp_path / "none.safetensors", frames))


@pytest.mark.parametrize("suffix", [".avif", ".bmp", ".gif", ".jp2", ".jpg", ".png", ".ppm", ".tif", ".webp"])
def test_a_damaged_picture_is_read_or_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(0)
    path = tmp_path / f"whole{suffix}"
    Image.fromarray(numbered_frames(6)[5].permute(1, 2, 0).numpy()).save(path)
    whole = path.read_bytes()
    for number in range(60):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 3, 9))):
            content[draw.randrange(min(len(content), 200))] = draw.randrange(256)
        damaged = tmp_path / ("damaged" if number % 3 else f"damaged{suffix}")
        damaged.write_bytes(content[: draw.randrange(len(content))] if number % 4 == 0 else content)
        line = "damaged"
        try:
            frames = load_frames(damaged)
        except UserError as error:
            line = str(error)
        else:
            assert 0 <= frames.min() <= frames.max() <= 1
        assert "damaged" in line
        assert "\n" not in line

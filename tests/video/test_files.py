"""Files: what is written reads back, nothing half-written stays, bad files are refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support.clips import moving_blocks
from vidaccel.errors import UserError
from vidaccel.video.files import load_frames, read_video, save_frames, write_video
from vidaccel.video.frames import side_by_side, with_even_sides
from vidaccel.video.images import read_image
from vidaccel.video.metrics import psnr


def test_a_video_reads_back_with_its_frames_size_rate_and_colours(tmp_path: Path) -> None:
    frames = moving_blocks()
    path = write_video(tmp_path / "new" / "clip.mp4", frames, fps=16)
    read, fps = read_video(path)
    assert read.shape == frames.shape
    assert read.dtype == torch.float32
    assert fps == 16
    middles = (slice(None), slice(None), slice(4, None, 8), slice(4, None, 8))
    assert (read[middles] - frames[middles]).abs().max() < 0.06
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_playable_h264_in_420_with_a_stated_colour_matrix(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", moving_blocks(), fps=12.5)
    program = imageio_ffmpeg.get_ffmpeg_exe()
    described = subprocess.run([program, "-i", str(path)], capture_output=True, text=True, check=False).stderr
    assert "h264" in described
    assert "yuv420p(tv, bt709" in described
    assert "12.50 fps" in described


@pytest.mark.parametrize(("height", "width"), [(33, 47), (32, 47), (33, 48), (1, 1)])
def test_odd_sizes_are_extended_by_a_repeated_edge_and_never_rescaled(tmp_path: Path, height: int, width: int) -> None:
    frames = moving_blocks(3, height, width)
    read, _ = read_video(write_video(tmp_path / "odd.mp4", frames, fps=8))
    assert read.shape == (3, 3, height + height % 2, width + width % 2)
    same = write_video(tmp_path / "even.mp4", with_even_sides(frames), fps=8)
    assert torch.equal(read_video(same)[0], read)


def test_a_large_smooth_video_survives_above_forty_decibels(tmp_path: Path) -> None:
    y, x = torch.meshgrid(torch.linspace(0, 6, 96), torch.linspace(0, 7, 128), indexing="ij")
    frames = torch.stack([(0.5 + 0.4 * torch.sin(x + y + 0.3 * t)).expand(3, -1, -1) for t in range(6)])
    assert psnr(frames, read_video(write_video(tmp_path / "clip.mp4", frames, fps=16))[0]) > 40


def test_an_interrupted_write_leaves_no_file_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "clip.mp4", moving_blocks(), fps=16)
    before = path.read_bytes()

    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    monkeypatch.setattr(Path, "rename", interrupted)
    for write in (
        lambda: write_video(path, 1 - moving_blocks(), fps=16),
        lambda: save_frames(tmp_path / "raw.safetensors", moving_blocks()),
        lambda: save_frames(tmp_path / "raw", moving_blocks()),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file sizes")
@pytest.mark.parametrize("name", ["clip.mp4", "raw", "raw.safetensors"])
def test_frames_the_disk_has_no_room_for_are_an_error_and_no_file(tmp_path: Path, name: str) -> None:
    import resource

    write = partial(write_video, fps=16) if name.endswith(".mp4") else save_frames
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the encoder's process inherits it
    try:
        with pytest.raises(UserError, match="cannot be written"):
            write(tmp_path / name, torch.rand(9, 3, 64, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, living = (tmp_path / f".clip.{number}.part.mp4" for number in (ended.pid, os.getppid()))
    other = tmp_path / f".other.{ended.pid}.part.mp4"
    for path in (left, living, other):
        path.touch()
    path = write_video(tmp_path / "clip.mp4", moving_blocks(), fps=16)
    assert set(tmp_path.iterdir()) == {path, living, other}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such file names")
@pytest.mark.parametrize("name", ["12:30.mp4", "-y.mp4", "100%d.mkv", "two words.mov"])
def test_a_name_that_means_something_to_the_encoder_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    read, fps = read_video(write_video(name, moving_blocks(), fps=29.97))
    assert read.shape == moving_blocks().shape
    assert fps == 29.97


@pytest.mark.parametrize("name", ["raw.safetensors", "raw"])
def test_raw_frames_read_back_exactly(tmp_path: Path, name: str) -> None:
    frames = torch.randint(0, 256, (12, 3, 9, 7), dtype=torch.uint8)
    path = save_frames(tmp_path / name, frames)
    assert torch.equal(load_frames(path), frames.float() / 255)
    assert torch.equal(load_frames(save_frames(tmp_path / f"again-{name}", load_frames(path))), frames.float() / 255)


def test_load_frames_reads_videos_too(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", moving_blocks(), fps=16)
    assert torch.equal(load_frames(path), read_video(path)[0])


def bad_files(folder: Path) -> dict[str, Path]:
    paths = {name: folder / name for name in ("text.mp4", "empty.mp4", "text.png", "text.safetensors", "cut.png")}
    for name, path in paths.items():
        path.write_bytes(b"" if name.startswith("empty") else b"this is no video, image or tensor file\n" * 9)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(paths["cut.png"])
    paths["cut.png"].write_bytes(paths["cut.png"].read_bytes()[:60])
    return paths | {"missing": folder / "nowhere.mp4", "folder": folder / "nothing"}


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (read_video, "text.mp4"),
        (read_video, "empty.mp4"),
        (read_video, "missing"),
        (load_frames, "text.safetensors"),
        (load_frames, "folder"),
        (load_frames, "text.mp4"),
        (load_frames, "missing"),
        (read_image, "text.png"),
        (read_image, "cut.png"),
        (read_image, "missing"),
        (read_image, "folder"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_them(tmp_path: Path, read: object, name: str) -> None:
    path = bad_files(tmp_path)[name]
    if name == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=path.name.split(".")[0]) as caught:
        read(path)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_a_tensor_file_of_something_else_is_refused(tmp_path: Path) -> None:

    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`frames`"):
        load_frames(tmp_path / "model.safetensors")


def test_bad_requests_are_refused_in_one_line(tmp_path: Path) -> None:
    frames = moving_blocks(2)
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    requests = {
        ".mp4": lambda: write_video(tmp_path / "clip.avi", frames, fps=16),
        "`fps`": lambda: write_video(tmp_path / "clip.mp4", frames, fps=0),
        "shape": lambda: write_video(tmp_path / "clip.mp4", frames[0], fps=16),
        "finite": lambda: write_video(tmp_path / "clip.mp4", frames * torch.nan, fps=16),
        "cannot be written": lambda: write_video(tmp_path / "file" / "clip.mp4", frames, fps=16),
        "new folder": lambda: save_frames(tmp_path / "taken", frames),
        "a folder": lambda: save_frames(tmp_path / "frames.npz", frames),
        "equal videos": lambda: side_by_side(frames, frames[:1]),
    }
    for message, request in requests.items():
        with pytest.raises(ValueError, match=message) as caught:
            request()
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]

"""Frames to files and back: H.264 videos, and raw frames without loss.

Frames are (F, 3, H, W), float32 in [0, 1] when read; floating in [0, 1] or uint8 when written.
Files are written beside their final name and renamed when whole, so that an interrupt leaves no half file.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from vidaccel.errors import UserError, first_line
from vidaccel.files.atomic import atomic_folder, atomic_write
from vidaccel.files.tensors import write_tensors
from vidaccel.video.clips import read_clip
from vidaccel.video.ffmpeg import H264_OPTIONS, file_url, raw_source, run_ffmpeg
from vidaccel.video.frames import as_uint8
from vidaccel.video.paths import video_path
from vidaccel.video.sound import wave_file


def write_video(path: str | Path, frames: Tensor, *, fps: float, sound: tuple[Tensor, int] | None = None) -> Path:
    """Write frames (F, 3, H, W) as H.264 in 4:2:0; lossy, so compare raw frames and not this file.

    H.264 needs even sides: an odd one is extended by repeating its last row or column; nothing is rescaled.
    sound: waveform (channels, samples) of one or two channels, and samples a second; written as AAC. Floats are in
    [-1, 1], whole numbers count by the range of their type. What goes on after the last frame is cut.

    Raises UserError for a suffix other than .mp4, .mov, .mkv, for frames or sound of another shape and for a rate not
    above 0.
    """
    path = video_path(path)
    source, pixels = raw_source(frames, fps=fps)
    coding = [*H264_OPTIONS, "-preset", "medium", "-movflags", "+faststart"]
    with atomic_write(path) as unfinished, ExitStack() as stack:
        if sound is not None:
            wave_path = stack.enter_context(wave_file(unfinished, *sound, seconds=len(frames) / fps))
            source += ["-i", file_url(wave_path), "-c:a", "aac"]
        run_ffmpeg([*source, *coding, file_url(unfinished)], data=pixels)
    return path


def read_video(path: str | Path) -> tuple[Tensor, float]:
    """All frames (F, 3, H, W) float32 in [0, 1] of a video or a moving picture, and its frames per second.

    Where frames are shown for unequal times, that is their number by the length of the video.
    Raises UserError for a file that is missing or no video.
    """
    clip = read_clip(path)
    if clip.times is None:
        raise UserError(f"{Path(path).name} is no video; `load_frames` reads folders, tensors and stills.")
    return clip.frames, clip.times.fps


def save_frames(path: str | Path, frames: Tensor) -> Path:
    """Save frames (F, 3, H, W) without loss as uint8: `name.safetensors`, or else a new folder of PNG files.

    Raises UserError for another suffix, for a folder that exists and for frames of another shape.
    """
    path = Path(path)
    pixels = as_uint8(frames).cpu()
    if path.suffix == ".safetensors":
        with atomic_write(path) as unfinished, unfinished.open("wb") as file:
            write_tensors(file, {"frames": pixels})
        return path
    if path.suffix:
        raise UserError(f"Frames are saved to a .safetensors file or a folder; got {path.name!r}.")
    if path.exists():
        raise UserError(f"{path} exists; frames are saved to a new folder.")
    try:
        with atomic_folder(path) as folder:
            _save_pictures(folder, pixels)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or first_line(error)}.") from error
    return path


def load_frames(path: str | Path) -> Tensor:
    """All frames (F, 3, H, W) float32 in [0, 1] of a .safetensors file, a folder of pictures, a picture or a video.

    Pictures of a folder are taken in natural order: f2.png before f10.png.
    Raises UserError for a path that is missing or holds no frames.
    """
    return read_clip(path).frames


def _save_pictures(folder: Path, pixels: Tensor) -> None:
    """PNG files frame_00000.png and so on."""
    from PIL import Image

    for index, frame in enumerate(pixels):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f"frame_{index:05d}.png")

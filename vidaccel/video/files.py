"""Frames to files and back: H.264 videos, raw frames without loss, images, and two videos side by side.

Frames are (F, 3, H, W), float32 in [0, 1] when read; floating in [0, 1] or uint8 when written.
Files are written beside their final name and renamed when whole, so that an interrupt leaves no half file.
"""

from __future__ import annotations

import os
import subprocess
import wave
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vidaccel.errors import UserError, first_line
from vidaccel.files.atomic import atomic_write
from vidaccel.video.paths import VIDEO_SUFFIXES, existing_path

_LABEL_ROWS = 24
_GAP_COLUMNS = 4
# Visually lossless H.264, and BT.709 said as well as done: players guess the matrix of small videos otherwise. The
# flags keep the conversion the same on every processor.
_COLOURS = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+bitexact,"
    "setparams=color_primaries=bt709:color_trc=bt709"
)
H264_OPTIONS = (
    *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "12", "-vf", _COLOURS),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
)


def write_video(path: str | Path, frames: Tensor, *, fps: float, sound: tuple[Tensor, int] | None = None) -> Path:
    """Write frames (F, 3, H, W) as H.264 in 4:2:0; lossy, so compare raw frames and not this file.

    H.264 needs even sides: an odd one is extended by repeating its last row or column; nothing is rescaled.
    sound: waveform (channels, samples), one or two channels in [-1, 1], and samples a second; written as AAC.

    Raises UserError for a suffix other than .mp4, .mov, .mkv, for frames or sound of another shape and for a rate not
    above 0.
    """
    path = video_path(path)
    source, pixels = raw_source(frames, fps=fps)
    coding = [*H264_OPTIONS, "-preset", "medium", "-movflags", "+faststart"]
    with atomic_write(path) as unfinished, ExitStack() as stack:
        if sound is not None:
            wave_path = stack.enter_context(_wave_file(unfinished, *sound))
            source += ["-i", file_url(wave_path), "-c:a", "aac"]
        run_ffmpeg([*source, *coding, file_url(unfinished)], data=pixels)
    return path


def video_path(path: str | Path) -> Path:
    """`path`, if its suffix is one of a video file that can be written; else raises UserError."""
    path = Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"A video file must end in {', '.join(VIDEO_SUFFIXES)}; got {path.name!r}.")
    return path


def read_video(path: str | Path) -> tuple[Tensor, float]:
    """All frames (F, 3, H, W) float32 in [0, 1] of a video file, and its frames per second.

    Raises UserError for a file that is missing or no video.
    """
    import imageio_ffmpeg

    path = existing_path(path)
    reader = imageio_ffmpeg.read_frames(file_url(path), output_params=["-fps_mode", "passthrough"])
    try:
        meta = next(reader)
        width, height = meta["size"]
        pixels = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    except (OSError, RuntimeError, KeyError, StopIteration) as error:
        raise UserError(f"{path.name} cannot be read as a video; give a file such as .mp4.") from error
    if not pixels:
        raise UserError(f"{path.name} has no video frames.")
    return _as_float(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)), float(meta["fps"])


def save_frames(path: str | Path, frames: Tensor) -> Path:
    """Save frames (F, 3, H, W) without loss as uint8: `name.safetensors`, or else a new folder of PNG files."""
    path = Path(path)
    pixels = _as_uint8(frames).cpu()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        with atomic_write(path) as unfinished:
            save_file({"frames": pixels.contiguous()}, unfinished)
        return path
    if path.suffix:
        raise UserError(f"Frames are saved to a .safetensors file or a folder; got {path.name!r}.")
    _save_folder(path, pixels)
    return path


def load_frames(path: str | Path) -> Tensor:
    """Frames (F, 3, H, W) float32 in [0, 1] of a .safetensors file, a folder of images in name order, or a video.

    Raises UserError for a path that is missing or holds no frames.
    """
    path = existing_path(path)
    if path.is_dir():
        return _load_folder(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    return read_video(path)[0]


def read_image(path: str | Path) -> Tensor:
    """An image as (3, H, W) float32 in [0, 1]; turned as its EXIF says, transparency laid on white.

    Raises UserError for a file that is missing or no readable image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = existing_path(path)
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path.name} cannot be read as an image; give a PNG or JPEG file.") from error
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    pixels = np.array(Image.alpha_composite(white, image).convert("RGB"))
    return _as_float(torch.from_numpy(pixels).permute(2, 0, 1))


def side_by_side(left: Tensor, right: Tensor, labels: tuple[str, str] = ("", "")) -> Tensor:
    """Two videos (F, 3, H, W) next to each other, (F, 3, H', 2 W + 4); labels stand in a strip above the pictures.

    Raises UserError for videos of unequal shape.
    """
    if left.shape != right.shape:
        raise UserError(f"Side by side needs equal videos, got {tuple(left.shape)} and {tuple(right.shape)}.")
    pair = [_as_float(_as_uint8(frames).cpu()) for frames in (left, right)]
    if any(labels):
        strips = [_label(text, width=left.shape[-1]).expand(left.shape[0], -1, -1, -1) for text in labels]
        pair = [torch.cat([strip, frames], dim=-2) for strip, frames in zip(strips, pair, strict=True)]
    gap = torch.ones(*pair[0].shape[:-1], _GAP_COLUMNS)
    return torch.cat([pair[0], gap, pair[1]], dim=-1)


def rounded_to_uint8(pixels: Tensor) -> Tensor:
    """Floating values in [0, 1], of any shape, to the nearest of 256 levels; what lies outside is clamped."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)


@contextmanager
def _wave_file(beside: Path, waveform: Tensor, rate: int) -> Iterator[Path]:
    """A wave file of 16 bits beside `beside`, for the time of the block."""
    if waveform.ndim != 2 or waveform.shape[0] not in (1, 2) or rate < 1:
        raise UserError(f"Sound must be (channels, samples) of 1 or 2 channels, got {tuple(waveform.shape)} at {rate}.")
    samples = (torch.nan_to_num(waveform.float()).clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous()
    path = beside.with_suffix(".wav")
    try:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(waveform.shape[0])
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.cpu().numpy().astype("<i2").tobytes())
        yield path
    finally:
        path.unlink(missing_ok=True)


def raw_source(frames: Tensor, *, fps: float) -> tuple[list[str], memoryview]:
    """How ffmpeg is told of frames (F, 3, H, W) that it gets on its standard input, and their bytes there.

    Sides are made even by repeating the last row or column. Raises UserError for another shape and a rate not above 0.
    """
    check_rate(fps)
    pixels = _even_sides(_as_uint8(frames)).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    size = f"{pixels.shape[2]}x{pixels.shape[1]}"
    options = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", f"{fps:.6f}", "-i", "-"]
    return options, pixels.reshape(-1).data


def check_rate(fps: float) -> None:
    """Raises UserError for a number of frames per second that no video has."""
    if not 0.001 <= fps < 1000:
        raise UserError(f"`fps` must be at least 0.001 and below 1000, got {fps}.")


def run_ffmpeg(arguments: list[str], *, data: bytes | memoryview = b"") -> bytes:
    """What ffmpeg writes to its standard output; a file it could not finish, on a full disk for one, is an OSError."""
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-y", "-hide_banner", "-loglevel", "error", *arguments]
    # A group of its own: Ctrl-C is for this process, which ends what it started; ffmpeg would cut its output short.
    done = subprocess.run(command, input=data, capture_output=True, check=False, start_new_session=True)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(f"the encoder stopped ({lines[-1].split('] ')[-1]})")
    return done.stdout


def file_url(path: Path) -> str:
    """The path as ffmpeg takes it whatever its characters: `a:b.mp4` and `-x.mp4` are file names too."""
    return f"file:{path}"


def _save_folder(folder: Path, pixels: Tensor) -> None:
    """PNG files frame_00000.png and so on, in a folder that appears when all are written."""
    import shutil

    from PIL import Image

    if folder.exists():
        raise UserError(f"{folder} exists; frames are saved to a new folder.")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        unfinished.mkdir(parents=True)
        for index, frame in enumerate(pixels):
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(unfinished / f"frame_{index:05d}.png")
        os.replace(unfinished, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or first_line(error)}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _load_folder(folder: Path) -> Tensor:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise UserError(f"The folder {folder.name} holds no .png or .jpg frames.")
    frames = [read_image(file) for file in files]
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"The images in {folder.name} differ in size; frames of one video must agree.")
    return torch.stack(frames)


def _load_safetensors(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} cannot be read as safetensors: {first_line(error)}.") from error
    frames = tensors.get("frames")
    if frames is None or frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise UserError(
            f"{path.name} must hold a uint8 tensor `frames` of shape (F, 3, H, W), as `save_frames` writes."
        )
    return _as_float(frames)


def _label(text: str, *, width: int) -> Tensor:
    """White on dark text, (3, 24, width); the letters shrink until the text fits."""
    import cv2

    strip = np.full((_LABEL_ROWS, width, 3), 24, np.uint8)
    scale = 0.45
    while cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] > width - 4 and scale > 0.2:
        scale -= 0.05
    position = (2, _LABEL_ROWS - 8)
    cv2.putText(strip, text, position, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return _as_float(torch.from_numpy(strip).permute(2, 0, 1))


def _even_sides(frames: Tensor) -> Tensor:
    if frames.shape[-1] % 2:
        frames = torch.cat([frames, frames[..., -1:]], dim=-1)
    return torch.cat([frames, frames[..., -1:, :]], dim=-2) if frames.shape[-2] % 2 else frames


def _as_uint8(frames: Tensor) -> Tensor:
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise UserError(f"Frames must have shape (F, 3, H, W), got {tuple(frames.shape)}.")
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point() or not bool(torch.isfinite(frames).all()):
        raise UserError(f"Frames must be uint8, or floating and finite in [0, 1]; got {frames.dtype}.")
    return rounded_to_uint8(frames)


def _as_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 255

"""The ffmpeg program that imageio-ffmpeg brings: what it is told to encode and how, and what it decodes, with times."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BufferedIOBase
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.video.frames import as_uint8, with_even_sides
from vidaccel.video.rate import FrameTimes, check_rate

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
# PPM pictures say their own size, and the filter `showinfo` says when each is shown.
_DECODED = (
    *("-map", "0:V:0", "-vf", "showinfo=checksum=0", "-fps_mode", "passthrough"),
    *("-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"),
)
_CLOCK = re.compile(r"config in time_base: (\d+)/(\d+), frame_rate: (\d+)/(\d+)")
_FRAME = re.compile(r"n: *\d+ pts: *(-?\d+|NOPTS)(?:.*?duration: *(\d+))?")
_COMPLAINT = re.compile(r"\[(?:error|fatal)\] (.*)")
_USUAL_RATE = Fraction(25)  # of ffmpeg, where a file says nothing


def raw_source(frames: Tensor, *, fps: float) -> tuple[list[str], memoryview]:
    """How ffmpeg is told of frames (F, 3, H, W) that it gets on its standard input, and their bytes there.

    Sides are made even by repeating the last row or column. Raises UserError for another shape and a rate not above 0.
    """
    check_rate(fps)
    pixels = with_even_sides(as_uint8(frames)).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    size = f"{pixels.shape[2]}x{pixels.shape[1]}"
    options = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", f"{fps:.6f}", "-i", "-"]
    return options, pixels.reshape(-1).data


def run_ffmpeg(arguments: list[str], *, data: bytes | memoryview = b"") -> bytes:
    """What ffmpeg writes to its standard output; a file it could not finish, on a full disk for one, is an OSError."""
    command = [*_program(), "-y", "-loglevel", "error", *arguments]
    # A group of its own: Ctrl-C is for this process, which ends what it started; ffmpeg would cut its output short.
    done = subprocess.run(command, input=data, capture_output=True, check=False, start_new_session=True)
    if done.returncode != 0:
        raise OSError(f"the encoder stopped ({failure(done).split('] ')[-1]})")
    return done.stdout


def failure(ended: subprocess.CompletedProcess[bytes]) -> str:
    """The last line that a process said, or its exit code."""
    lines = ended.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {ended.returncode}"


@dataclass(frozen=True)
class Decoded:
    """The pictures of a video file, each (H, W, 3) uint8, when they are shown, and what ffmpeg found wrong with it."""

    pictures: list[np.ndarray]
    times: FrameTimes
    complaint: str | None


def decode(path: Path) -> Decoded:
    """Every frame of a video file once, whatever its rate, with its own time.

    Raises UserError for a file that is no video or has no frames.
    """
    command = [*_program(), "-nostdin", "-nostats", "-loglevel", "level+info", "-i", file_url(path), *_DECODED]
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True) as process:
            assert isinstance(process.stdout, BufferedIOBase)
            try:
                pictures = list(_ppm_pictures(process.stdout))
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        text = log.read().decode(errors="replace")
    if not pictures:
        raise UserError(f"{path.name} cannot be read as a video; give a file such as .mp4.")
    complaint = _COMPLAINT.search(text)
    return Decoded(pictures, _times(text, len(pictures)), complaint and complaint[1])


def file_url(path: Path) -> str:
    """The path as ffmpeg takes it whatever its characters: `a:b.mp4` and `-x.mp4` are file names too."""
    return f"file:{path}"


def _program() -> list[str]:
    from imageio_ffmpeg import get_ffmpeg_exe

    return [get_ffmpeg_exe(), "-hide_banner"]


def _ppm_pictures(stream: BufferedIOBase) -> Iterator[np.ndarray]:
    """Pictures (H, W, 3) uint8 of PPM files one after the other; one that breaks off is left out."""
    while stream.readline() == b"P6\n":
        width, height = map(int, stream.readline().split())
        stream.readline()  # the largest value, 255
        pixels = np.empty((height, width, 3), np.uint8)
        if stream.readinto(pixels.reshape(-1).data) < pixels.size:
            return
        yield pixels


def _times(text: str, num_frames: int) -> FrameTimes:
    """When the frames are shown, of the lines of `showinfo`."""
    clock = _CLOCK.search(text)
    ticks, rate = Fraction(0), _USUAL_RATE
    if clock is not None:
        numbers = [int(number) for number in clock.groups()]
        ticks = Fraction(numbers[0], numbers[1] or 1)
        rate = Fraction(numbers[2], numbers[3] or 1) or _USUAL_RATE
    found = _FRAME.findall(text)
    if not ticks or len(found) != num_frames or any(start == "NOPTS" for start, _ in found):
        return FrameTimes.of_rate(num_frames, rate)
    starts = [int(start) * ticks for start, _ in found]
    starts = list(accumulate((start - starts[0] for start in starts), max))
    last = int(found[-1][1] or 0) * ticks or 1 / rate
    return FrameTimes(tuple(starts), starts[-1] + last, rate)

"""VMAF through the ffmpeg program that imageio-ffmpeg brings; its libvmaf carries the models, nothing is downloaded.

Frames go in as raw RGB and are turned into 8-bit 4:4:4 by ffmpeg for both videos alike, so no codec is between.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from vidaccel.video.ffmpeg import failure

SMALLEST = 32  # libvmaf crashes below 17 pixels: its coarsest of four scales is then empty


class MetricUnavailable(RuntimeError):  # noqa: N818 (the state of a metric, handled as such)
    """A metric that cannot be taken here; the text says what is missing."""


def vmaf_of_bytes(reference: bytes, video: bytes, *, size: tuple[int, int], fps: float, model: str) -> float:
    """Pooled (mean over frames) VMAF of packed RGB frames of `size` (width, height).

    Raises MetricUnavailable where ffmpeg or its libvmaf is missing or refuses the frames.
    """
    if min(size) < SMALLEST:
        raise MetricUnavailable(f"VMAF needs frames of at least {SMALLEST}x{SMALLEST} pixels, got {size[0]}x{size[1]}.")
    ffmpeg = _ffmpeg_program()
    with tempfile.TemporaryDirectory(prefix="vidaccel-vmaf-") as folder:
        for name, frames in (("video", video), ("reference", reference)):
            Path(folder, name).write_bytes(frames)
        command = _command(ffmpeg, size=size, fps=fps, model=model)
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        if done.returncode != 0:
            raise MetricUnavailable(
                f"VMAF: ffmpeg could not compute it for {size[0]}x{size[1]} frames: {failure(done)}"
            )
        log = json.loads(Path(folder, "log.json").read_text())
    return float(log["pooled_metrics"]["vmaf"]["mean"])


def _ffmpeg_program() -> str:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        program = str(get_ffmpeg_exe())
    except ImportError as error:
        raise MetricUnavailable("VMAF needs ffmpeg: `pip install imageio-ffmpeg` brings one with libvmaf.") from error
    except RuntimeError as error:
        raise MetricUnavailable("VMAF needs ffmpeg, and imageio-ffmpeg found none for this machine.") from error
    listing = subprocess.run([program, "-hide_banner", "-filters"], capture_output=True, text=True, check=False)
    if "libvmaf" not in listing.stdout:
        raise MetricUnavailable("VMAF needs an ffmpeg built with libvmaf; the one of imageio-ffmpeg here has none.")
    return program


def _command(ffmpeg: str, *, size: tuple[int, int], fps: float, model: str) -> list[str]:
    """Both raw files in, the score out as log.json; libvmaf takes the judged video first, the reference second."""
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", f"{fps:g}"]
    to_yuv = "scale=flags=accurate_rnd+full_chroma_int:out_color_matrix=bt709:out_range=tv,format=yuv444p"
    score = f"libvmaf=model=version={model}:log_fmt=json:log_path=log.json:n_threads=2"
    graph = f"[0:v]{to_yuv}[video];[1:v]{to_yuv}[reference];[video][reference]{score}"
    inputs = [*raw, "-i", "video", *raw, "-i", "reference"]
    return [ffmpeg, "-nostdin", "-hide_banner", "-loglevel", "error", *inputs, "-lavfi", graph, "-f", "null", "-"]

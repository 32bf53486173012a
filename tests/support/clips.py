"""Small clips whose frames tell where they come from, as tensors and as files of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidaccel.video.ffmpeg import file_url, raw_source, run_ffmpeg


def moving_blocks(num_frames: int = 5, height: int = 32, width: int = 48) -> Tensor:
    """Saturated colours in 8-pixel blocks that move one block a frame, (F, 3, H, W)."""
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 0], [0.2, 0.3, 0.4]])
    rows, columns = torch.meshgrid(torch.arange(height) // 8, torch.arange(width) // 8, indexing="ij")
    return torch.stack([colours[(rows + columns + frame) % 5].permute(2, 0, 1) for frame in range(num_frames)])


def numbered_frames(num_frames: int, height: int = 16, width: int = 32) -> Tensor:
    """Frames (F, 3, H, W) uint8 that hold their own index in eight stripes, black or white: a codec cannot lose it."""
    bits = (torch.arange(num_frames)[:, None] >> torch.arange(8)) % 2
    stripes = bits.repeat_interleave(width // 8, dim=1)[:, None, None, :] * 255
    return stripes.expand(-1, 3, height, -1).to(torch.uint8).contiguous()


def numbers_of(frames: Tensor) -> list[int]:
    """The indices that `numbered_frames` (F, 3, H, W) in [0, 1] hold."""
    stripes = frames.mean(dim=(1, 2)).unflatten(-1, (8, -1)).mean(-1) > 0.5
    return [int(number) for number in (stripes * 2 ** torch.arange(8)).sum(-1)]


def write_varying_video(path: Path, frames: Tensor, *, shown: Sequence[int], unit: float) -> Path:
    """A video whose frame i is shown for `shown[i]` units; `unit` is their number a second."""
    starts = np.cumsum([0, *shown[:-1]])
    source, pixels = raw_source(frames, fps=unit)
    times = "+".join(f"eq(N\\,{index})*{start}" for index, start in enumerate(starts))
    run_ffmpeg(
        [
            *source,
            *("-vf", f"settb=1/{unit},setpts={times}", "-fps_mode", "vfr", "-enc_time_base", f"1:{unit}"),
            *("-c:v", "libx264", "-crf", "1", "-pix_fmt", "yuv444p", file_url(path)),
        ],
        data=pixels,
    )
    return path


def write_moving_picture(path: Path, frames: Tensor, *, milliseconds: Sequence[float]) -> Path:
    """A WebP, APNG or GIF of frames (F, 3, H, W) uint8, each shown for its own time; without loss."""
    first, *others = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames)
    options = {"lossless": True} if path.suffix == ".webp" else {"disposal": 1}
    first.save(path, save_all=True, append_images=others, duration=list(milliseconds), loop=0, **options)
    return path

"""Frames as tensors: their form and numbers, and two videos side by side.

Frames are (F, 3, H, W): uint8, or floating in [0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vidaccel.errors import UserError

_LABEL_ROWS = 24
_GAP_COLUMNS = 4


def as_uint8(frames: Tensor) -> Tensor:
    """Frames (F, 3, H, W) as uint8 of the same shape; floating ones are rounded and clamped.

    Raises UserError for another shape, for frames of no size, other whole numbers, infinities and NaN.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise UserError(f"Frames must have shape (F, 3, H, W), got {tuple(frames.shape)}.")
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point() or not bool(torch.isfinite(frames).all()):
        raise UserError(f"Frames must be uint8, or floating and finite in [0, 1]; got {frames.dtype}.")
    return rounded_to_uint8(frames)


def as_float(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape as float32 in [0, 1]; floating ones stay as they are."""
    return pixels if pixels.is_floating_point() else pixels.float() / 255


def rounded_to_uint8(pixels: Tensor) -> Tensor:
    """Floating values in [0, 1], of any shape, to the nearest of 256 levels; what lies outside is clamped."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)


def with_even_sides(frames: Tensor) -> Tensor:
    """Frames (..., H, W) with an odd side extended by its last row or column, as 4:2:0 video needs."""
    if frames.shape[-1] % 2:
        frames = torch.cat([frames, frames[..., -1:]], dim=-1)
    return torch.cat([frames, frames[..., -1:, :]], dim=-2) if frames.shape[-2] % 2 else frames


def side_by_side(left: Tensor, right: Tensor, labels: tuple[str, str] = ("", "")) -> Tensor:
    """Two videos (F, 3, H, W) next to each other, (F, 3, H', 2 W + 4); labels stand in a strip above the pictures.

    Raises UserError for videos of unequal shape.
    """
    if left.shape != right.shape:
        raise UserError(f"Side by side needs equal videos, got {tuple(left.shape)} and {tuple(right.shape)}.")
    pair = [as_float(as_uint8(frames).cpu()) for frames in (left, right)]
    if any(labels):
        strips = [_label(text, width=left.shape[-1]).expand(left.shape[0], -1, -1, -1) for text in labels]
        pair = [torch.cat([strip, frames], dim=-2) for strip, frames in zip(strips, pair, strict=True)]
    gap = torch.ones(*pair[0].shape[:-1], _GAP_COLUMNS)
    return torch.cat([pair[0], gap, pair[1]], dim=-1)


def _label(text: str, *, width: int) -> Tensor:
    """White on dark text, (3, 24, width); the letters shrink until the text fits."""
    import cv2

    strip = np.full((_LABEL_ROWS, width, 3), 24, np.uint8)
    scale = 0.45
    while cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] > width - 4 and scale > 0.2:
        scale -= 0.05
    position = (2, _LABEL_ROWS - 8)
    cv2.putText(strip, text, position, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return as_float(torch.from_numpy(strip).permute(2, 0, 1))

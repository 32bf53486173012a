"""Images and videos that a generation starts from, brought to its size."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from torch.nn import functional as F

from vidaccel.errors import UserError

_MOST_LEVEL = 65535  # of 16 bits


def read_image(image: Any) -> Tensor:
    """(B, 3, 1, H, W) in [-1, 1], in its own size, of a PIL image, an array (H, W, 3) or a tensor (3, H, W).

    Numbers are in [0, 1], or whole and of 8 bits; a PIL image may be grey of 16 bits, and its transparency lies on
    white. A list, or one more dimension in front, is one image for each prompt. Raises `UserError` for other numbers.
    """
    image = _in_unit_range(image)
    if getattr(image, "ndim", 0) == 3:
        image = [image]
    return _processor().preprocess(image).unsqueeze(2)


def read_video(video: Any) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1], in its own size: a list of PIL images, an array (F, H, W, 3), a tensor (F, 3, H, W).

    Numbers as in `read_image`. A list of those, or one more dimension in front, is one video for each prompt.
    """
    return _processor().preprocess_video(_in_unit_range(video))


def for_each_video(frames: Tensor, count: int) -> Tensor:
    """Frames (B, 3, F, H, W) for `count` videos: one for all stays one, else as many, each as often in a row.

    Raises `UserError` where `count` is no multiple of B.
    """
    if count % len(frames):
        raise UserError(f"Give one image or video, or one for each prompt; got {len(frames)} for {count} videos.")
    return frames if len(frames) == 1 else frames.repeat_interleave(count // len(frames), dim=0)


def fill_and_crop(frames: Tensor, *, height: int, width: int) -> Tensor:
    """Scale (B, 3, F, H, W) in [-1, 1] until it covers height x width (bicubic), and cut the centre out."""
    batch, count, (old_height, old_width) = frames.shape[0], frames.shape[2], frames.shape[-2:]
    scale = max(height / old_height, width / old_width)
    new_size = (max(height, round(old_height * scale)), max(width, round(old_width * scale)))
    flat = frames.transpose(1, 2).flatten(0, 1)
    if new_size != (old_height, old_width):
        flat = F.interpolate(flat, size=new_size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (round((new - wanted) / 2) for new, wanted in zip(new_size, (height, width), strict=True))
    flat = flat[..., top : top + height, left : left + width]
    return flat.unflatten(0, (batch, count)).transpose(1, 2)


def _in_unit_range(pictures: Any) -> Any:
    """Pictures, arrays and tensors of 8-bit numbers brought to [0, 1]; diffusers takes any numbers as in that range."""
    if isinstance(pictures, list | tuple):
        return [_in_unit_range(one) for one in pictures]
    if isinstance(pictures, PIL.Image.Image):
        return _colours(pictures)
    if not isinstance(pictures, np.ndarray | Tensor):
        return pictures
    if pictures.dtype in (np.uint8, torch.uint8):
        return pictures / 255 if isinstance(pictures, Tensor) else pictures.astype(np.float32) / 255
    is_whole = pictures.dtype.kind in "iub" if isinstance(pictures, np.ndarray) else not pictures.is_floating_point()
    if is_whole:
        raise UserError(f"Pixels must be in [0, 1] or whole numbers of 8 bits; got {pictures.dtype}.")
    return pictures


def _colours(picture: PIL.Image.Image) -> np.ndarray:
    """A PIL image as (H, W, 3) float32 in [0, 1]."""
    if picture.mode.startswith("I;16"):
        return np.repeat(np.asarray(picture).astype(np.float32)[..., None] / _MOST_LEVEL, 3, axis=-1)
    if picture.mode in ("I", "F"):
        raise UserError(f"A picture of mode {picture.mode!r} does not say what is white; give it 8 or 16 bits.")
    rgba = picture.convert("RGBA")
    white = PIL.Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.asarray(PIL.Image.alpha_composite(white, rgba).convert("RGB")).astype(np.float32) / 255


def _processor() -> VideoProcessor:
    return VideoProcessor(do_resize=False)

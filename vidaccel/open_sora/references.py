"""Images and videos that a generation starts from, brought to its size."""

from __future__ import annotations

from typing import Any

import PIL.Image
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from torch.nn import functional as F


def read_image(image: Any) -> Tensor:
    """(B, 3, 1, H, W) in [-1, 1], in its own size, of a PIL image, an array (H, W, 3) or a tensor (3, H, W) in [0, 1].

    A list, or one more dimension in front, is one image for each prompt.
    """
    if isinstance(image, PIL.Image.Image) or getattr(image, "ndim", 0) == 3:
        image = [image]
    return _processor().preprocess(image).unsqueeze(2)


def read_video(video: Any) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1], in its own size: a list of PIL images, an array (F, H, W, 3), a tensor (F, 3, H, W).

    A list of those, or one more dimension in front, is one video for each prompt.
    """
    return _processor().preprocess_video(video)


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


def _processor() -> VideoProcessor:
    return VideoProcessor(do_resize=False)

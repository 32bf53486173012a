"""The noise levels of Open-Sora 1.2: evenly spaced, then shifted towards noise for larger and longer videos.

For diffusers' `FlowMatchEulerDiscreteScheduler` with `shift=1`: `scheduler.set_timesteps(sigmas=sigmas_of(...))`. The
model predicts `clean - noise`, diffusers steps along `noise - clean`, so its output is negated for `scheduler.step`.
"""

from __future__ import annotations

import torch

REFERENCE_PIXELS = 512 * 512
CHUNK_FRAMES, CHUNK_LATENT_FRAMES = 17, 5


def shift_of(*, height: int, width: int, num_frames: int, dtype: torch.dtype = torch.float32) -> float:
    """How far the schedule is shifted: 1 for an image of 512x512, 4.84 for 51 frames of 480x854.

    Frames beyond the last whole chunk of 17 do not count; fewer than 17 frames count as one latent frame.
    dtype: number format of the calculation; the original's is that of the model.
    """
    rows, columns = (torch.tensor(float(size)).to(dtype) for size in (height, width))
    latent_frames = max(num_frames // CHUNK_FRAMES * CHUNK_LATENT_FRAMES, 1)
    in_space = (rows * columns / REFERENCE_PIXELS).sqrt()
    in_time = torch.tensor(float(latent_frames)).to(dtype).sqrt()
    return float(in_space * in_time)


def sigmas_of(num_inference_steps: int, shift: float) -> list[float]:
    """Shares of noise from 1 down, without the final 0: `shift * u / (1 + (shift - 1) * u)` at `u = 1 - i / steps`."""
    shares = (1 - index / num_inference_steps for index in range(num_inference_steps))
    return [min(shift * share / (1 + (shift - 1) * share), 1.0) for share in shares]

"""Where a token of STDiT3 is: an embedding of its place in the frame, and rotations for its frame in time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

THETA = 10000.0


def spatial_positions(
    grid: Sequence[int], *, channels: int, scale: float, frequency_dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Embedding of the places of a frame, (rows * columns, channels) in float32: the column's half, then the row's.

    grid: (rows, columns) of tokens. Coordinates are stretched to the square grid of as many tokens and divided by
        `scale`, the video's size relative to the one that counts as it is.
    frequency_dtype: number format the frequencies are rounded to.
    """
    rows, columns = grid
    side = round(math.sqrt(rows * columns))
    exponents = torch.arange(0, channels // 2, 2, device=device).float() / (channels // 2)
    frequencies = (1.0 / THETA**exponents).to(frequency_dtype).float()

    def embedded(count: int) -> Tensor:
        coordinates = torch.arange(count, device=device) / scale * (side / count)
        angles = torch.outer(coordinates, frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    row, column = embedded(rows), embedded(columns)
    return torch.cat(
        [column[None].expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)],
        dim=-1,
    ).flatten(0, 1)


class STDiT3TemporalPositions(nn.Module):
    """Cosines and sines that turn the pairs (2i, 2i + 1) of a head by frame index times frequency i.

    freqs: the frequencies, (head size / 2,); stored with the weights, never trained.
    rounded: calculate in the number format of the weights, as the original does, instead of float32.
    """

    def __init__(self, head_size: int, *, rounded: bool) -> None:
        super().__init__()
        self.head_size = head_size
        self.rounded = rounded
        self.freqs = nn.Parameter(_temporal_frequencies(head_size), requires_grad=False)

    def forward(self, num_frames: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (frames, head size / 2)."""
        exact = _temporal_frequencies(self.head_size, device=self.freqs.device)
        frequencies = self.freqs if self.rounded else exact
        frames = torch.arange(num_frames, device=frequencies.device, dtype=frequencies.dtype)
        angles = torch.outer(frames, frequencies)
        return angles.cos(), angles.sin()


def rotated(tokens: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys, (B, frames, heads, head size), turned by the cosines and sines of their frames."""
    cos, sin = (part[None, :, None, :] for part in rotary_emb)
    even, odd = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).type_as(tokens)


def _temporal_frequencies(head_size: int, device: torch.device | None = None) -> Tensor:
    return 1.0 / THETA ** (torch.arange(0, head_size, 2, device=device).float() / head_size)

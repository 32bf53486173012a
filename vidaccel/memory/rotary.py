"""Rotary positions of video tokens when frames move: temporal positions are given at read, rows are fixed.

Columns are fixed too, or move with the camera (anchored columns): then a patch has the position of what it shows.
Keys are remembered without rotation and rotated for the position their frame has now (Context Forcing, arXiv
2602.06028, section 3.3, bounded positions), so that no position ever leaves the range a student was trained on.
Shapes: tokens of a frame are ordered row by row; D is the size of a head, split between time, rows and columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines by frame position and by place in a frame.

    temporal: (2, positions, time part of D), spatial: (2, tokens_per_frame, rest of D); float32, each value twice in
    a row, as diffusers' rotary tables with `repeat_interleave_real`.
    column_frequencies: (column part of D,) radians a column, each twice in a row; columns are the last part of D.
    """

    temporal: Tensor
    spatial: Tensor
    column_frequencies: Tensor

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.spatial.shape[1]

    @property
    def num_positions(self) -> int:
        """How many frame positions there are."""
        return self.temporal.shape[1]

    def to(self, device: torch.device | str) -> "RotaryTable":
        """The table on `device`."""
        return RotaryTable(*(part.to(device) for part in (self.temporal, self.spatial, self.column_frequencies)))

    def at(self, positions: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines for frames at `positions` (..., T): two tensors (..., T * tokens_per_frame, 1, D).

        columns: (..., T) where the camera of each frame stands, in patch columns; None: at 0.
        """
        temporal = self.temporal[:, positions].unsqueeze(-2)
        shape = (*temporal.shape[:-2], self.tokens_per_frame)
        spatial = self.spatial.reshape(2, *(1,) * positions.ndim, *self.spatial.shape[1:]).expand(*shape, -1)
        if columns is not None:
            spatial = self._moved(spatial, columns)
        cosines, sines = torch.cat([temporal.expand(*shape, -1), spatial], dim=-1).flatten(-3, -2).unsqueeze(-2)
        return cosines, sines

    def _moved(self, spatial: Tensor, columns: Tensor) -> Tensor:
        """`spatial` (2, ..., T, tokens_per_frame, rest of D) with `columns` added to those of the screen.

        By the sum of angles, so that a camera at 0 changes no bit.
        """
        width = self.column_frequencies.numel()
        rows, (cosines, sines) = spatial[..., :-width], spatial[..., -width:]
        angles = (columns.float()[..., None] * self.column_frequencies)[..., None, :]
        moved = (cosines * angles.cos() - sines * angles.sin(), sines * angles.cos() + cosines * angles.sin())
        return torch.cat([rows, torch.stack(moved)], dim=-1)


def rotate_frames(raw: Tensor, keys: Tensor, frames: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Write `raw` keys of some frames into `keys`, rotated.

    raw, keys: (frames, tokens_per_frame, heads, D); frames: (n,) long; cosines, sines: (n, tokens_per_frame, 1, D).
    """
    keys[frames] = rotate(raw[frames], cosines, sines)


def rotate(hidden_states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels (RoPE, arXiv 2104.09864, equation 34).

    hidden_states: (..., L, heads, D); cosines, sines: (..., L, 1, D). Computed in float32, returned in the input's
    format.
    """
    # Neighbours change places by index and nothing is put together, so that compiled code is one kernel.
    swapped = hidden_states.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    is_first = torch.arange(hidden_states.shape[-1], device=hidden_states.device) % 2 == 0
    rotated: Tensor = hidden_states * cosines + swapped * torch.where(is_first, -sines, sines)
    return rotated.type_as(hidden_states)

"""What networks see of a batch during distillation: all that the student remembers, or less, or something else.

The two claims of Context Forcing (arXiv 2602.06028) are told apart by views alone: a long teacher is given the
student's own memory layout, a short one the last chunk. Error recycling follows Stable Video Infinity's ERFT, which the
paper trains its teacher with (section 3.4): errors that networks made come back in what they remember.
Shapes: batches of B samples with S slots, see `ChunkBatch`.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vidaccel.memory.camera import Camera
from vidaccel.training.chunk_batch import ChunkBatch
from vidaccel.training.trip_bank import CHUNK_FRAMES

View = Literal["long", "short"]
_KEPT_SHARE = 4  # every fourth of the residuals is kept, those at the lowest noise


def view_of(batch: ChunkBatch, view: View) -> ChunkBatch:
    """The batch as a teacher and its critic see it."""
    return batch if view == "long" else short_view(batch)


def short_view(batch: ChunkBatch) -> ChunkBatch:
    """The same batch with nothing remembered but the last chunk, as a teacher of short clips sees it."""
    return batch.without(~_is_last_chunk(batch))


def foreign_memory(batch: ChunkBatch) -> ChunkBatch:
    """The same batch with sink and slow memory of another sample: nothing is gained by reading them.

    Which slots are filled comes along, so that a student trained on it finds filled slots ordinary and useless.
    """
    last = _is_last_chunk(batch)
    cells = last[:, None, :, None, None]
    foreign = replace(
        batch,
        context=batch.context.where(cells, batch.context.roll(1, 0)),
        context_mask=batch.context_mask.where(last, batch.context_mask.roll(1, 0)),
        context_camera=Camera(*(own.where(last, own.roll(1, 0)) for own in batch.context_camera)),
    )
    return foreign.without(torch.zeros_like(last))


def _is_last_chunk(batch: ChunkBatch) -> Tensor:
    """(B, S) bool: slots with a frame of the chunk before the one being made."""
    return batch.context_mask & (batch.frames >= batch.first[:, None] - CHUNK_FRAMES)


class ErrorBank:
    """Errors that networks made in one step, as residuals of clean latents: (capacity, C, T, h, w).

    The oldest ones are replaced. Errors at high noise say more about what cannot be known than about the network, so
    only those at the lowest noise of a batch are kept.
    """

    def __init__(self, capacity: int, shape: tuple[int, ...], *, device: torch.device) -> None:
        self.residuals = torch.zeros(capacity, *shape, dtype=torch.float16, device=device)
        self.count = 0

    def add(self, residuals: Tensor, sigmas: Tensor) -> None:
        """Take in a quarter of the residuals (B, C, T, h, w) of estimates at the noise levels `sigmas` (B,)."""
        kept = residuals.detach()[sigmas.argsort()[: max(len(sigmas) // _KEPT_SHARE, 1)]]
        places = (self.count + torch.arange(len(kept), device=kept.device)) % len(self.residuals)
        self.residuals[places] = kept.to(self.residuals.dtype)
        self.count += len(kept)

    def disturbed(self, batch: ChunkBatch, *, share: float, slow: bool, generator: torch.Generator) -> ChunkBatch:
        """The batch with an error on the last chunk that is remembered, in a `share` of its samples.

        slow: also on older frames, each with a frame of an error of its own. Nothing changes while the bank is empty.
        """
        known = min(self.count, len(self.residuals))
        if known == 0 or share <= 0:
            return batch
        size, slots = batch.context_mask.shape
        device = batch.context.device
        frames = self.residuals.shape[2]
        clip = torch.randint(known, (size, slots), device=device, generator=generator)
        last = batch.frames - (batch.first[:, None] - frames)  # 0 to T - 1 for the last chunk
        is_last = batch.context_mask & (last >= 0)
        clip = torch.where(is_last, clip[:, :1], clip)
        hit = torch.rand(size, device=device, generator=generator) < share
        mask = (batch.context_mask if slow else is_last) & hit[:, None]
        error = self.residuals[clip, :, last.clamp(min=0)].float()  # (B, S, C, h, w)
        error = error.transpose(1, 2) * mask[:, None, :, None, None]
        return replace(batch, context=batch.context + error)

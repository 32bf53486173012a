"""Rollouts of many clips at once with the functional path: every chunk encodes anew what it remembers.

Nothing is kept from chunk to chunk but latents, so this is simple and, in large batches, fast enough to validate with;
`vidaccel.rollout` is the way that makes videos.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vidaccel.training.architecture import FLOW_SHIFT, TextEncoder, Transformer
from vidaccel.training.chunk_batch import (
    ChunkContext,
    SlotLayout,
    context_of,
    gather_batch,
    slots_of,
    velocity_in,
)
from vidaccel.training.device import seeded_generator
from vidaccel.training.latents import TOKENS_PER_CAPTION
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank

TEXT_LENGTH = 2 * TOKENS_PER_CAPTION
NoiseSource = Callable[[int, torch.Size], Tensor]


@torch.no_grad()
def continue_clips(
    student: Transformer,
    text_encoder: TextEncoder,
    bank: TripBank,
    *,
    first_chunk: int,
    hidden: Tensor | None = None,
    num_steps: int = 4,
    stochastic: bool = False,
    noise: NoiseSource | None = None,
) -> Tensor:
    """The clips of `bank` with all chunks from `first_chunk` on made by `student`; (N, F, C, h, w) float32.

    It remembers the first frame of every chunk. hidden: (N, F) bool, frames that it does not remember.
    stochastic: sample with fresh noise in every step instead of Euler's.
    noise: called with a chunk and the shape (N, C, T, h, w) for its noise; None: the same noise in every call.
    """
    latents = bank.latents.float()
    noise = noise or _seeded_noise(latents.device, first_chunk)
    rows = torch.arange(len(latents), device=latents.device)
    for chunk in range(first_chunk, bank.num_chunks):
        slots: list[SlotLayout] = [slots_of(chunk, "uniform")] * len(latents)
        batch = gather_batch(bank, rows, rows.new_full(rows.shape, chunk), slots, latents=latents)
        if hidden is not None:
            batch = batch.without(hidden[rows[:, None], batch.frames.clamp(min=0)])
        batch = batch.with_prompt(text_encoder, batch.tokens, length=TEXT_LENGTH)
        draw = partial(noise, chunk, batch.chunk.shape)
        made = sample_chunk(student, context_of(student, batch), draw, num_steps=num_steps, stochastic=stochastic)
        latents[:, chunk * CHUNK_FRAMES : (chunk + 1) * CHUNK_FRAMES] = made.transpose(1, 2)
    return latents


def sample_chunk(
    student: Transformer, context: ChunkContext, noise: Callable[[], Tensor], *, num_steps: int, stochastic: bool
) -> Tensor:
    """One chunk (B, C, T, h, w) from noise, in `num_steps` passes.

    noise: gives new noise of the chunk's shape. stochastic: every step predicts the chunk and adds new noise to it.
    """
    chunk = noise()
    for sigma, following in itertools.pairwise(euler_sigmas(num_steps)):
        velocity = velocity_in(student, context, chunk, chunk.new_full((len(chunk),), sigma))
        if stochastic and following > 0:
            chunk = (1 - following) * (chunk - sigma * velocity) + following * noise()
        else:
            chunk = chunk + (following - sigma) * velocity
    return chunk


def euler_sigmas(num_steps: int) -> list[float]:
    """Noise levels from 1 to 0 with Wan's shift; `num_steps` + 1 of them."""
    times = [1 - step / num_steps for step in range(num_steps + 1)]
    return [FLOW_SHIFT * time / (1 + (FLOW_SHIFT - 1) * time) for time in times]


def _seeded_noise(device: torch.device, seed: int) -> NoiseSource:
    generator = seeded_generator(device, seed)
    return lambda chunk, shape: torch.randn(shape, device=device, generator=generator)

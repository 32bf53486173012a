"""Rollouts of many clips at once with the functional path: every chunk encodes anew what it remembers.

Nothing is kept from chunk to chunk but latents, so this is simple and, in large batches, fast enough to validate with;
`vidaccel.rollout` is the way that makes videos.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vidaccel.training.architecture import TextEncoder, Transformer
from vidaccel.training.chunk_batch import SlotLayout, context_of, slots_of
from vidaccel.training.chunk_sampler import Sampler, sample_chunk
from vidaccel.training.device import seeded_generator
from vidaccel.training.latents import TOKENS_PER_CAPTION
from vidaccel.training.self_rollout import PromptTable, Start, Video, new_video
from vidaccel.training.trip_bank import TripBank

TEXT_LENGTH = 2 * TOKENS_PER_CAPTION
NoiseSource = Callable[[int, torch.Size], Tensor]


@torch.no_grad()
def continue_clips(
    student: Transformer,
    text_encoder: TextEncoder,
    bank: TripBank,
    *,
    first_chunk: int,
    sampler: Sampler,
    hidden: Tensor | None = None,
    noise: NoiseSource | None = None,
) -> Tensor:
    """The clips of `bank` with all chunks from `first_chunk` on made by `student`; (N, F, C, h, w) float32.

    It remembers the first frame of every chunk. hidden, noise: of `continue_video`; None: the same noise in every call.
    """
    starts = [Start(row, first_chunk) for row in range(len(bank.latents))]
    prompts = PromptTable(bank, text_encoder, length=TEXT_LENGTH)
    video = new_video(bank, prompts, starts, rule=_first_frames)
    noise = noise or noise_of(seeded_generator(video.latents.device, first_chunk))
    num_chunks = bank.num_chunks - first_chunk
    return continue_video(student, video, num_chunks=num_chunks, sampler=sampler, noise=noise, hidden=hidden)


@torch.no_grad()
def continue_video(
    student: Transformer,
    video: Video,
    *,
    num_chunks: int,
    sampler: Sampler,
    noise: NoiseSource,
    hidden: Tensor | None = None,
) -> Tensor:
    """Make `num_chunks` chunks after another over the clips of `video`, whose latents are written to and returned.

    noise: called with the number of a chunk, 0 being the first that is made, and the shape (B, C, T, h, w) for its
    noise, and again for fresh noise in its steps. hidden: (B, F) bool, frames that are not remembered.
    """
    samples = torch.arange(len(video.latents), device=video.latents.device)[:, None]
    for number in range(num_chunks):
        batch = video.batch(number)
        if hidden is not None:
            batch = batch.without(hidden[samples, batch.frames.clamp(min=0)])
        draw = partial(noise, number, batch.chunk.shape)
        video.write(batch, sample_chunk(student, context_of(student, batch), draw(), draw, sampler=sampler))
    return video.latents


def noise_of(generator: torch.Generator) -> NoiseSource:
    """Noise of one generator, one draw after another."""
    return lambda number, shape: torch.randn(shape, device=generator.device, generator=generator)


def _first_frames(row: int, chunk: int) -> SlotLayout:
    return slots_of(chunk, "uniform")

"""Rollouts of a student during its distillation: real video, then its own chunks, of which the last ones are scored.

Self-Forcing (arXiv 2506.08009, algorithm 1) and Context Forcing (arXiv 2602.06028, algorithm 1): a chunk is made as
in the shipped rollout, by clean estimates with fresh noise at a few levels, and is the past of the next chunk.
Nothing in here has gradients. A scored chunk is returned as the noisy input of the pass at which it exits, so that the
only pass with gradients is the one that the trainer runs on it (`exit_pass`).
Shapes: B samples; latents of whole clips (B, F, C, h, w), of chunks (B, C, T, h, w).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.training.architecture import TextEncoder, Transformer
from vidaccel.training.chunk_batch import (
    ChunkBatch,
    SlotLayout,
    SlowMode,
    context_of,
    draw_slots,
    gather_batch,
    slots_of,
    velocity_in,
)
from vidaccel.training.chunk_sampler import FEW_STEPS, Sampler, sample_chunk
from vidaccel.training.dmd import clean_estimate
from vidaccel.training.flow import empty_prompt, prompt_embeddings
from vidaccel.training.ranks import shared_by_ranks
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank

LengthRule = Literal["linear", "exponential", "uniform", "fixed"]
Layouts = SlowMode | Literal["drawn"]
_EXPONENT = 3.0
_PROMPTS_AT_A_TIME = 512
_MOST_PROMPT_BYTES = 2**31


# ---- how long ---------------------------------------------------------------------------------------------------


def drawn_length(rule: LengthRule, draw: random.Random, *, progress: float, least: int, most: int) -> int:
    """How many chunks the student makes; both bounds can be drawn. `progress` of the training is 0 to 1, more is 1.

    "linear": uniform up to int(least + progress (most - least)). "exponential": least + floor(U^e (most - least + 1))
    with e from 3 to 1. "uniform": uniform from the beginning. "fixed": always `most`. These are the official code's
    rules, in chunks.
    Raises ValueError where `least` is not between 1 and `most`.
    """
    if not 1 <= least <= most:
        raise ValueError(f"`least` must be from 1 to `most`, got {least} and {most}.")
    progress = min(max(progress, 0.0), 1.0)
    if rule == "fixed":
        return most
    if rule == "linear":
        return draw.randint(least, int(least + progress * (most - least)))
    if rule == "exponential":
        exponent = 1 + (_EXPONENT - 1) * (1 - progress)
        return least + min(math.floor(draw.random() ** exponent * (most - least + 1)), most - least)
    return draw.randint(least, most)


# ---- where ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StartShares:
    """What the last chunks of rollouts show; shares of samples that sum to 1.

    returns: the camera comes back to a place. arrivals: it comes to a new one. changes: the prompt has just changed.
    anything: any chunk. own: of all samples, those that begin with nothing, at the start of a clip.
    """

    returns: float = 0.4
    arrivals: float = 0.3
    changes: float = 0.15
    anything: float = 0.15
    own: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.own <= 1:
            raise UserError(f"The share of rollouts that begin with nothing must be from 0 to 1, got {self.own}.")
        kinds = self.kinds
        if min(kinds) < 0 or not math.isclose(sum(kinds), 1.0, abs_tol=1e-6):
            raise UserError(f"The shares of returns, arrivals, changes and anything must sum to 1, got {kinds}.")

    @property
    def kinds(self) -> tuple[float, float, float, float]:
        """The shares that exclude each other."""
        return self.returns, self.arrivals, self.changes, self.anything


class Start(NamedTuple):
    """A clip of the bank, and the first chunk of it that the student makes."""

    row: int
    chunk: int


def draw_starts(
    bank: TripBank, draw: random.Random, *, count: int, num_chunks: int, shares: StartShares
) -> list[Start]:
    """Starts of `count` rollouts of `num_chunks` chunks each.

    The event that a share is about happens in any of the chunks that the student makes, so that it is scored with its
    own past and also becomes its own past. A bank without such events lends any chunk.
    Raises ValueError for rollouts longer than the clips.
    """
    if num_chunks > bank.num_chunks:
        raise ValueError(f"A rollout of {num_chunks} chunks does not fit clips of {bank.num_chunks}.")
    return [_start(bank, draw, num_chunks, shares) for _ in range(count)]


def _start(bank: TripBank, draw: random.Random, num_chunks: int, shares: StartShares) -> Start:
    tables = (bank.returns, bank.arrivals, bank.changes, ())
    table: Sequence[tuple[int, int]] = draw.choices(tables, shares.kinds)[0]
    if draw.random() < shares.own:
        return Start(draw.randrange(len(bank.latents)), 0)
    if not table:
        return Start(draw.randrange(len(bank.latents)), draw.randint(0, bank.num_chunks - num_chunks))
    row, event = draw.choice(table)
    return Start(row, min(max(event - draw.randrange(num_chunks), 0), bank.num_chunks - num_chunks))


# ---- what is seen -----------------------------------------------------------------------------------------------


class PromptTable:
    """Embeddings of the captions of a bank: a student reads the same few thousand again and again.

    They are computed once where all of them fit into `most_bytes`, else anew for every batch: at Wan's size one prompt
    takes 8 MB. empty: of the empty prompt, (1, length, text_dim).
    """

    def __init__(
        self, bank: TripBank, text_encoder: TextEncoder, *, length: int, most_bytes: int = _MOST_PROMPT_BYTES
    ) -> None:
        """length: of the embeddings, in tokens."""
        self._text_encoder, self._length = text_encoder, length
        self._captions, numbers = bank.tokens.flatten(0, 1).unique(dim=0, return_inverse=True)
        self._numbers = numbers.view(bank.tokens.shape[:2])
        self.empty = self._embedded(empty_prompt(self._captions.device)[None])
        fits = len(self._captions) * self.empty.nbytes <= most_bytes
        self._embeddings = self._embedded(self._captions) if fits else None

    def of(self, rows: Tensor, chunks: Tensor) -> Tensor:
        """Embeddings (B, length, text_dim) of `chunks` of the clips `rows`, both (B,)."""
        numbers = self._numbers[rows, chunks]
        return self._embedded(self._captions[numbers]) if self._embeddings is None else self._embeddings[numbers]

    @torch.no_grad()
    def _embedded(self, captions: Tensor) -> Tensor:
        parts = captions.split(_PROMPTS_AT_A_TIME)
        return torch.cat([prompt_embeddings(self._text_encoder, part, length=self._length) for part in parts])


class LayoutRule(Protocol):
    """Which frames are remembered when `chunk` of the clip `row` is made."""

    def __call__(self, row: int, chunk: int) -> SlotLayout:
        """The slots."""
        ...


def layout_rule(bank: TripBank, layouts: Layouts, draw: random.Random) -> LayoutRule:
    """Layouts drawn for every sample and chunk ("drawn"), or as one memory policy has them."""

    def drawn(row: int, chunk: int) -> SlotLayout:
        return draw_slots(draw, chunk, keyframes=bank.keyframes[row])

    def fixed(row: int, chunk: int) -> SlotLayout:
        assert layouts != "drawn"
        return slots_of(chunk, layouts, keyframes=bank.keyframes[row], draw=draw)

    return drawn if layouts == "drawn" else fixed


@dataclass(frozen=True, kw_only=True)
class Video:
    """The clips of B samples while the student writes its own chunks over them.

    latents: (B, F, C, h, w) float32, real where the student has made nothing. starts: where it begins.
    """

    bank: TripBank
    prompts: PromptTable
    latents: Tensor
    starts: Sequence[Start]
    rule: LayoutRule

    def batch(self, chunk: int) -> ChunkBatch:
        """What is seen while the student makes its chunk number `chunk`, 0 being its first."""
        rows = [start.row for start in self.starts]
        chunks = [start.chunk + chunk for start in self.starts]
        slots = [self.rule(row, number) for row, number in zip(rows, chunks, strict=True)]
        batch = gather_batch(self.bank, rows, chunks, slots, latents=self.latents)
        numbers = batch.first.div(CHUNK_FRAMES, rounding_mode="floor")
        row = torch.as_tensor(rows, device=self.latents.device)
        return replace(batch, embeddings=self.prompts.of(row, numbers))

    def write(self, batch: ChunkBatch, chunk: Tensor) -> None:
        """Put the finished `chunk` (B, C, T, h, w) where `batch` was taken; without its gradients."""
        frames = batch.first[:, None] + torch.arange(chunk.shape[2], device=chunk.device)
        samples = torch.arange(len(chunk), device=chunk.device)[:, None]
        self.latents[samples, frames] = chunk.detach().transpose(1, 2).to(self.latents.dtype)


def new_video(bank: TripBank, prompts: PromptTable, starts: Sequence[Start], *, rule: LayoutRule) -> Video:
    """The real clips of `starts`, to be written over."""
    rows = torch.as_tensor([start.row for start in starts], device=bank.latents.device)
    return Video(bank=bank, prompts=prompts, latents=bank.latents[rows].float(), starts=starts, rule=rule)


# ---- the rollout ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScoredChunk:
    """A chunk at the pass at which it exits: `noisy` (B, C, T, h, w) at the noise level `sigma`.

    batch: what the student sees; its own past is in there without gradients. exit_step: the number of the pass.
    """

    batch: ChunkBatch
    noisy: Tensor
    sigma: float
    exit_step: int

    @property
    def sigmas(self) -> Tensor:
        """The noise level of every sample, (B,)."""
        return self.noisy.new_full((len(self.noisy),), self.sigma)


@torch.no_grad()
def roll_out_chunks(
    student: Transformer,
    video: Video,
    *,
    num_chunks: int,
    num_scored: int,
    draw: random.Random,
    generator: torch.Generator,
    sampler: Sampler = FEW_STEPS,
) -> list[ScoredChunk]:
    """Make `num_chunks` chunks after another; the last `num_scored` are returned at a uniformly drawn exit step.

    The exit step is the same for all samples of a chunk. Every chunk that is somebody's past is denoised to the end;
    the very last one stops before its exit pass. Raises ValueError where more would be scored than are made.
    """
    if not 1 <= num_scored <= num_chunks:
        raise ValueError(f"`num_scored` must be from 1 to {num_chunks}, got {num_scored}.")
    scored = []
    for chunk in range(num_chunks):
        batch = video.batch(chunk)
        is_last, is_scored = chunk == num_chunks - 1, chunk >= num_chunks - num_scored
        exit_step = shared_by_ranks(draw.randrange(len(sampler.sigmas)), video.latents.device) if is_scored else None
        context = context_of(student, batch)
        fresh = partial(torch.randn, batch.chunk.shape, device=video.latents.device, generator=generator)
        noise = fresh()
        inputs = {} if exit_step is None else {exit_step: noise}
        stop = exit_step if is_last else None
        clean = sample_chunk(student, context, noise, fresh, sampler=sampler, inputs=inputs, stop=stop)
        if exit_step is not None:
            sigma = sampler.sigmas[exit_step]
            scored.append(ScoredChunk(batch=batch, noisy=inputs[exit_step], sigma=sigma, exit_step=exit_step))
        if not is_last:
            video.write(batch, clean)
    return scored


def exit_pass(student: Transformer, scored: ScoredChunk) -> Tensor:
    """The clean estimate with which a scored chunk exits; with gradients if they are on, into this pass only."""
    sigmas = scored.sigmas
    context = context_of(student, scored.batch)
    return clean_estimate(scored.noisy, velocity_in(student, context, scored.noisy, sigmas), sigmas)

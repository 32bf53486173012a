"""Where states come from: the student's own rollouts, or a teacher's ways from pure noise.

Rollouts begin at a real prefix; what the student makes after it stands in its own memory, as in a rollout of any
length. Everything that is drawn on the host is drawn before, as a plan of plain numbers.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vidaccel.training.architecture import Transformer
from vidaccel.training.chunk_batch import ChunkBatch, SlotLayout, context_of, draw_slots, gather_batch
from vidaccel.training.chunk_sampler import sample_chunk, shifted_sampler
from vidaccel.training.offline.states import STORED, Embed, States
from vidaccel.training.trip_bank import TripBank


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """Rollouts of one batch.

    rows: clips of the bank, one a rollout; first_chunks: where each leaves its clip. slots: for each own chunk the
    slots of all rollouts. kept: by own chunk and step, the rollouts whose state there is kept.
    """

    rows: tuple[int, ...]
    first_chunks: tuple[int, ...]
    slots: tuple[tuple[SlotLayout, ...], ...]
    kept: Mapping[tuple[int, int], tuple[int, ...]]

    def chunks(self, number: int) -> list[int]:
        """The chunk that is own chunk `number` in each rollout."""
        return [first + number for first in self.first_chunks]


def plan_rollouts(
    bank: TripBank,
    draw: random.Random,
    *,
    num_rollouts: int,
    own_chunks: int,
    num_steps: int,
    states_per_rollout: int,
    return_share: float,
) -> RolloutPlan:
    """Draw rollouts of `own_chunks` chunks with `num_steps` steps each.

    return_share: those that begin where the camera comes back to a place, as far as the bank has such.
    """
    last = bank.num_chunks - own_chunks
    returns = [pair for pair in bank.returns if pair[1] <= last]
    starts = [
        draw.choice(returns)
        if returns and draw.random() < return_share
        else (draw.randrange(len(bank.latents)), draw.randint(min(1, last), last))
        for _ in range(num_rollouts)
    ]
    slots = tuple(
        tuple(draw_slots(draw, chunk + number, keyframes=bank.keyframes[row]) for row, chunk in starts)
        for number in range(own_chunks)
    )
    places = [(number, step) for number in range(own_chunks) for step in range(num_steps)]
    kept: dict[tuple[int, int], tuple[int, ...]] = {}
    for rollout in range(num_rollouts):
        for place in draw.sample(places, states_per_rollout):
            kept[place] = (*kept.get(place, ()), rollout)
    rows, firsts = zip(*starts, strict=True)
    return RolloutPlan(rows=rows, first_chunks=firsts, slots=slots, kept=kept)


def states_at(batch: ChunkBatch, noisy: Tensor, sigma: float) -> States:
    """The chunks of a batch, noisy at one level."""
    cameras = zip(batch.context_camera, batch.chunk_camera, strict=True)
    columns, motions = (torch.cat(pair, dim=1) for pair in cameras)
    return States(
        noisy=noisy.to(STORED),
        sigmas=noisy.new_full((len(noisy),), sigma),
        context=batch.context.to(STORED),
        mask=batch.context_mask,
        columns=columns,
        motions=motions,
        tokens=batch.tokens,
    )


def noise_states(bank: TripBank, plan: RolloutPlan, generator: torch.Generator) -> States:
    """Pure noise where the first own chunk of each rollout would begin."""
    batch = gather_batch(bank, plan.rows, plan.first_chunks, plan.slots[0])
    return states_at(batch, _noise(batch.chunk, generator), 1.0)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What a batch of rollouts gave: the states that were to be kept, the videos (B, F, C, h, w), and the passes."""

    states: States | None
    videos: Tensor
    num_forwards: int


@torch.no_grad()
def visit(
    student: Transformer, bank: TripBank, plan: RolloutPlan, *, num_steps: int, embed: Embed, generator: torch.Generator
) -> Visit:
    """Roll the student out and keep the states of the plan on the way.

    It takes `num_steps` steps a chunk, each to clean latents and back to the next noise level with fresh noise.
    """
    videos = bank.latents[torch.tensor(plan.rows, device=bank.latents.device)].float()
    kept: list[States] = []
    sampler = shifted_sampler(num_steps, stochastic=True)
    for number, slots in enumerate(plan.slots):
        batch = gather_batch(bank, plan.rows, plan.chunks(number), slots, latents=videos)
        states = states_at(batch, _noise(batch.chunk, generator), 1.0)
        context = context_of(student, states.surroundings(embed(states.tokens)))
        passes: dict[int, Tensor] = {step: states.noisy for own, step in plan.kept if own == number}
        draw = partial(_noise, batch.chunk, generator)
        clean = sample_chunk(student, context, states.noisy.float(), draw, sampler=sampler, inputs=passes)
        for step, noisy in sorted(passes.items()):
            rollouts = torch.tensor(plan.kept[number, step], device=noisy.device)
            kept.append(states.at(noisy, noisy.new_full((len(noisy),), sampler.sigmas[step])).rows(rollouts))
        frames = batch.first[:, None] + torch.arange(clean.shape[2], device=clean.device)
        videos[torch.arange(len(videos), device=clean.device)[:, None], frames] = clean.transpose(1, 2)
    count = len(plan.rows) * len(plan.slots) * num_steps
    return Visit(states=States.joined(kept) if kept else None, videos=videos, num_forwards=count)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, device=like.device, generator=generator)

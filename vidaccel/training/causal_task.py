"""The causal student's loss on a bank of trips, as `loop.train` wants it, and its validation."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory import DepthMap
from vidaccel.memory.prefixes import with_prefix
from vidaccel.training.architecture import TEMPORAL_STRIDE, Transformer
from vidaccel.training.causal_config import CausalTrainingConfig
from vidaccel.training.causal_rollout import TEXT_LENGTH
from vidaccel.training.causal_score import recall_score, rollout_score
from vidaccel.training.causal_student import Donor
from vidaccel.training.checkpoint import TrainingState
from vidaccel.training.chunk_batch import (
    FROM_NOTHING,
    ChunkBatch,
    SlotLayout,
    draw_slots,
    gather_batch,
    slots_of,
    velocity_of,
)
from vidaccel.training.chunk_sampler import shifted_sampler
from vidaccel.training.depth_routing import drawn_reading, reading
from vidaccel.training.device import seeded_generator
from vidaccel.training.flow import draw_high_sigmas, draw_sigmas, drop_words, noisy_latents
from vidaccel.training.return_visits import ReturnVisits
from vidaccel.training.transformer_trainer import new_optimizers
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank, build_trip_bank, training_clips
from vidaccel.world import random_scene

_HELD_OUT_SEED = 77_000_000
_KINDS = ("returns", "arrivals", "changes")


class Target(NamedTuple):
    """A chunk to train on: clip, chunk, whether the clip began with a given image, and where it was drawn from."""

    row: int
    chunk: int
    after_image: bool
    kind: str


def draw_target(draw: random.Random, bank: TripBank, config: CausalTrainingConfig) -> Target:
    """A chunk of one of the row tables of `bank`, with the shares of `config`, or any chunk."""
    shares = (config.return_share, config.arrival_share, config.change_share)
    kind = draw.choices((*_KINDS, "any"), (*shares, max(1 - sum(shares), 0.0)))[0]
    if kind != "any" and (table := getattr(bank, kind)):
        row, chunk = draw.choice(table)
        return Target(row, chunk, False, kind)
    row, chunk = draw.randrange(len(bank.latents)), draw.randrange(bank.num_chunks)
    return Target(row, chunk, chunk > 0 and draw.random() < config.image_share, "any")


class CausalTask:
    """Student, bank and loss, as `loop.train` wants them; donor's networks are only read.

    beginnings: the bank of which first chunks are taken, `bank` or one of clips that are no longer. changed: of which
        the chunks of `change_batch` are taken.
    """

    def __init__(
        self,
        student: Transformer,
        donor: Donor,
        config: CausalTrainingConfig,
        *,
        bank: TripBank,
        beginnings: TripBank,
        changed: TripBank | None = None,
        state: TrainingState,
    ) -> None:
        self.student, self.donor, self.config = student, donor, config
        self.bank, self.beginnings, self.changed = bank, beginnings, changed
        if changed is not None and not changed.changes:
            raise UserError(
                f"None of the {len(changed.clips)} short clips shows a change of the prompt; give more of them "
                "(--change-clips)."
            )
        self.device = bank.latents.device
        self.parameters = list(student.parameters())
        self.optimizers = new_optimizers(student, self.parameters, config.optimizer, rate=config.schedule.learning_rate)
        if config.compile:
            student.compile_repeated_blocks(dynamic=False)
        self.generator = seeded_generator(self.device, config.seed, state.round, state.round_step)
        self._draw = random.Random(f"causal {config.seed} {state.round} {state.round_step}")
        self.num_frames_per_step = config.batch_size * CHUNK_FRAMES * TEMPORAL_STRIDE
        self._held_out: TripBank | None = None
        self._visits: ReturnVisits | None = None
        self._sampler = shifted_sampler(config.validation_steps)

    def loss(self, fraction: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted flow-matching loss of random chunks of random clips, of changes and of first chunks; for the records
        the plain ones, and the one at high noise of chunks that come back to a place."""
        targets = [draw_target(self._draw, self.bank, self.config) for _ in range(self.config.batch_size)]
        squared, weighted = self._errors_of(*self._batch(self.bank, targets))
        high = squared[:, 0].mean((1, 2, 3, 4))
        returns = torch.tensor([target.kind == "returns" for target in targets]).to(self.device, non_blocking=True)
        return_loss = (high * returns).sum() / returns.sum().clamp(min=1)
        scalars, parts = {"flow_loss": squared.mean(), "return_loss": return_loss}, [weighted]
        if self.changed is not None:
            drawn = self._draw.choices(self.changed.changes, k=self.config.change_batch)
            changes = [Target(row, chunk, False, "changes") for row, chunk in drawn]
            squared, weighted = self._errors_of(*self._batch(self.changed, changes))
            scalars["change_loss"] = squared.mean()
            parts.append(weighted)
        if self.config.begin_batch:
            squared, weighted = self._errors_of(self._beginnings(), self.student)
            scalars["begin_loss"] = squared.mean()
            parts.append(weighted)
        return torch.cat(parts).mean(), scalars

    def _batch(self, bank: TripBank, targets: Sequence[Target]) -> tuple[ChunkBatch, Transformer]:
        """The chunks with what is remembered, and the student as it reads that."""
        batch, reader = self._prompted(self._gathered(bank, targets)), self._reader()
        if self._draw.random() < self.config.own_share:
            batch = self._with_own_estimate(bank, batch, targets, reader)
        if self._draw.random() < self.config.context_noise_share:
            batch = batch.disturbed(self.config.context_noise, self.generator)
        return batch, reader

    def _beginnings(self) -> ChunkBatch:
        """First chunks, which remember nothing."""
        count = self.config.begin_batch
        rows = self._draw.choices(range(len(self.beginnings.clips)), k=count)
        return self._prompted(gather_batch(self.beginnings, rows, [0] * count, [FROM_NOTHING] * count))

    def _errors_of(self, batch: ChunkBatch, reader: Transformer) -> tuple[Tensor, Tensor]:
        """Squared errors without gradients, and weighted with them; both (B, copies, C, T, h, w)."""
        squared = self.squared_errors(batch, self._sigmas(len(batch.chunk)), self.generator, reader=reader)
        weight = batch.weight(subject=self.config.subject_weight, landmarks=self.config.landmark_weight)
        return squared.detach(), squared * weight[:, None]

    def _reader(self) -> Transformer:
        """The student as its layers read each other's memory in this step, its own estimate included."""
        config = self.config
        return drawn_reading(self.student, self._draw, kv_routing=config.kv_routing, depth_every=config.depth_every)

    @property
    def _judged(self) -> Transformer:
        """The student as its layers read when it is used."""
        return reading(self.student, DepthMap.every(self.config.depth_every, self.student.config.num_layers))

    def _gathered(self, bank: TripBank, targets: Sequence[Target]) -> ChunkBatch:
        rows, chunks, after_image, _ = zip(*targets, strict=True)
        slots = [
            draw_slots(self._draw, chunk, keyframes=bank.keyframes[row], after_image=is_after)
            for row, chunk, is_after in zip(rows, chunks, after_image, strict=True)
        ]
        return gather_batch(bank, rows, chunks, slots)

    def _prompted(self, batch: ChunkBatch) -> ChunkBatch:
        """With the caption of the chunk, which remembered frames are encoded with too, as after a soft cut."""
        config = self.config
        tokens = drop_words(
            batch.tokens, captions=config.caption_dropout, words=config.word_dropout, generator=self.generator
        )
        return batch.with_prompt(self.donor.text_encoder, tokens, length=TEXT_LENGTH)

    def _sigmas(self, count: int) -> Tensor:
        """(count, copies), the first of them high."""
        sigmas = draw_sigmas(count * self.config.copies, self.generator).view(count, -1)
        sigmas[:, 0] = draw_high_sigmas(count, self.generator)
        return sigmas

    def squared_errors(
        self, batch: ChunkBatch, sigmas: Tensor, generator: torch.Generator, *, reader: Transformer | None = None
    ) -> Tensor:
        """Squared error of the velocity for noisy copies at `sigmas` (B, copies); (B, copies, C, T, h, w).

        reader: the student with layers that read others' memory.
        """
        copies = sigmas.shape[1]
        target = batch.chunk.repeat_interleave(copies, 0)
        noise = torch.randn(target.shape, device=self.device, generator=generator)
        levels = sigmas.flatten()
        student = reader or self.student
        velocity = velocity_of(student, batch, noisy_latents(target, noise, levels), levels, copies=copies)
        return (velocity - (noise - target)).square().unflatten(0, (-1, copies))

    @torch.no_grad()
    def _with_own_estimate(
        self, bank: TripBank, batch: ChunkBatch, targets: Sequence[Target], reader: Transformer
    ) -> ChunkBatch:
        """The chunk before as the student, as `reader`, sees it from noise, as in a rollout the past is its own.

        Where the chunk before is a given image, or there is none, the truth stays.
        """
        earlier = [Target(row, max(chunk - 1, 0), is_after, kind) for row, chunk, is_after, kind in targets]
        is_own = torch.tensor([target.chunk > target.after_image for target in targets]).to(self.device)
        previous = replace(self._gathered(bank, earlier), embeddings=batch.embeddings)
        sigmas = 0.3 + 0.6 * torch.rand(len(targets), device=self.device, generator=self.generator)
        noise = torch.randn(previous.chunk.shape, device=self.device, generator=self.generator)
        noisy = noisy_latents(previous.chunk, noise, sigmas)
        with torch.compiler.set_stance("force_eager"):
            estimate = noisy - sigmas.view(-1, 1, 1, 1, 1) * velocity_of(reader, previous, noisy, sigmas)
        return batch.with_chunk(estimate, previous.first.where(is_own, -CHUNK_FRAMES))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss at high noise on clips trained on and on others, recall on held-out trips, and what rollouts show.

        Clips that are trained on too often are known by heart: the first of these losses falls, the second rises.
        """
        config = self.config
        results = self._losses() | self._recall() if config.validation_trips else {}
        if config.validation_clips:
            seeds = range(_HELD_OUT_SEED, _HELD_OUT_SEED + config.validation_clips)
            results |= rollout_score(
                self._judged,
                self.donor,
                [random_scene(seed, split="test") for seed in seeds],
                bank=self.bank,
                num_chunks=config.validation_chunks,
                sampler=self._sampler,
            )
        return results

    def _recall(self) -> dict[str, float]:
        config = self.config
        if self._visits is None:
            seeds = range(config.validation_trips)
            self._visits = ReturnVisits(self.donor, seeds, away_chunks=config.validation_away_chunks)
        return recall_score(self._judged, self._visits, sampler=self._sampler)

    def _losses(self) -> dict[str, float]:
        config = self.config
        if self._held_out is None:
            seeds = range(_HELD_OUT_SEED, _HELD_OUT_SEED + config.validation_trips)
            clips = training_clips(seeds, num_chunks=config.num_chunks, split="test", hold_share=config.hold_share)
            self._held_out = build_trip_bank(self.donor.vae, self.donor.tokenizer, trips=clips)
        return {
            **self._losses_of("held_out", dict.fromkeys((*_KINDS, "beginnings"), self._held_out)),
            **self._losses_of(
                "trained",
                dict.fromkeys(_KINDS, self.bank)
                | {"changes": self.changed or self.bank, "beginnings": self.beginnings},
            ),
        }

    def _losses_of(self, name: str, sources: Mapping[str, TripBank]) -> dict[str, float]:
        """Of the first chunks of every row table that has any, by `name` and the table's; sources: the bank of each."""
        generator, losses = seeded_generator(self.device, _HELD_OUT_SEED), {}
        for kind, source in sources.items():
            rows = list(dict.fromkeys(getattr(source, kind)))[: self.config.validation_trips]
            if not rows:
                continue
            slots: list[SlotLayout] = [slots_of(chunk, "uniform") for _, chunk in rows]
            batch = gather_batch(source, [row for row, _ in rows], [chunk for _, chunk in rows], slots)
            batch = batch.with_prompt(self.donor.text_encoder, batch.tokens, length=TEXT_LENGTH)
            with torch.compiler.set_stance("force_eager"):
                errors = self.squared_errors(
                    batch, draw_high_sigmas(len(rows), generator)[:, None], generator, reader=self._judged
                )
            losses[f"{name}_{kind}"] = float(errors.mean())
        return losses

    def tensors(self) -> dict[str, Tensor]:
        """The weights of the student."""
        return with_prefix("transformer", self.student.state_dict())

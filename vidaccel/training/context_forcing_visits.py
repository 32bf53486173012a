"""Does a student show again what it saw: held-out trips, memories that differ, and what the landmark oracle reads.

A trip visits a place, leaves it, and comes back at its end. The student is given the trip up to the way back and makes
the rest with its few steps, under one of `CELLS`; what counts is the landmark at the end, against the one of the first
visit. Nothing here needs a pipeline: rollouts are batches of the functional path, of the same shape as in training, so
that compiled blocks serve.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_score import shows_target
from vidaccel.training.causal_student import Donor
from vidaccel.training.chunk_batch import SlotLayout, context_of, slots_of
from vidaccel.training.device import seeded_generator
from vidaccel.training.oracle_score import decoded
from vidaccel.training.self_rollout import LayoutRule, PromptTable, Start, Video, few_step_chunk
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank, build_trip_bank, pixels_per_column
from vidaccel.world.landmark_oracle import SAME_PLACE, VALID_LIKELIHOOD, LandmarkReadings, read_landmarks
from vidaccel.world.trip import ReturnTrip
from vidaccel.world.trips import swapped, test_trip

TripKind = Literal["return", "three", "shift"]
Cell = Literal["memory", "blank", "window", "sink", "swap", "first visit", "own"]
CELLS: tuple[Cell, ...] = get_args(Cell)
_DECODED_FRAMES = 6  # latent; the first ones are read by nobody, because a decoder begins with them
_STILL_FRAMES = 9  # pixel frames, whose median is read


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of every trip in one cell.

    as_seen: kind, colour and place are those of the first visit. kind, colour, place: each of them.
    swapped: all three are those of the other landmark that the memory showed (cell "swap").
    valid: what stands there is as clear as a landmark of the world. likelihood: how clear, a pixel.
    kinds: what was read.
    """

    as_seen: tuple[bool, ...]
    kind: tuple[bool, ...]
    colour: tuple[bool, ...]
    place: tuple[bool, ...]
    swapped: tuple[bool, ...]
    valid: tuple[bool, ...]
    likelihood: tuple[float, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What the oracle reads of every trip; x on the canvas, in pixels."""

    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    x: tuple[float, ...]
    likelihoods: tuple[float, ...]


class ReturnVisits:
    """Held-out trips of one kind, encoded, with the truth as the oracle reads it after decoding."""

    def __init__(
        self,
        donor: Donor,
        seeds: Sequence[int],
        *,
        kind: TripKind = "return",
        batch_size: int = 64,
        text: int = 64,
        away_chunks: int = 6,
    ) -> None:
        """batch_size: trips rolled out at a time; whole batches are of the shape that a training compiles."""
        trips = [test_trip(seed, kind=kind, away_chunks=away_chunks) for seed in seeds]
        other = [swapped(trip, trip.seed) for trip in trips]
        self._donor, self._batch_size, self._text = donor, batch_size, text
        self.trip: ReturnTrip = trips[0]
        self.bank, self._other = (build_trip_bank(donor.vae, donor.tokenizer, trips=clips) for clips in (trips, other))
        self._shows_target = shows_target(self.bank)
        self._truth = self._read(self.bank.latents, self.trip.first_visit)
        self._other_truth = self._read(self._other.latents, self.trip.first_visit)

    def __len__(self) -> int:
        return len(self.bank.latents)

    def ceiling(self) -> Outcome:
        """What the truth itself reads as at the second visit, after decoding."""
        return self._compared(self._truth, self._read(self.bank.latents, self.trip.second_visit))

    def outcome(self, student: Transformer, cell: Cell, *, seed: int = 0, count: int | None = None) -> Outcome:
        """Roll `student` out on the first `count` trips, or all, under a cell and read what it shows.

        "memory": it remembers the first frame of every chunk. "blank": frames with any of the place's landmark are
        not remembered. "window": only the last frames are, "sink": the first ones and the last chunk.
        "swap": the place's frames show another landmark. "first visit": it makes the first visit, from the way there
        on, and that is read. "own": it makes everything, and its second visit is compared with its own first.
        """
        made = self.rolled_out(student, cell, seed=seed, count=count)
        if cell == "first visit":
            return self._compared(self._truth, self._read(made, self.trip.first_visit))
        before = self._read(made, self.trip.first_visit) if cell == "own" else self._truth
        return self._compared(before, self._read(made, self.trip.second_visit))

    @torch.no_grad()
    def rolled_out(self, student: Transformer, cell: Cell, *, seed: int = 0, count: int | None = None) -> Tensor:
        """The latents (N, F, C, h, w) of the first `count` trips with what the student made of them under a cell."""
        first, end = self._made_chunks(cell)
        latents = self.bank.latents[:count].float()
        if cell == "swap":
            old = self._shows_target[: len(latents)].clone()
            old[:, first * CHUNK_FRAMES :] = False
            latents = torch.where(old[:, :, None, None, None], self._other.latents[:count].float(), latents)
        generator = seeded_generator(latents.device, seed, CELLS.index(cell))
        for rows in torch.arange(len(latents)).split(self._batch_size):
            stance = "default" if len(rows) == self._batch_size else "force_eager"
            with torch.compiler.set_stance(stance):
                latents[rows] = self._continued(student, cell, latents, rows.tolist(), range(first, end), generator)
        return latents

    def _made_chunks(self, cell: Cell) -> tuple[int, int]:
        if cell == "own":
            return 0, self.trip.num_chunks
        if cell == "first visit":
            return self.trip.first_visit.start - self._pan_chunks, self.trip.first_visit.stop
        return self.trip.prefix_chunks, self.trip.num_chunks

    @property
    def _pan_chunks(self) -> int:
        """Chunks of the way to a place."""
        return self.trip.second_visit.start - self.trip.prefix_chunks

    def _continued(
        self,
        student: Transformer,
        cell: Cell,
        latents: Tensor,
        rows: list[int],
        chunks: range,
        generator: torch.Generator,
    ) -> Tensor:
        bank = _part(self.bank, rows)
        video = Video(
            bank=bank,
            prompts=PromptTable(bank, self._donor.text_encoder, length=self._text),
            latents=latents[rows].clone(),
            starts=[Start(row, chunks.start) for row in range(len(rows))],
            rule=_layouts(cell),
        )
        samples = torch.arange(len(rows), device=latents.device)[:, None]
        hidden = self._shows_target[rows]
        for number in range(len(chunks)):
            batch = video.batch(number)
            if cell == "blank":
                old = batch.frames < chunks.start * CHUNK_FRAMES
                batch = batch.without(hidden[samples, batch.frames.clamp(min=0)] & old)
            noise = torch.randn(batch.chunk.shape, device=latents.device, generator=generator)
            made = few_step_chunk(student, context_of(student, batch), noise, generator=generator)
            video.write(batch, made)
        return video.latents

    def still(self, latents: Tensor, visit: range) -> Tensor:
        """What is seen at the end of a visit: (N, 3, H, W) in [0, 1], the median of the last pixel frames."""
        end = visit.stop * CHUNK_FRAMES
        part = latents[:, max(end - _DECODED_FRAMES, 0) : end].float().transpose(1, 2)
        return decoded(self._donor.vae, part)[:, -_STILL_FRAMES:].median(dim=1).values

    def _read(self, latents: Tensor, visit: range) -> _Seen:
        reading: LandmarkReadings = read_landmarks(self.still(latents, visit))
        scale = pixels_per_column(self._donor.vae)
        left = scale * self.bank.columns[: len(latents), visit.stop * CHUNK_FRAMES - 1]
        return _Seen(
            kinds=tuple(reading.kinds),
            colours=tuple(reading.colours),
            x=tuple((reading.x.cpu() + left.cpu()).tolist()),
            likelihoods=tuple(reading.likelihoods.tolist()),
        )

    def _compared(self, before: _Seen, after: _Seen) -> Outcome:
        same = list(_same(before, after))
        other = list(_same(self._other_truth, after))
        return Outcome(
            as_seen=tuple(all(row) for row in same),
            kind=tuple(kind for kind, _, _ in same),
            colour=tuple(colour for _, colour, _ in same),
            place=tuple(place for _, _, place in same),
            swapped=tuple(all(row) for row in other),
            valid=tuple(value >= VALID_LIKELIHOOD for value in after.likelihoods),
            likelihood=after.likelihoods,
            kinds=after.kinds,
        )


def _same(before: _Seen, after: _Seen) -> Iterator[tuple[bool, bool, bool]]:
    for index in range(len(after.kinds)):
        yield (
            before.kinds[index] == after.kinds[index],
            before.colours[index] == after.colours[index],
            abs(before.x[index] - after.x[index]) <= SAME_PLACE,
        )


def _layouts(cell: Cell) -> LayoutRule:
    """Which frames are remembered: the first of every chunk, or what a control leaves."""

    def rule(row: int, chunk: int) -> SlotLayout:
        if cell == "window":
            return slots_of(chunk, "window", sink=chunk < 2)
        return slots_of(chunk, "none" if cell == "sink" else "uniform")

    return rule


def _part(bank: TripBank, rows: list[int]) -> TripBank:
    """Some clips of a bank, without its tables."""
    return replace(
        bank,
        latents=bank.latents[rows],
        columns=bank.columns[rows],
        motions=bank.motions[rows],
        tokens=bank.tokens[rows],
        coverage=bank.coverage[rows],
        landmarks=bank.landmarks[rows],
        returns=(),
        arrivals=(),
        changes=(),
        keyframes=tuple(bank.keyframes[row] for row in rows),
        clips=tuple(bank.clips[row] for row in rows),
    )

"""Does a student show again what it saw: held-out trips, memories that differ, and what the landmark oracle reads.

A trip visits a place, leaves it, and comes back at its end. The student is given the trip up to the way back and makes
the rest with its few steps, under one of `CELLS`; what counts is the landmark at the end, against the one of the first
visit. Nothing here needs a pipeline: rollouts are batches of the functional path, of the same shape as in training, so
that compiled blocks serve.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_rollout import TEXT_LENGTH, continue_video, noise_of
from vidaccel.training.causal_student import Donor
from vidaccel.training.chunk_batch import SlotLayout, slots_of
from vidaccel.training.chunk_sampler import FEW_STEPS, Sampler
from vidaccel.training.device import seeded_generator
from vidaccel.training.oracle_score import decoded
from vidaccel.training.self_rollout import LayoutRule, PromptTable, Start, Video
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank, build_trip_bank, pixels_per_column
from vidaccel.world.landmark_oracle import SAME_PLACE, VALID_LIKELIHOOD, LandmarkReadings, read_landmarks
from vidaccel.world.trip import ReturnTrip
from vidaccel.world.trips import swapped, test_trip

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
class Seen:
    """What the oracle reads of every trip; x on the canvas, in pixels."""

    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    x: tuple[float, ...]
    likelihoods: tuple[float, ...]


class ReturnVisits:
    """Held-out trips, encoded, with the truth as the oracle reads it after decoding."""

    def __init__(
        self,
        donor: Donor,
        seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        text: int = TEXT_LENGTH,
        away_chunks: int = 6,
    ) -> None:
        """batch_size: trips rolled out at a time, of the shape that a training compiles; None: all, not compiled."""
        self._donor, self._batch_size, self._text = donor, batch_size, text
        self._trips = [test_trip(seed, away_chunks=away_chunks) for seed in seeds]
        self.trip: ReturnTrip = self._trips[0]
        self.bank = build_trip_bank(donor.vae, donor.tokenizer, trips=self._trips)

    def __len__(self) -> int:
        return len(self.bank.latents)

    @cached_property
    def truth(self) -> Seen:
        """The first visits of the trips themselves."""
        return self.read(self.bank.latents, self.trip.first_visit)

    @cached_property
    def _other(self) -> TripBank:
        """The trips with another landmark at the place."""
        trips = [swapped(trip, trip.seed) for trip in self._trips]
        return build_trip_bank(self._donor.vae, self._donor.tokenizer, trips=trips)

    @cached_property
    def _other_truth(self) -> Seen:
        return self.read(self._other.latents, self.trip.first_visit)

    @cached_property
    def _prompts(self) -> PromptTable:
        return PromptTable(self.bank, self._donor.text_encoder, length=self._text)

    @cached_property
    def _shows_target(self) -> Tensor:
        """(N, F) bool: frames of chunks that show the place which is visited twice."""
        rows = [[trip.shows_target(chunk) for chunk in range(self.bank.num_chunks)] for trip in self._trips]
        return torch.tensor(rows, device=self.bank.latents.device).repeat_interleave(CHUNK_FRAMES, 1)

    def ceiling(self) -> Outcome:
        """What the truth itself reads as at the second visit, after decoding."""
        return self._compared(self.truth, self.read(self.bank.latents, self.trip.second_visit))

    def outcome(
        self, student: Transformer, cell: Cell, *, sampler: Sampler = FEW_STEPS, count: int | None = None
    ) -> Outcome:
        """Roll `student` out on the first `count` trips, or all, and read what it shows.

        "memory": it remembers the first frame of every chunk. "blank": frames with any of the place's landmark are
        not remembered. "window": only the last frames are, "sink": the first ones and the last chunk.
        "swap": the place's frames show another landmark. "first visit": it makes the first visit, from the way there
        on, and that is read. "own": it makes everything, and its second visit is compared with its own first.
        """
        made = self.rolled_out(student, cell, sampler=sampler, count=count)
        if cell == "first visit":
            return self._compared(self.truth, self.read(made, self.trip.first_visit))
        before = self.read(made, self.trip.first_visit) if cell == "own" else self.truth
        return self._compared(before, self.read(made, self.trip.second_visit))

    @torch.no_grad()
    def rolled_out(
        self,
        student: Transformer,
        cell: Cell,
        *,
        sampler: Sampler = FEW_STEPS,
        generator: torch.Generator | None = None,
        count: int | None = None,
        rule: LayoutRule | None = None,
    ) -> Tensor:
        """The latents (N, F, C, h, w) of the first `count` trips with what the student made of them under a cell.

        generator: of the noise; None: the same noise in every call, another one in every cell.
        rule: which frames are remembered; None: as the cell says.
        """
        first, end = self.made_chunks(cell)
        latents = self.bank.latents[:count].float()
        device, old = latents.device, self._shows_target[:count].clone()
        old[:, first * CHUNK_FRAMES :] = False
        if cell == "swap":
            latents = torch.where(old[:, :, None, None, None], self._other.latents[:count].float(), latents)
        noise = noise_of(generator or seeded_generator(device, 0, CELLS.index(cell)))
        for rows in torch.arange(len(latents)).split(self._batch_size or len(latents)):
            video = Video(
                bank=self.bank,
                prompts=self._prompts,
                latents=latents[rows],
                starts=[Start(row, first) for row in rows.tolist()],
                rule=rule or _layouts(cell),
            )
            hidden = old[rows] if cell == "blank" else None
            with torch.compiler.set_stance("default" if len(rows) == self._batch_size else "force_eager"):
                latents[rows] = continue_video(
                    student, video, num_chunks=end - first, sampler=sampler, noise=noise, hidden=hidden
                )
        return latents

    def made_chunks(self, cell: Cell) -> tuple[int, int]:
        """The first chunk that a student makes under a cell, and the one after its last."""
        if cell == "own":
            return 0, self.trip.num_chunks
        if cell == "first visit":
            way = self.trip.second_visit.start - self.trip.prefix_chunks  # chunks of the way to a place
            return self.trip.first_visit.start - way, self.trip.first_visit.stop
        return self.trip.prefix_chunks, self.trip.num_chunks

    def still(self, latents: Tensor, visit: range) -> Tensor:
        """What is seen at the end of a visit: (N, 3, H, W) in [0, 1], the median of the last pixel frames."""
        end = visit.stop * CHUNK_FRAMES
        part = latents[:, max(end - _DECODED_FRAMES, 0) : end].float().transpose(1, 2)
        return decoded(self._donor.vae, part)[:, -_STILL_FRAMES:].median(dim=1).values

    def read(self, latents: Tensor, visit: range) -> Seen:
        """What the oracle reads at the end of a visit."""
        reading: LandmarkReadings = read_landmarks(self.still(latents, visit))
        scale = pixels_per_column(self._donor.vae)
        left = scale * self.bank.columns[: len(latents), visit.stop * CHUNK_FRAMES - 1]
        return Seen(
            kinds=tuple(reading.kinds),
            colours=tuple(reading.colours),
            x=tuple((reading.x.cpu() + left.cpu()).tolist()),
            likelihoods=tuple(reading.likelihoods.tolist()),
        )

    def _compared(self, before: Seen, after: Seen) -> Outcome:
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


def share(values: Sequence[bool]) -> float:
    """How many of them are true, 0 to 1."""
    return sum(values) / len(values)


def as_seen(before: Seen, after: Seen) -> tuple[bool, ...]:
    """Of every trip, whether `after` shows the landmark of `before`: the same kind and colour at the same place."""
    return tuple(all(row) for row in _same(before, after))


def _same(before: Seen, after: Seen) -> Iterator[tuple[bool, bool, bool]]:
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

"""What is measured of a sampler: videos in which the camera holds, and trips on which it goes and comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidaccel.bench.recall.cells import Kind, RecallCell
from vidaccel.bench.recall.trips import RecallTrips
from vidaccel.bench.skipping.loss import LATE_FRAMES, Judge
from vidaccel.bench.skipping.summary import OTHER_NOISE, PLAIN
from vidaccel.bench.student.readings import read_part
from vidaccel.bench.student.rollouts import Filming, Sampler, Script, first_pixel
from vidaccel.bench.student.subjects import PART, staying_prompts
from vidaccel.rollout.chunk import Chunk
from vidaccel.world import Prompt

_SEED_SHIFT = 500_009


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of the table: a sampler as `Sampler.parse` takes it, or "other-noise", the student with other seeds."""

    text: str

    @property
    def sampler(self) -> Sampler:
        """How it samples. Raises UserError."""
        return Sampler() if self.text == OTHER_NOISE else Sampler.parse(self.text)

    @property
    def has_trips(self) -> bool:
        """Whether trips are measured."""
        return self.text != OTHER_NOISE

    def cell(self, kind: Kind) -> RecallCell:
        """Of the recall benchmark."""
        sampler = self.sampler
        return RecallCell(kind=kind, num_inference_steps=sampler.num_inference_steps, skipping=sampler.skipping)


class Held:
    """Prompts that training never sees, of subjects that stay, under a camera that holds."""

    def __init__(self, pipe: Any, judge: Judge, *, count: int, seed: int, num_chunks: int) -> None:
        self._pipe, self._judge, self._num_chunks = pipe, judge, num_chunks
        self._prompts: list[Prompt] = staying_prompts(count, seed=seed)
        self._plain: Tensor | None = None  # late frames of the student itself, which others are compared with

    def measure(self, arm: Arm) -> list[dict[str, Any]]:
        """A row for every prompt."""
        latents, passes = self._film(arm)
        late = latents[:, :, -LATE_FRAMES:]
        plain = late if arm.text == PLAIN else self._plain_late()
        if arm.text == PLAIN:
            self._plain = late
        texts = [prompt.text for prompt in self._prompts]
        length = self._pipe.config.max_sequence_length
        losses = self._judge.losses(latents, texts, max_sequence_length=length)
        end = first_pixel(self._num_chunks)
        clips = Filming(pipe=self._pipe).decode(latents, end - PART, end)
        differences = ((late - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).tolist()
        rows = zip(self._prompts, passes, losses, differences, clips, strict=True)
        return [
            {
                "prompt": prompt.text,
                "asked": {name: getattr(prompt, name) for name in ("colour", "shape", "motion", "background")},
                "passes": count,
                "loss": loss,
                "difference": difference,
                "shown": read_part(clip).to_dict(),
            }
            for prompt, count, loss, difference, clip in rows
        ]

    def _film(self, arm: Arm) -> tuple[Tensor, list[float]]:
        """Latents of all videos, and passes a chunk of each."""
        filming = Filming(pipe=self._pipe, sampler=arm.sampler)
        shift = _SEED_SHIFT if arm.text == OTHER_NOISE else 0
        scripts = [Script(seed=prompt.seed + shift, prompts=((0, prompt.text),)) for prompt in self._prompts]
        student = arm.sampler.student(self._pipe)
        totals = torch.zeros(len(scripts))

        def tell(places: Sequence[int], chunk: Chunk) -> None:
            totals[list(places)] += torch.tensor(student.passes_of(chunk), dtype=torch.float32)

        latents = filming.film(scripts, self._num_chunks, tell=tell)
        return latents, (totals / self._num_chunks).tolist()

    def _plain_late(self) -> Tensor:
        if self._plain is None:
            self._plain = self._film(Arm(text=PLAIN))[0][:, :, -LATE_FRAMES:]
        return self._plain


def measure_trips(trips: RecallTrips, arm: Arm, kind: Kind) -> list[dict[str, Any]]:
    """A row for every trip: what the oracle reads at the return, and at the first visit that it is compared with."""
    rolled = trips.roll(arm.cell(kind))
    first = trips.truth()[0] if rolled.first is None else rolled.first
    rows = zip(trips.trips, rolled.passes, first.readings, rolled.second.readings, strict=True)
    return [
        {"seed": trip.seed, "passes": passes, "first": before, "second": after} for trip, passes, before, after in rows
    ]

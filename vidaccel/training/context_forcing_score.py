"""Validation of a distillation: recall on held-out trips, and pictures of it."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vidaccel.files.atomic import atomic_write
from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_student import Donor
from vidaccel.training.chunk_sampler import FEW_STEPS, Sampler
from vidaccel.training.context_forcing_config import ContextForcingConfig
from vidaccel.training.ranks import own_rank
from vidaccel.training.return_visits import Cell, ReturnVisits, share

_HELD_OUT_SEED = 78_000_000
_SECONDS, _SECONDS_PER_TRIP = 5.0, 0.15
_PICTURES = 8
_CELLS: tuple[Cell, ...] = ("memory", "blank", "first visit")


class Validation:
    """Recall of a student on held-out trips, which are encoded when they are needed first."""

    def __init__(self, donor: Donor, config: ContextForcingConfig) -> None:
        self._donor, self._config = donor, config
        self._visits: ReturnVisits | None = None

    @property
    def seconds(self) -> float:
        """About how long the last validation will take, the encoding of the trips included."""
        return _SECONDS + _SECONDS_PER_TRIP * self._config.validation_trips if self._config.validation_trips else 0.0

    def results(self, student: Transformer, picture: Path) -> dict[str, float]:
        """Shares of trips by cell, and how clear a landmark is at a first visit; also draws `picture`.

        as_seen: the return shows the landmark of the first visit; blank: without frames of that place.
        valid: of returns, first_visit_valid: of first visits that the student makes.
        """
        config = self._config
        if config.validation_trips == 0:
            return {}
        if self._visits is None:
            seeds = range(_HELD_OUT_SEED, _HELD_OUT_SEED + config.validation_trips)
            self._visits = ReturnVisits(
                self._donor,
                seeds,
                batch_size=config.batch_size,
                text=config.text,
                away_chunks=config.validation_away_chunks,
            )
        sampler = config.rollout.sampler
        found = {cell: self._visits.outcome(student, cell, sampler=sampler) for cell in _CELLS}
        draw_samples(student, self._visits, picture, sampler=sampler)
        return {
            "as_seen": share(found["memory"].as_seen),
            "blank": share(found["blank"].as_seen),
            "valid": share(found["memory"].valid),
            "first_visit_valid": share(found["first visit"].valid),
            "first_visit_likelihood": sum(found["first visit"].likelihood) / len(self._visits),
        }


def draw_samples(student: Transformer, visits: ReturnVisits, path: Path, *, sampler: Sampler = FEW_STEPS) -> None:
    """A PNG with a column a trip: first visit, return with memory, return when those frames are not remembered.

    Rank 0 writes it.
    """
    count = min(_PICTURES, len(visits))
    trip = visits.trip
    rows = [visits.still(visits.bank.latents[:count], trip.first_visit)]
    for cell in _CELLS[:2]:
        rows.append(visits.still(visits.rolled_out(student, cell, sampler=sampler, count=count), trip.second_visit))
    if own_rank() != 0:
        return
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    with atomic_write(path) as unfinished:
        Image.fromarray(_bytes(picture)).save(unfinished, format="PNG")


def _bytes(picture: Tensor) -> Any:
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()

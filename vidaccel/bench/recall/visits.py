"""What is seen at a visit: the still picture of its end, and the landmark that the oracle reads in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.world.landmark_oracle import read_landmarks

STILL_FRAMES = 9  # last pixel frames of a visit, over which the median is taken: what moves is not in it


@dataclass(frozen=True, kw_only=True)
class Visits:
    """One visit of each of N trips.

    readings: kind, colour, x and likelihood of the landmark; x in pixels of the screen of the trip's first visit.
    stills: (N, 3, H, W) in [0, 1] on the CPU.
    """

    readings: list[dict[str, Any]]
    stills: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Visits]) -> Visits:
        """All of them, one behind the other."""
        readings = [reading for part in parts for reading in part.readings]
        return cls(readings=readings, stills=torch.cat([part.stills for part in parts]))

    def at(self, places: Sequence[int]) -> Visits:
        """Those at some places."""
        return Visits(readings=[self.readings[place] for place in places], stills=self.stills[list(places)])


@torch.no_grad()
def read_visits(vae: Any, latents: Tensor, shifts: Sequence[float], *, batch: int) -> Visits:
    """What the last frames of latents (N, C, F, h, w) show, decoded `batch` at a time.

    shifts: for each how far the camera stands to the right of where it stood at the first visit, in pixels.
    """
    stills = torch.cat([_still(vae, part) for part in latents.split(batch)])
    found = read_landmarks(stills)
    values = zip(found.kinds, found.colours, found.x.tolist(), found.likelihoods.tolist(), shifts, strict=True)
    readings = [
        {"kind": kind, "colour": colour, "x": round(x + shift, 2), "likelihood": round(likelihood, 5)}
        for kind, colour, x, likelihood, shift in values
    ]
    return Visits(readings=readings, stills=stills.cpu())


def _still(vae: Any, latents: Tensor) -> Tensor:
    frames = StreamingDecoder(vae).decode(latents)[:, -STILL_FRAMES:]
    return frames.float().median(dim=1).values / 255

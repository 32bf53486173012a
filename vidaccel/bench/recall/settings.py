"""What steps and guidance do for a student: short rollouts with one prompt, read by the oracle at both ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vidaccel.bench.recall.trip import Trip
from vidaccel.errors import UserError
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.world import FRAME_SIZE, read_clip

NUM_CHUNKS = 16
BEGINNING_FRAMES, END_FRAMES = 13, 9  # latent: 49 and 33 pixel frames
ATTRIBUTES = ("colour", "shape", "motion", "background")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Denoising steps of a chunk and the weight of the prompt."""

    num_inference_steps: int
    guidance_scale: float

    @classmethod
    def parse(cls, text: str) -> Settings:
        """`4@1`: 4 steps, guidance 1. Raises UserError for anything else."""
        steps, _, scale = text.partition("@")
        try:
            found = cls(num_inference_steps=int(steps), guidance_scale=float(scale))
        except ValueError as error:
            raise UserError(f"`settings` must be steps@guidance, such as 4@1; got {text!r}.") from error
        if found.num_inference_steps < 1 or not 0 <= found.guidance_scale < 100:
            raise UserError(f"`settings` must have at least 1 step and a guidance from 0 to 100; got {text!r}.")
        return found


def measure_settings(
    pipe: Any, trips: Sequence[Trip], settings: Settings, *, max_sequence_length: int
) -> list[dict[str, Any]]:
    """For each trip's first prompt what the oracle reads at the beginning and at the end, and whether it is right.

    "kept": colour, shape and background are right at the end. "seconds" are of the whole batch without decoding.
    """
    began = time.perf_counter()
    chunks = pipe.stream(
        [trip.prompts[0] for trip in trips],
        num_chunks=NUM_CHUNKS,
        seeds=[trip.seed for trip in trips],
        height=FRAME_SIZE,
        width=FRAME_SIZE,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        max_sequence_length=max_sequence_length,
        decode=False,
    )
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    seconds = time.perf_counter() - began
    beginnings, ends = (
        StreamingDecoder(pipe.vae).decode(part).cpu().float() / 255
        for part in (latents[:, :, :BEGINNING_FRAMES], latents[:, :, -END_FRAMES:])
    )
    records = []
    for trip, beginning, end in zip(trips, beginnings, ends, strict=True):
        subject = trip.scene.subject
        asked = {
            "colour": subject.colour,
            "shape": subject.shape,
            "motion": subject.motion,
            "background": trip.scene.background,
        }
        first, last = read_clip(beginning), read_clip(end)
        right = {name: getattr(first, name) == asked[name] for name in ATTRIBUTES}
        kept = all(getattr(last, name) == asked[name] for name in ATTRIBUTES if name != "motion")
        records.append({"prompt": trip.prompts[0], **right, "kept": kept, "seconds": seconds})
    return records

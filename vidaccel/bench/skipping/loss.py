"""How likely a many-step model finds what a student made: its flow-matching loss on late frames, with equal noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidaccel.bench.student.rollouts import CHUNK_FRAMES
from vidaccel.catalog.models import EMBEDDED_MODEL
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline
from vidaccel.machine.private_names import execution_device

SIGMAS = (0.9, 0.75, 0.5, 0.25)
LATE_FRAMES = 24  # latent, whose loss is taken; the judge was trained on clips of 25
_WARM_UP = 1  # latent frames before them: the first of a clip is of another kind
_JUDGED = 8  # videos judged together
LATE_CHUNKS = -(-(LATE_FRAMES + _WARM_UP) // CHUNK_FRAMES)


class Judge:
    """The embedded text-to-video model, which knows nothing of chunks and memory and has no part in the rollout."""

    def __init__(self, device: str) -> None:
        self._pipe: Any = load_pipeline(EMBEDDED_MODEL, device=device, dtype="float32")

    def check(self, pipe: Any) -> None:
        """Raise UserError for a student of other latents than those that the judge knows."""
        known, others = (one.vae.config.latents_mean for one in (self._pipe, pipe))
        if list(known) != list(others):
            raise UserError(
                f"{EMBEDDED_MODEL} judges the videos, and this student's latents are of another autoencoder; measure a "
                f"student with that of {EMBEDDED_MODEL}."
            )

    @torch.no_grad()
    def losses(self, latents: Tensor, prompts: Sequence[str], *, max_sequence_length: int) -> list[float]:
        """Of each video (N, C, F, h, w): mean squared error of the velocity over late frames and `SIGMAS`."""
        late = latents[:, :, -LATE_FRAMES - _WARM_UP :]
        parts = [
            self._part(late[first : first + _JUDGED], prompts[first : first + _JUDGED], max_sequence_length)
            for first in range(0, len(late), _JUDGED)
        ]
        return [loss for part in parts for loss in part]

    def _part(self, latents: Tensor, prompts: Sequence[str], length: int) -> list[float]:
        device = execution_device(self._pipe)
        embeddings, _ = self._pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=length, device=device
        )
        errors = []
        for number, sigma in enumerate(SIGMAS):
            noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(number))
            noisy = (1 - sigma) * latents + sigma * noise
            timestep = torch.full((len(latents),), 1000 * sigma, device=device)
            velocity = self._pipe.transformer(noisy.to(device), timestep, embeddings, return_dict=False)[0].cpu()
            errors.append((velocity - (noise - latents))[:, :, _WARM_UP:].square().flatten(1).mean(dim=1))
        found: list[float] = torch.stack(errors).mean(dim=0).tolist()
        return found

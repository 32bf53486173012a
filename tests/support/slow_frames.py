"""A rollout whose remembered frames were encoded alone, from the path with gradients: nothing is kept but latents.

For every chunk the frames that `MemoryIndex` names are encoded anew from their latents, each alone, under the prompt of
the chunk (`remember`), and the chunk attends to them (`history`). For rules without similarity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from tests.support.slow_rollout import Sampling
from tests.support.slow_search import views_to_come
from vidaccel.memory import MemoryIndex, MemoryPolicy
from vidaccel.memory.camera import Camera
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.rollout.camera import ChunkCamera
from vidaccel.rollout.chunk import Shot


@dataclass
class SlowFrames:
    """One sample. `columns`: patches across the picture."""

    model: CausalWanTransformer3DModel
    policy: MemoryPolicy
    sampling: Sampling
    seed: int
    size: tuple[int, int]
    camera: ChunkCamera
    latents: list[Tensor] = field(default_factory=list)  # (C, H, W) of every frame ever made
    points: list[tuple[float, float]] = field(default_factory=list)  # screens and motion of its camera

    @torch.no_grad()
    def make(self, shots: Sequence[tuple[Shot, int]], num_chunks: int) -> Tensor:
        """All frames (C, T, H, W). shots: with the row of their embeddings."""
        now: Shot | None = None
        for chunk in range(num_chunks):
            shot, row = [pair for pair in shots if pair[0].start_chunk <= chunk][-1]
            if now is None or (shot is not now and shot.cut == "hard"):
                self.index, self.start = MemoryIndex(self.policy), len(self.latents)
            now = shot
            self.index.begin_chunk()
            count = len(self.index.current)
            self.points += zip(*self.camera(chunk, len(self.latents), count), strict=True)
            self.index.retrieve(self.returning())
            branches = 2 if self.sampling.guidance_scale != 1 else 1
            self.latents += self.denoised(chunk, [part[row] for part in shot.embeddings[:branches]]).unbind(1)
            self.index.commit()
        return torch.stack(self.latents, dim=1)

    def returning(self) -> list[int]:
        """The frames of the shot that the policy's search brings back for the chunk that was begun."""
        retrieval = self.policy.retrieval
        if retrieval is None:
            return []
        across = self.size[1] // self.model.config.patch_size[2]
        points = [(across * screen, across * motion) for screen, motion in self.points[self.start :]]
        past = points[: self.index.num_frames]
        return views_to_come(
            [column for column, _ in past],
            [frame for frame, (_, motion) in enumerate(past) if abs(motion) > 0.25],
            present=[entry.frame for entry in self.index.entries if entry.part != "current"],
            coming=[column for column, _ in points[self.index.num_frames :]],
            width=across,
            depth=retrieval.depth,
            most=retrieval.num_frames,
        )

    def denoised(self, chunk: int, prompts: Sequence[Tensor]) -> Tensor:
        digest = hashlib.sha256(f"vidaccel rollout {self.seed} {chunk}".encode()).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        shape = (self.model.in_channels, len(self.index.current), *self.size)
        x = torch.randn(shape, generator=source)
        for sigma, following in pairwise(self.sampling.sigmas()):
            first, *rest = (self.velocity(x, 1000 * sigma, prompt) for prompt in prompts)
            velocity = rest[0] + self.sampling.guidance_scale * (first - rest[0]) if rest else first
            x = (1 - following) * (x - sigma * velocity) + following * torch.randn(shape, generator=source)
        return x

    def velocity(self, x: Tensor, time: float, prompt: Tensor) -> Tensor:
        cached = self.model.cache_prompt(prompt[None])
        frames = [self.start + entry.frame for entry in self.index.entries if entry.part != "current"]
        places = torch.tensor(self.index.positions)
        own = range(self.start + self.index.current[0], self.start + self.index.current[-1] + 1)
        history = None
        if frames:
            history = self.model.remember(
                torch.stack([self.latents[frame] for frame in frames], dim=1)[None],
                cached,
                positions=places[: len(frames)],
                camera=self.camera_of(frames),
            )
        return self.model(
            x[None],
            torch.tensor([time]),
            cached,
            history=history,
            frame_positions=places[len(frames) :],
            camera=self.camera_of(own),
        ).sample[0]

    def camera_of(self, frames: Sequence[int]) -> Camera:
        across = self.size[1] // self.model.config.patch_size[2]
        columns, motions = zip(*[self.points[frame] for frame in frames], strict=True)
        return Camera(across * torch.tensor([columns]), across * torch.tensor([motions]))

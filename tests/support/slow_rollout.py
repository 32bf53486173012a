"""The rollout as one would write it on a blackboard: every sample alone, lists of frames, nothing kept up to date.

Keys are rotated as complex numbers whenever they are read, remembered and new ones are put behind each other, attention
is a softmax of a product. Nothing of `vidaccel.memory.slow_fast`, `vidaccel.models.causal_wan`'s forward or
`vidaccel.rollout` is used; which frames stay is asked from `MemoryIndex`, which has a twin of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vidaccel.memory import MemoryConfig, MemoryIndex
from vidaccel.rollout.chunk import Shot

FrameKey = tuple[int, Any]  # frame, and for a copy the pass that it was taken from
LayerKeys = list[tuple[Tensor, Tensor]]  # of every layer: keys before rotation and values, (tokens, heads, D)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    num_inference_steps: int = 2
    guidance_scale: float = 1.0
    shift: float = 5.0
    is_stochastic: bool = True
    skipped: tuple[int, ...] = ()  # steps that are left out, the first being 1
    threshold: float | None = None

    def sigmas(self) -> list[float]:
        raw = [1 - step / self.num_inference_steps for step in range(self.num_inference_steps)]
        return [self.shift * u / (1 + (self.shift - 1) * u) for u in raw] + [0.0]


@dataclass
class SlowVideo:
    """One sample of a rollout. `margin`: how near a similarity came to the threshold, where rounding may decide."""

    model: Any
    config: MemoryConfig
    sampling: Sampling
    seed: int
    size: tuple[int, int]
    latents: list[Tensor] = field(default_factory=list)  # every frame ever made, (C, H, W)
    remembered: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)  # sink, slow, fast after every chunk
    margin: float = 1.0

    @torch.no_grad()
    def make(self, shots: Sequence[tuple[Shot, int]], num_chunks: int, given: Sequence[Tensor] = ()) -> Tensor:
        """All frames (C, T, H, W). shots: with the row of their embeddings; given: first chunks (C, F, H, W)."""
        self.forget()
        now: Shot | None = None
        for chunk in range(num_chunks):
            shot, row = [pair for pair in shots if pair[0].start_chunk <= chunk][-1]
            prompts = [part[row] for part in shot.embeddings[: 2 if self.sampling.guidance_scale != 1 else 1]]
            if now is not None and now is not shot:
                if shot.cut == "hard":
                    self.forget()
                else:
                    self.write_anew(prompts)
            now = shot
            if chunk < len(given):
                self.index.begin_chunk(given[chunk].shape[1])
                made = given[chunk]
            else:
                self.index.begin_chunk()
                made = self.denoised(chunk, prompts)
            self.finish(made, prompts)
        return torch.stack(self.latents, dim=1)

    def forget(self) -> None:
        self.index = MemoryIndex(self.config)
        self.start = len(self.latents)
        self.kept: list[dict[FrameKey, LayerKeys]] = [{}, {}]
        self.previous: Tensor | None = None

    def denoised(self, chunk: int, prompts: Sequence[Tensor]) -> Tensor:
        digest = hashlib.sha256(f"vidaccel rollout {self.seed} {chunk}".encode()).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows, columns = self.size
        shape = (self.model.config.in_channels, len(self.index.current), rows, columns)
        x = torch.randn(shape, generator=source)
        sigmas = self.sampling.sigmas()
        estimates: list[Tensor] = []
        for number, (sigma, following) in enumerate(pairwise(sigmas)):
            passes = [self.run(x, 1000 * sigma, prompt, branch) for branch, prompt in enumerate(prompts)]
            velocity = passes[0][0]
            if len(passes) > 1:
                velocity = passes[1][0] + self.sampling.guidance_scale * (velocity - passes[1][0])
            if self.config.mode == "official":
                self.index.observe(self.similarity(passes[0][1]))
                self.keep(number, [keys for _, keys in passes], ())
            estimate = x - sigma * velocity
            stands_in = [*self.chunk_before(shape[1]), *estimates][-1:]
            if stands_in and self.is_left_out(number + 1, estimates):
                estimate = stands_in[0]
            estimates.append(estimate)
            if self.sampling.is_stochastic:
                x = (1 - following) * estimate + following * torch.randn(shape, generator=source)
            else:
                x = estimate + following / sigma * (x - estimate)
        return x

    def is_left_out(self, step: int, estimates: Sequence[Tensor]) -> bool:
        if step not in self.sampling.skipped or self.sampling.threshold is None:
            return step in self.sampling.skipped
        change = float((estimates[1] - estimates[0]).norm() / estimates[0].norm())
        self.margin = min(self.margin, abs(change - self.sampling.threshold))
        return change < self.sampling.threshold

    def chunk_before(self, count: int) -> list[Tensor]:
        """The last frames that were made of this shot, as one chunk; none where there are too few."""
        made = self.latents[self.start :]
        return [torch.stack(made[-count:], dim=1)] if len(made) >= count else []

    def finish(self, made: Tensor, prompts: Sequence[Tensor]) -> None:
        keys = [self.run(made, 0.0, prompt, branch)[1] for branch, prompt in enumerate(prompts)]
        frames = self.index.current
        self.index.commit(self.similarity(keys[0]))
        self.keep("clean", keys, frames)
        self.latents += made.unbind(1)
        parts = (self.index.sink, self.index.slow, self.index.fast)
        self.remembered.append(tuple(tuple(frame + self.start for frame in part) for part in parts))

    def keep(self, source: Any, keys: Sequence[LayerKeys], frames: Sequence[int]) -> None:
        """What this pass wrote of `frames` and of those that it was made to copy; what the index dropped goes."""
        first = (self.index.current or frames)[0]
        entries = self.index.entries
        wanted = {(entry.frame, entry.source if entry.is_copy else None) for entry in entries}
        new = {(frame, None) for frame in frames}
        new |= {(entry.frame, source) for entry in entries if entry.is_copy and entry.source == source}
        for kept, layers in zip(self.kept, keys, strict=False):
            for slot in new - kept.keys():
                if slot[0] >= first:
                    kept[slot] = self.frame_of(layers, slot[0] - first)
            for slot in kept.keys() - wanted:
                del kept[slot]

    def write_anew(self, prompts: Sequence[Tensor]) -> None:
        """All remembered frames passed again in groups, each seeing those before it."""
        slots = [(entry.frame, entry.source if entry.is_copy else None) for entry in self.index.entries]
        places = dict(zip(slots, self.index.positions, strict=True))
        size = self.config.chunk_frames
        for branch, prompt in enumerate(prompts):
            self.kept[branch] = {}
            for start in range(0, len(slots), size):
                group = slots[start : start + size]
                latents = torch.stack([self.latents[self.start + frame] for frame, _ in group], dim=1)
                before = [(places[slot], keys) for slot, keys in self.kept[branch].items()]
                _, layers = slow_pass(self.model, latents, 0.0, prompt, before, [places[slot] for slot in group])
                self.kept[branch] |= {slot: self.frame_of(layers, number) for number, slot in enumerate(group)}
        if self.previous is not None:
            last = range(self.index.num_frames - size, self.index.num_frames)
            whole = [keys for slot, keys in self.kept[0].items() if slot[0] in last]
            if whole:
                depth = range(len(whole[0]))
                self.previous = torch.stack([torch.cat([keys[n][0] for keys in whole]).mean(0) for n in depth])

    def run(self, x: Tensor, time: float, prompt: Tensor, branch: int) -> tuple[Tensor, LayerKeys]:
        entries, positions = self.index.entries, self.index.positions
        pairs = list(zip(entries, positions, strict=True))
        before = [
            (place, self.kept[branch][entry.frame, entry.source if entry.is_copy else None])
            for entry, place in pairs
            if entry.part != "current"
        ]
        return slow_pass(
            self.model, x, time, prompt, before, [place for entry, place in pairs if entry.part == "current"]
        )

    def similarity(self, layers: LayerKeys) -> float | None:
        if self.config.keyframe_rule != "similarity":
            return None
        means = torch.stack([keys.mean(0) for keys, _ in layers])
        previous, self.previous = self.previous, means
        if previous is None:
            return None
        found = torch.nn.functional.cosine_similarity(means.flatten(1), previous.flatten(1)).mean()
        self.margin = min(self.margin, abs(float(found) - self.config.similarity_threshold))
        return float(found)

    def frame_of(self, layers: LayerKeys, number: int) -> LayerKeys:
        rows, columns = self.size
        tokens = (rows // self.model.config.patch_size[1]) * (columns // self.model.config.patch_size[2])
        span = slice(number * tokens, (number + 1) * tokens)
        return [(keys[span], values[span]) for keys, values in layers]


def slow_pass(
    model: Any,
    latents: Tensor,
    time: float,
    prompt: Tensor,
    before: Sequence[tuple[int, LayerKeys]],
    positions: Sequence[int],
) -> tuple[Tensor, LayerKeys]:
    """One pass over (C, F, H, W) with remembered frames at their positions: velocity, and keys and values written."""
    config = model.config
    _, frames, rows, columns = latents.shape
    _, high, wide = config.patch_size
    grid = (rows // high, columns // wide)
    x = model.patch_embedding(latents[None])[0].flatten(1).T
    temb, modulation, text, _ = model.condition_embedder(torch.tensor([time]), prompt[None], None)
    written: LayerKeys = []
    for number, block in enumerate(model.blocks):
        parts = (block.scale_shift_table[0] + modulation[0].unflatten(0, (6, -1))).unbind(0)
        heads = block.attn1.heads
        normed = block.norm1(x) * (1 + parts[1]) + parts[0]
        query = block.attn1.norm_q(block.attn1.to_q(normed)).unflatten(1, (heads, -1))
        keys = block.attn1.norm_k(block.attn1.to_k(normed)).unflatten(1, (heads, -1))
        values = block.attn1.to_v(normed).unflatten(1, (heads, -1))
        written.append((keys, values))
        turned = [turned_frame(layers[number][0], place, grid) for place, layers in before]
        per_frame = keys.split(grid[0] * grid[1])
        turned += [turned_frame(part, place, grid) for part, place in zip(per_frame, positions, strict=True)]
        queries = [
            turned_frame(part, place, grid)
            for part, place in zip(query.split(grid[0] * grid[1]), positions, strict=True)
        ]
        seen = torch.cat([*[layers[number][1] for _, layers in before], values])
        x = x + block.attn1.to_out[0](attention(torch.cat(queries), torch.cat(turned), seen)) * parts[2]
        cross = block.attn2
        query = cross.norm_q(cross.to_q(block.norm2(x))).unflatten(1, (heads, -1))
        keys = cross.norm_k(cross.to_k(text[0])).unflatten(1, (heads, -1))
        x = x + cross.to_out[0](attention(query, keys, cross.to_v(text[0]).unflatten(1, (heads, -1))))
        x = x + block.ffn(block.norm3(x) * (1 + parts[4]) + parts[3]) * parts[5]
    shift, scale = model.scale_shift_table[0] + temb
    x = model.proj_out(model.norm_out(x) * (1 + scale) + shift)
    x = x.reshape(frames, *grid, high, wide, config.out_channels)
    return torch.einsum("fyxhwc->cfyhxw", x).reshape(config.out_channels, frames, rows, columns), written


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(L, heads, D) and (S, heads, D) to (L, heads * D)."""
    weights = torch.einsum("lhd,shd->hls", query, keys) / query.shape[-1] ** 0.5
    return torch.einsum("hls,shd->lhd", weights.softmax(-1), values).flatten(1)


def turned_frame(states: Tensor, position: int, grid: tuple[int, int]) -> Tensor:
    """Rotate the tokens (rows * columns, heads, D) of a frame at `position` in time."""
    size = states.shape[-1]
    side = 2 * (size // 6)
    angles = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            parts = [(position, size - 2 * side), (row, side), (column, side)]
            angles.append([place / 10000 ** (2 * pair / width) for place, width in parts for pair in range(width // 2)])
    turns = torch.polar(torch.ones(len(angles), size // 2, dtype=torch.float64), torch.tensor(angles).double())
    pairs = torch.view_as_complex(states.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(states.dtype)

"""A bank of encoded clips on the device: latents, coverage by the subject and captions as tokens.

It is rebuilt from seeds whenever it is needed; nothing has to be stored.
Shapes: latents (N, C, F, H, W) with F latent frames; coverage (N, F, H, W); tokens (N, wordings, length).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.training.architecture import Vae, WordTokenizer
from vidaccel.training.device import autocast
from vidaccel.training.vae_clip import encode_clip
from vidaccel.world import Scene, caption, random_scene, render, subject_mask

NUM_WORDINGS = 4
TOKENS_PER_CAPTION = 32
_RENDER_BATCH = 32
_ENCODE_BATCH = 8
_STATISTICS_CLIPS = 4096


@dataclass(frozen=True, kw_only=True)
class LatentBank:
    """Encoded clips; `latents` are normalised by `mean` and `std`, both (C,), as in WanPipeline."""

    latents: Tensor
    coverage: Tensor
    tokens: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def build_bank(
    vae: Vae,
    tokenizer: WordTokenizer,
    *,
    num_clips: int,
    num_frames: int,
    first_seed: int,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentBank:
    """Render and encode `num_clips` clips of the "train" split.

    statistics: mean and std per channel; None measures them on the first clips.
    on_progress: called with finished and all clips.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, num_clips, _RENDER_BATCH):
        seeds = range(first_seed + first, first_seed + min(first + _RENDER_BATCH, num_clips))
        scenes = [random_scene(seed, num_frames=num_frames) for seed in seeds]
        parts.append((*encoded_scenes(vae, scenes), caption_tokens(tokenizer, _wordings(scenes))))
        if on_progress is not None:
            on_progress(seeds.stop - first_seed, num_clips)
    latents, coverage = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    tokens = torch.cat([part[2] for part in parts]).to(latents.device).unflatten(0, (num_clips, NUM_WORDINGS))
    mean, std = (
        _statistics(latents) if statistics is None else (latents.new_tensor(x, dtype=torch.float32) for x in statistics)
    )
    for piece in latents.split(_STATISTICS_CLIPS):
        piece.copy_((piece.float() - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1))
    return LatentBank(latents=latents, coverage=coverage, tokens=tokens, mean=mean, std=std)


def caption_tokens(tokenizer: WordTokenizer, captions: Sequence[str]) -> Tensor:
    """Tokens of captions, the end token included, padded to `TOKENS_PER_CAPTION`; (N, length) on the CPU."""
    return tokenizer(
        list(captions), padding="max_length", max_length=TOKENS_PER_CAPTION, truncation=True, return_tensors="pt"
    ).input_ids


def _wordings(scenes: Sequence[Scene]) -> list[str]:
    """Every scene's own caption, then other wordings of it."""
    texts = []
    for scene in scenes:
        draw = random.Random(f"vidaccel wordings {scene.seed}")
        texts.append(caption(scene))
        texts += [caption(scene, paraphrase=draw.randrange(2**31)) for _ in range(NUM_WORDINGS - 1)]
    return texts


def encoded_scenes(vae: Vae, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Latents (B, C, F, h, w) in bf16, not normalised, and coverage by the subject (B, F, h, w) in fp16."""
    device: Any = next(vae.parameters()).device
    video = render(scenes, device=device).transpose(1, 2) * 2 - 1
    mask = subject_mask(scenes, device=device)
    latents = []
    for clips in video.split(_ENCODE_BATCH):
        with autocast(device):
            latents.append(encode_clip(vae, clips).chunk(2, dim=1)[0].bfloat16())
    return torch.cat(latents), pooled_coverage(
        mask, scale=2 ** vae_depth(vae), stride=vae.config.scale_factor_temporal
    ).half()


def vae_depth(vae: Vae) -> int:
    """How often the autoencoder halves height and width."""
    return len(vae.config.temperal_downsample)


def pooled_coverage(mask: Tensor, *, scale: int, stride: int) -> Tensor:
    """Coverage per latent cell of a (N, k * stride + 1, H, W) mask: the first frame alone, then groups of `stride`."""
    mask = F.avg_pool2d(mask, scale)
    later = mask[:, 1:].unflatten(1, (-1, stride)).mean(2) if mask.shape[1] > 1 else mask[:, 1:]
    return torch.cat([mask[:, :1], later], dim=1)


def _statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    sample = latents[:_STATISTICS_CLIPS].float()
    return sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))

"""How many attributes of unseen prompts the oracle finds in generated clips; the validation of the transformer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidaccel.training.architecture import TextEncoder, Transformer, Vae, WordTokenizer
from vidaccel.training.device import autocast, seeded_generator
from vidaccel.training.flow import sample
from vidaccel.training.vae_clip import decode_clip
from vidaccel.world import Prompt, read_clip, unseen_prompts

ATTRIBUTES = ("colour", "shape", "motion", "background", "camera")
_PROMPTS_SEED = 77
_SAMPLE_BATCH = 32
_DECODE_BATCH = 8


@torch.no_grad()
def oracle_score(
    transformer: Transformer,
    text_encoder: TextEncoder,
    tokenizer: WordTokenizer,
    vae: Vae,
    *,
    num_prompts: int,
    shape: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
) -> dict[str, float]:
    """Share of prompts whose attribute the oracle reads from the clip, by attribute.

    vae: with `latents_mean` and `latents_std` in its config. shape: of one clip's latents, (C, F, H, W).
    """
    prompts = unseen_prompts(num_prompts, seed=_PROMPTS_SEED)
    device = next(transformer.parameters()).device
    found = dict.fromkeys(ATTRIBUTES, 0)
    for first in range(0, num_prompts, _SAMPLE_BATCH):
        batch = prompts[first : first + _SAMPLE_BATCH]
        latents = sample(
            transformer,
            text_encoder,
            tokenizer,
            prompts=[prompt.text for prompt in batch],
            shape=shape,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=seeded_generator(device, first),
        )
        for prompt, video in zip(batch, decoded(vae, latents), strict=True):
            _count(found, prompt, video)
    return {name: count / num_prompts for name, count in found.items()}


def decoded(vae: Vae, latents: Tensor) -> Tensor:
    """Videos (B, F, 3, H, W) in [0, 1] of normalised latents, as WanPipeline decodes them."""
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in _normalisation(vae))
    videos = []
    for piece in (latents * std + mean).split(_DECODE_BATCH):
        with autocast(latents.device):
            video = decode_clip(vae, piece)
        videos.append((video.float().clamp(-1, 1) / 2 + 0.5).transpose(1, 2))
    return torch.cat(videos)


def _normalisation(vae: Vae) -> tuple[list[float], list[float]]:
    return vae.config.latents_mean, vae.config.latents_std


def _count(found: dict[str, int], prompt: Prompt, video: Tensor) -> None:
    reading = read_clip(video)
    for name in ATTRIBUTES:
        found[name] += getattr(reading, name) == getattr(prompt, name)

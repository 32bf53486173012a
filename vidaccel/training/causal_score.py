"""Validation of the causal student: what the oracle reads at the beginning and at the end of long rollouts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidaccel.memory import MemoryConfig
from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_student import Donor, roll_out
from vidaccel.training.device import seeded_generator
from vidaccel.training.flow import empty_prompt, prompt_embeddings
from vidaccel.training.latents import caption_tokens
from vidaccel.training.oracle_score import decoded
from vidaccel.world import Scene, caption, read_clip

_ATTRIBUTES = ("colour", "shape", "motion", "background")
_BEGINNING = 49
_END = 33


@torch.no_grad()
def rollout_score(
    student: Transformer,
    donor: Donor,
    scenes: Sequence[Scene],
    *,
    memory: MemoryConfig,
    shape: Sequence[int],
    num_steps: int,
    guidance_scales: Sequence[float],
) -> dict[str, float]:
    """Share of rollouts in which the oracle reads what the caption of a scene's first segment asks for.

    By attribute in the first three seconds, and `kept`: colour, shape and background all still right at the end.
    shape: of one rollout's latents (C, F, h, w). The name of a number ends in its guidance scale.
    """
    with torch.compiler.set_stance("force_eager"):
        device = next(student.parameters()).device
        tokens = caption_tokens(donor.tokenizer, [caption(scene, frame=0) for scene in scenes])
        length = 2 * tokens.shape[1]
        embeddings = prompt_embeddings(donor.text_encoder, tokens.to(device), length=length)
        nothing = prompt_embeddings(donor.text_encoder, empty_prompt(device)[None], length=length)
        noise = torch.randn(len(scenes), *shape, device=device, generator=seeded_generator(device, len(scenes)))
        results: dict[str, float] = {}
        for scale in guidance_scales:
            latents = roll_out(
                student,
                embeddings,
                nothing.expand_as(embeddings),
                noise=noise,
                memory=memory,
                num_steps=num_steps,
                guidance_scale=scale,
            )
            shares = _read(decoded(donor.vae, latents), scenes)
            results |= {f"{name} g{scale:g}": share for name, share in shares.items()}
    return results


def _read(videos: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    found = dict.fromkeys((*_ATTRIBUTES, "kept"), 0)
    for video, scene in zip(videos, scenes, strict=True):
        wanted = {
            "colour": scene.subject.colour,
            "shape": scene.subject.shape,
            "motion": scene.subject.motion,
            "background": scene.background,
        }
        first, last = read_clip(video[:_BEGINNING]), read_clip(video[-_END:])
        for name in _ATTRIBUTES:
            found[name] += getattr(first, name) == wanted[name]
        found["kept"] += all(getattr(last, name) == wanted[name] for name in _ATTRIBUTES if name != "motion")
    return {name: count / len(scenes) for name, count in found.items()}

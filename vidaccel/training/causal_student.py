"""The causal student: how it begins from a trained pipeline, and how it predicts a chunk from remembered frames.

Shapes: latents (B, C, F, h, w), normalised; embeddings (B, length, text_dim).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from vidaccel.catalog.registry import spec_of
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig, MemoryIndex
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.training.architecture import FLOW_SHIFT, TextEncoder, Transformer, Vae, WordTokenizer
from vidaccel.training.causal_layout import ChunkSequence, chunk_sequence, layout_of, num_context_slots
from vidaccel.training.device import autocast
from vidaccel.training.flow import timesteps_of


@dataclass(frozen=True, kw_only=True)
class Donor:
    """A trained Wan pipeline: the student begins as its transformer and shares the rest, which stays as it is."""

    transformer: Transformer
    text_encoder: TextEncoder
    tokenizer: WordTokenizer
    vae: Vae


def load_donor(model: str) -> Donor:
    """The networks of a registered name or folder, in float32. Raises `UserError` if it is no Wan pipeline on disk."""
    folder = spec_of(model).folder
    if folder is None:
        raise UserError(f"`init` must be a registered model or a folder on this machine, got {model!r}.")
    try:
        return Donor(
            transformer=WanTransformer3DModel.from_pretrained(folder / "transformer").float(),
            text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").float().eval().requires_grad_(False),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
            vae=AutoencoderKLWan.from_pretrained(folder / "vae").float().eval().requires_grad_(False),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"`init` must be a Wan pipeline, {folder} cannot be read as one: {error}") from error


def student_architecture(transformer: Transformer, *, num_layers: int) -> dict[str, Any]:
    """Constructor arguments of a student as wide as `transformer`, with `num_layers` layers."""
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    return {**config, "patch_size": list(config["patch_size"]), "num_layers": num_layers}


def student_tensors(transformer: Transformer, *, layers: Sequence[int]) -> dict[str, Tensor]:
    """Weights of a student with these `layers` in their order. Raises `UserError` for one that is not there."""
    num_layers = transformer.config.num_layers
    if not layers or any(not 0 <= layer < num_layers for layer in layers):
        raise UserError(f"`layers` must be some of 0 to {num_layers - 1}, got {list(layers)}.")
    tensors = transformer.state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.")}
    for new, old in enumerate(layers):
        start = f"blocks.{old}."
        kept |= {
            f"blocks.{new}.{name.removeprefix(start)}": tensor
            for name, tensor in tensors.items()
            if name.startswith(start)
        }
    return kept


def new_student(architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transformer:
    """A student with these weights, in float32."""
    student = CausalWanTransformer3DModel(**architecture)
    student.load_state_dict(dict(tensors))
    return student


def chunk_velocity(
    student: Transformer, sequence: ChunkSequence, *, context: Tensor, noisy: Tensor, sigmas: Tensor, embeddings: Tensor
) -> Tensor:
    """Velocity of the noisy copies of a chunk, each as if it were alone; (B, C, copies * frames, h, w) float32.

    context: the remembered frames in slot order. noisy: the copies one after the other. sigmas: (B, copies).
    """
    copies = sigmas.shape[1]
    times = timesteps_of(sigmas).repeat_interleave(noisy.shape[2] // copies, 1)
    padded = F.pad(context, (0, 0, 0, 0, 0, sequence.num_slots - context.shape[2]))
    with autocast(noisy.device):
        velocity = student(
            torch.cat([padded, noisy], dim=2),
            F.pad(times, (sequence.num_slots, 0)),
            embeddings,
            frame_positions=sequence.frame_positions,
            visibility=sequence.visibility,
            return_dict=False,
        )[0]
    return velocity[:, :, sequence.num_slots :].float()


@torch.no_grad()
def roll_out(
    student: Transformer,
    embeddings: Tensor,
    unconditional: Tensor,
    *,
    noise: Tensor,
    memory: MemoryConfig,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Latents from `noise` (B, C, F, h, w), chunk after chunk by Euler steps, every pass over all remembered latents.

    Nothing is cached, so this is slow and simple; `vidaccel.rollout` is the fast way. Keyframes follow the rule of
    `memory`, which must not need similarities. unconditional: embeddings of the empty prompt, one of the batch's size.
    """
    index, ends = MemoryIndex(memory), [0]
    latents = noise[:, :, :0]
    for chunk in noise.split(memory.chunk_frames, dim=2):
        index.begin_chunk()
        ends.append(ends[-1] + memory.chunk_frames)
        layout = layout_of(index, ends=ends)
        sequence = chunk_sequence(layout, num_slots=num_context_slots(memory), copies=1, device=noise.device)
        context = latents[:, :, list(layout.context)]
        for sigma, following in itertools.pairwise(euler_sigmas(num_steps)):
            inputs = {"context": context, "noisy": chunk, "sigmas": noise.new_full((len(noise), 1), sigma)}
            velocity = chunk_velocity(student, sequence, embeddings=embeddings, **inputs)
            if guidance_scale != 1:
                other = chunk_velocity(student, sequence, embeddings=unconditional, **inputs)
                velocity = other + guidance_scale * (velocity - other)
            chunk = chunk + (following - sigma) * velocity
        latents = torch.cat([latents, chunk], dim=2)
        index.commit()
    return latents


def euler_sigmas(num_steps: int) -> list[float]:
    """Noise levels from 1 to 0 with Wan's shift; `num_steps` + 1 of them."""
    times = [1 - step / num_steps for step in range(num_steps + 1)]
    return [FLOW_SHIFT * time / (1 + (FLOW_SHIFT - 1) * time) for time in times]

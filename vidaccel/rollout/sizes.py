"""What the parts of a rollout measure, asked from the parts themselves on PyTorch's meta device.

There tensors have shapes and no contents: the transformer, its memory and the autoencoder are built from their
configurations, a chunk is passed through them, and the bytes of the tensors they make are counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan

from vidaccel.catalog.pipelines import WAN_TEXT_TOKENS
from vidaccel.errors import UserError
from vidaccel.machine.footprint import module_bytes, weight_bytes
from vidaccel.machine.private_names import kept_in_float32
from vidaccel.memory import MemoryPolicy
from vidaccel.memory.entry import Part
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.models.fused_layers import fuse_layers
from vidaccel.models.taehv import StreamingTinyDecoder, TinyWanDecoder
from vidaccel.rollout.chunk import Student
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.peak import peak_bytes
from vidaccel.rollout.state import RolloutState, new_state

Phase = Literal["encoding", "denoising", "decoding"]
PHASES: tuple[Phase, ...] = ("encoding", "denoising", "decoding")
_ROLLOUT: tuple[Phase, ...] = ("denoising", "decoding")
_ENOUGH_BLOCKS = 2  # a block lets go of what it made before the next but one begins
_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What the files of a model say about its size.

    transformer, vae: their configurations, as `config.json` has them. text_encoder_numbers: how many numbers its
    weights are; 0 leaves it out. small_decoder: configuration of the `TinyWanDecoder` that decodes instead of the
    autoencoder, if one does.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder_numbers: int = 0
    small_decoder: Mapping[str, Any] | None = None

    @classmethod
    def of_folders(cls, *, transformer: Path, vae: Path, text_encoder: Path | None = None) -> ModelSizes:
        """Read the configurations of two components, and from the weight files of the third how large it is.

        Raises UserError where a configuration is missing or is none.
        """
        return cls(
            transformer=_read_config(transformer),
            vae=_read_config(vae),
            text_encoder_numbers=0 if text_encoder is None else weight_bytes(text_encoder, 1),
        )


@dataclass(frozen=True, kw_only=True)
class RolloutSize:
    """What else decides how much memory a rollout takes.

    height, width: pixels. num_branches: 2 with guidance, which has a memory of its own. text_tokens: length that
    prompts are padded to. dtypes: precision by component, "default" for those without, as in `component_dtypes`.
    text_encoder: "kept" on the device all the time, "dropped" when the prompts are encoded, or "elsewhere": they are
    encoded on another device. has_joined_layers: as `vidaccel.models.fused_layers` does it, for compiled passes.
    """

    memory: MemoryPolicy
    height: int
    width: int
    batch_size: int = 1
    num_branches: int = 1
    text_tokens: int = WAN_TEXT_TOKENS
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: {"default": torch.bfloat16})
    text_encoder: Literal["kept", "dropped", "elsewhere"] = "kept"
    has_joined_layers: bool = False

    def dtype(self, component: str) -> torch.dtype:
        """The precision of a component."""
        return self.dtypes.get(component, self.dtypes["default"])


@dataclass(frozen=True, kw_only=True)
class PlanPart:
    """Bytes of one part, and in which phases of the rollout they are held."""

    name: str
    num_bytes: int
    description: str
    phases: tuple[Phase, ...] = PHASES


def transformer_parts(
    model: ModelSizes, size: RolloutSize, latent: tuple[int, int], device: torch.device
) -> list[PlanPart]:
    """Weights of the transformer, its memory, and what a pass over a chunk takes; `latent`: rows and columns."""
    dtype = size.dtype("transformer")
    transformer = _on_meta(CausalWanTransformer3DModel, model.transformer, dtype)
    weights = module_bytes(transformer)  # before: joined layers share those of single ones
    if size.has_joined_layers:
        fuse_layers(transformer)
    student = Student(transformer=transformer, scheduler=None, guidance_scale=float(size.num_branches))
    try:
        seeds = tuple(range(size.batch_size))
        state = new_state(student, size.memory, height=latent[0], width=latent[1], seeds=seeds)
    except ValueError as error:
        raise UserError(str(error)) from error
    texts = torch.empty((size.batch_size, size.text_tokens, transformer.config.text_dim), device=_META, dtype=dtype)
    prompt = transformer.cache_prompt(texts)
    shape = (size.batch_size, state.size[0], size.memory.chunk_frames, *latent)
    latents = torch.empty(shape, device=_META, dtype=dtype)
    timestep = torch.empty(size.batch_size, device=_META)
    transformer.blocks = transformer.blocks[:_ENOUGH_BLOCKS]
    with torch.no_grad():
        state.memory.begin_chunk()
    kinds = (False, True) if transformer.clean_pass == "frame" else (False,)
    passes = [partial(transformer, latents, timestep, prompt, memory=state.memory, alone=alone) for alone in kinds]
    working = max(peak_bytes(one, device=device) for one in passes)
    prompt_bytes = size.num_branches * sum(keys.nbytes + values.nbytes for keys, values in prompt.layers)
    return [
        PlanPart(name="transformer", num_bytes=weights, description="weights"),
        *_memory_parts(state, size),
        PlanPart(
            name="prompt",
            num_bytes=prompt_bytes,
            description="keys and values of the prompt for every block",
            phases=_ROLLOUT,
        ),
        PlanPart(
            name="denoising",
            num_bytes=working,
            description="activations of one pass over a chunk",
            phases=("denoising",),
        ),
    ]


def _memory_parts(state: RolloutState, size: RolloutSize) -> list[PlanPart]:
    """Raw keys, rotated keys and values of every part, for every branch; and what goes with them."""
    per_frame = 3 * _frame_bytes(state, size)
    others = state.memory.bytes_by_part()["reserved"] - per_frame * size.memory.total_frames
    kept = latent_frame_bytes(state.size, size.batch_size) * size.memory.total_frames
    words: dict[Part, str] = {
        "sink": "the first frames",
        "slow": "keyframes",
        "fast": "the last frames, the chunk being made among them",
    }
    parts = []
    for name, description in words.items():
        count = size.memory.part_frames.get(name, 0)
        parts.append(
            PlanPart(
                name=name,
                num_bytes=size.num_branches * per_frame * count,
                description=f"memory of {count} frames: {description}",
                phases=_ROLLOUT,
            )
        )
    parts.append(
        PlanPart(
            name="rotary",
            num_bytes=size.num_branches * others + kept,
            description="rotary positions, latents of the remembered frames",
            phases=_ROLLOUT,
        )
    )
    return parts


def decoder_parts(
    model: ModelSizes, size: RolloutSize, latent: tuple[int, int], device: torch.device
) -> list[PlanPart]:
    """Weights of the autoencoder, what the decoder keeps between chunks, and what decoding one takes."""
    vae = _on_meta(AutoencoderKLWan, model.vae, size.dtype("vae"))
    weights = [PlanPart(name="autoencoder", num_bytes=module_bytes(vae), description="weights")]
    decoder: StreamingDecoder | StreamingTinyDecoder = StreamingDecoder(vae)
    if model.small_decoder is not None:
        small = _on_meta(TinyWanDecoder, model.small_decoder, size.dtype("transformer"))
        weights.append(PlanPart(name="small decoder", num_bytes=module_bytes(small), description="weights"))
        decoder = StreamingTinyDecoder(small)
    shape = (size.batch_size, vae.config.z_dim, size.memory.chunk_frames, *latent)
    latents = torch.empty(shape, device=_META)
    decoder.decode(latents)
    working = peak_bytes(lambda: decoder.decode(latents), device=device)  # of the second chunk, as of all later ones
    kept = sum(features.nbytes for features in decoder.save_state()[0].values())
    return [
        *weights,
        PlanPart(
            name="decoder",
            num_bytes=kept,
            description="features that the decoder keeps between chunks",
            phases=_ROLLOUT,
        ),
        PlanPart(name="decoding", num_bytes=working, description="decoding one chunk to pixels", phases=("decoding",)),
    ]


def latent_frame_bytes(size: tuple[int, int, int], batch_size: int) -> int:
    """Bytes of the latents (float32) of one frame of all videos; size: (C, H, W)."""
    return math.prod(size) * torch.float32.itemsize * batch_size


def latent_size(model: ModelSizes, size: RolloutSize) -> tuple[int, int]:
    """Rows and columns of a latent frame. Raises UserError where the pixels do not come out even."""
    try:
        spatial = int(model.vae.get("scale_factor_spatial", 8))  # the default of AutoencoderKLWan
        _, rows, columns = model.transformer["patch_size"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"This is no configuration of a Wan model ({error!r}); give one of a Wan student.") from error
    if size.height % (spatial * rows) or size.width % (spatial * columns) or min(size.height, size.width) < 1:
        raise UserError(
            f"`height` and `width` must be multiples of {spatial * rows} and {spatial * columns}; "
            f"got {size.height} x {size.width}."
        )
    return size.height // spatial, size.width // spatial


def _on_meta(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A model without contents, in the precisions that `from_pretrained(torch_dtype=dtype)` gives its weights."""
    try:
        with _META:
            model = kind.from_config(dict(config)).eval()
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"This is no configuration of a {kind.__name__} ({error}).") from error
    in_float32 = kept_in_float32(kind)
    for name, parameter in model.named_parameters():
        if in_float32.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def _frame_bytes(state: RolloutState, size: RolloutSize) -> int:
    """Bytes of the keys of one frame in all blocks that are kept, which are those of its values too."""
    shape = state.memory.shape
    layers = len(state.memory.policy.depth_map(shape.num_layers).kept)
    numbers = layers * shape.batch_size * shape.tokens_per_frame * shape.num_heads * shape.head_dim
    return numbers * size.dtype("transformer").itemsize


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold an object with the settings of a model.")
    return config

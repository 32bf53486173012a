"""What decides the numbers that a loaded pipeline makes, in a few words, so that a session goes on with no other.

A pipeline whose parts come from one folder has the digests that the command line takes of that folder; one that was put
together in memory has digests of its weights. Weights that were changed after loading, but for adapters, are not seen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidaccel.catalog.shares import shared_folder
from vidaccel.files.digest import folder_digest
from vidaccel.machine.private_names import attention_backend_of, execution_device, name_or_path
from vidaccel.rollout.kept_session import SessionSettings
from vidaccel.rollout.production import Production
from vidaccel.rollout.prompts import PromptEncoder
from vidaccel.rollout.start import start_settings

_PARTS = ("transformer", "vae", "text_encoder")
_SAMPLE = 4096  # numbers at either end of a tensor


def session_settings(pipe: Any, made: Production, encoder: PromptEncoder) -> SessionSettings:
    """What must agree for a session of this pipeline and production to go on to the same bits."""
    student, state, start = made.student, made.state, made.start
    assert made.fps is not None
    return SessionSettings(
        seeds=state.seeds,
        height=state.size[1] * pipe.vae_scale_factor_spatial,
        width=state.size[2] * pipe.vae_scale_factor_spatial,
        num_inference_steps=student.num_inference_steps,
        guidance_scale=student.guidance_scale,
        negative_prompt=encoder.negative_prompt,
        max_sequence_length=encoder.max_sequence_length,
        model_digests=model_digests(pipe),
        memory=state.memory.policy,
        fps=made.fps,
        start=start_settings(
            None if start is None else start.frames,
            stride=pipe.vae_scale_factor_temporal,
            is_decoded=start is not None and start.is_decoded,
        ),
        decoder=None if state.decoder is not None else "none",
        device=execution_device(pipe).type,
        dtype=component_dtypes(pipe),
        attention=attention_backend(pipe.transformer),
        adapters=adapters(pipe.transformer),
        skip_steps=None if student.skipping is None else str(student.skipping),
    )


def model_digests(pipe: Any) -> list[str]:
    """Digests of the folders that the parts were loaded from, else of the parts."""
    parts = [part for name in _PARTS if (part := getattr(pipe, name, None)) is not None]
    folder = Path(name_or_path(pipe.config) or "no folder")
    folders = [one for one in (folder, shared_folder(folder)) if one is not None]
    if folder.is_dir() and all(Path(name_or_path(part.config) or "").parent in folders for part in parts):
        return [folder_digest(one) for one in folders]
    return [_digest(part.state_dict(), _beside_weights(part)) for part in parts]


def _beside_weights(part: Any) -> str:
    """What else decides the numbers of a part that was put together in memory; nothing where it is as it always was."""
    clean_pass = getattr(part, "clean_pass", "chunk")
    return "" if clean_pass == "chunk" else f"clean pass {clean_pass}"


def adapters(transformer: Any) -> list[str]:
    """Names of the adapters in use and a digest of their weights and strengths; nothing without any."""
    layers = {
        name: layer
        for name, layer in transformer.named_modules()
        if hasattr(layer, "scaling") and hasattr(layer, "active_adapters")
    }
    if not layers:
        return []
    weights = {name: tensor for name, tensor in transformer.state_dict().items() if "lora" in name}
    strengths = [
        (name, list(layer.active_adapters), sorted(layer.scaling.items()), layer.merged, layer.disable_adapters)
        for name, layer in layers.items()
    ]
    names = sorted({adapter for layer in layers.values() for adapter in layer.active_adapters})
    return [*names, _digest(weights, str(strengths))]


def component_dtypes(pipe: Any) -> dict[str, torch.dtype]:
    """The transformer's number format as "default", and those of parts that have another."""
    default: torch.dtype = pipe.transformer.patch_embedding.weight.dtype
    parts = {name: getattr(pipe, name, None) for name in _PARTS[1:]}
    others = {name: part.dtype for name, part in parts.items() if part is not None and part.dtype != default}
    return {"default": default} | others


def attention_backend(transformer: Any) -> str:
    """The name of the backend that the transformer's attention was set to, "native" where it was not."""
    processors = (getattr(part, "processor", None) for part in transformer.modules())
    backends = {backend for one in processors if (backend := attention_backend_of(one)) is not None}
    return ", ".join(sorted(backend.value for backend in backends)) or "native"


def _digest(tensors: dict[str, Tensor], more: str = "") -> str:
    digest = hashlib.sha256(more.encode())
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        ends = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]]).float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(ends.numpy().tobytes())
    return digest.hexdigest()

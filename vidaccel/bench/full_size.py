"""Model folders of published size with random weights, for `vidaccel bench commands`.

Transformer and VAE have the published configurations. Text encoders are small networks whose outputs have the published
width, so that a prompt costs nothing. The videos are noise: nothing here says anything about quality.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vidaccel.bench.shared.random_model import random_transformer
from vidaccel.catalog.families.family import Component
from vidaccel.catalog.families.recipes import clip_text, llama, t5_encoder
from vidaccel.catalog.pipelines import OWN_PIPELINES, STUDENT_PIPELINE, STUDENT_TRANSFORMER, named_class
from vidaccel.catalog.registry import SETTINGS_FILE
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.catalog.table import family_named
from vidaccel.files.atomic import atomic_folder
from vidaccel.random_models.build import build_part

_NO_PARTS: Mapping[str, Component] = MappingProxyType({})
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_NETWORKS = ("transformer", "vae")  # drawn on the device; the rest is small


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """One model of published size.

    family: the row of the family table whose parts are taken where nothing else is said.
    parts: of published size.
    causal: whether the student of a rollout is made of it.
    settings: arguments of the pipeline that are no parts.
    """

    family: str
    parts: Mapping[str, Component] = field(default_factory=lambda: _NO_PARTS)
    causal: bool = False
    settings: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    @property
    def pipeline(self) -> str:
        """`module:Name` of the pipeline."""
        own = f"{OWN_PIPELINES[STUDENT_PIPELINE]}:{STUDENT_PIPELINE}"
        return own if self.causal else family_named(self.family).pipeline

    def components(self) -> dict[str, Component]:
        """All parts of the pipeline."""
        parts = {**family_named(self.family).components, **self.parts}
        if self.causal:
            parts["transformer"] = replace(parts["transformer"], kind=STUDENT_TRANSFORMER)
            config = {"shift": 5.0, "stochastic_sampling": True}
            parts["scheduler"] = Component(kind="diffusers:FlowMatchEulerDiscreteScheduler", config=config)
        return parts


_WAN = MappingProxyType(
    {
        "transformer": SHAPES["wan2.1-1.3b"].transformer,
        "vae": Component(kind="diffusers:AutoencoderKLWan"),
        "text_encoder": t5_encoder("UMT5EncoderModel", d_model=4096, num_layers=1),
    }
)
_HUNYUAN = MappingProxyType(
    {
        "transformer": SHAPES["hunyuan-video"].transformer,
        "vae": Component(kind="diffusers:AutoencoderKLHunyuanVideo"),
        "text_encoder": llama(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32),
        "text_encoder_2": clip_text(hidden_size=768, num_attention_heads=12),
    }
)
_FEW_STEPS = MappingProxyType({"num_inference_steps": 4, "guidance_scale": 1.0})
FULL_SIZES: Mapping[str, FullSize] = MappingProxyType(
    {
        "wan2.1-1.3b": FullSize(family="wan2.1-t2v", parts=_WAN),
        "causal-wan2.1-1.3b": FullSize(family="wan2.1-t2v", parts=_WAN, causal=True, settings=_FEW_STEPS),
        "hunyuan-video": FullSize(family="hunyuan-video-t2v", parts=_HUNYUAN),
        "toy": FullSize(family="wan2.1-t2v"),
        "causal-toy": FullSize(family="wan2.1-t2v", causal=True, settings=_FEW_STEPS),
        "toy-hunyuan-video": FullSize(family="hunyuan-video-t2v"),
    }
)


def make_full_size(name: str, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Path:
    """Write the model `name` of FULL_SIZES to `folder`, as `DiffusionPipeline.from_pretrained` loads it.

    Transformer and VAE are drawn on `device` in `dtype`, never held twice: the 13 billion weights of HunyuanVideo take
    26 GB of device memory and of disk in bfloat16. A folder that is there already is kept.
    """
    if (folder / "model_index.json").is_file():
        return folder
    row = FULL_SIZES[name]
    parts: dict[str, Any] = {}
    for part, component in row.components().items():
        if part in _NETWORKS:
            parts[part] = random_transformer(component, device=device, dtype=dtype)
        else:
            parts[part] = build_part(component, seed=0)
    pipe = named_class(row.pipeline)(**parts, **row.settings)
    with atomic_folder(folder) as unfinished:
        pipe.save_pretrained(unfinished)
        (unfinished / SETTINGS_FILE).write_text(json.dumps({"weights": "random"}) + "\n", encoding="utf-8")
    return folder

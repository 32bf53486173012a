"""A pipeline of published size with random weights, made where it runs and in the number format it runs in.

Weights are never held a second time or in another format: 13 billion of them in bfloat16 take 26 GB, in float32 52.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from vidaccel.catalog.families.family import Component
from vidaccel.catalog.pipelines import named_class
from vidaccel.catalog.speed_shapes import Embedding, SpeedShape
from vidaccel.machine.private_names import kept_in_float32


def random_pipeline(
    shape: SpeedShape, *, device: torch.device, dtype: torch.dtype, guidance_scale: float
) -> DiffusionPipeline:
    """The row's pipeline around its transformer with seeded random weights; encoders and decoders are left out."""
    kind = named_class(shape.pipeline)
    parts = {name: _make(part) for name, part in shape.parts.items()}
    if shape.guidance == "guider":
        parts["guider"] = parts["guider"].new(guidance_scale=guidance_scale)
    parts["transformer"] = random_transformer(shape.transformer, device=device, dtype=dtype)
    names = [name for name, one in inspect.signature(kind).parameters.items() if one.default is inspect.Parameter.empty]
    pipe = kind(**(dict.fromkeys(names) | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_transformer(component: Component, *, device: torch.device, dtype: torch.dtype) -> Any:
    """A model whose parameters are drawn directly on `device` in `dtype`, those kept in float32 excepted.

    Matrices are normal with variance 1 / fan-in, scales are one and biases zero, so that outputs stay finite.
    """
    with init_empty_weights():
        model = _make(component)
    kept = kept_in_float32(model)
    generator = torch.Generator(device).manual_seed(0)
    for path, module in model.named_modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            wide = not kept.isdisjoint([*path.split("."), name])
            full = torch.empty(empty.shape, device=device, dtype=torch.float32 if wide else dtype)
            _fill(full, name, generator)
            module.register_parameter(name, nn.Parameter(full, requires_grad=False))
    return model.eval().to(device)


def call_tensors(
    embeddings: Mapping[str, Embedding], *, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The row's tensors for one video, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, one in embeddings.items():
        tensors[name] = torch.ones(1, *one.size, device=device, dtype=dtype)
        if one.fill == "noise":
            tensors[name].normal_(generator=generator)
    return tensors


def _fill(tensor: torch.Tensor, name: str, generator: torch.Generator) -> None:
    if tensor.ndim < 2:
        tensor.fill_(0.0 if "bias" in name else 1.0)
    else:
        tensor.normal_(std=math.sqrt(tensor.shape[0] / tensor.numel()), generator=generator)


def _make(component: Component) -> Any:
    return named_class(component.kind)(**component.config)

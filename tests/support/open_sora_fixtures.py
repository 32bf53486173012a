"""What the original Open-Sora 1.2 computed at a small size in float32 on a CPU, and the port built to match it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vidaccel.models.stdit3 import STDiT3

FOLDER = Path(__file__).parents[1] / "fixtures" / "open_sora"
PIXELS = {"height": 480, "width": 854, "fps": 24}  # what the original was told, whatever the latents' size


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(_find(f"{name}.safetensors"))


def values(name: str) -> Any:
    return json.loads(_find(f"{name}.json").read_text(encoding="utf-8"))


def _find(name: str) -> Path:
    """A recorded file: here, or, if it is too large for that, beside a folder above (`shared/fixtures/opensora`)."""
    if (FOLDER / name).is_file():
        return FOLDER / name
    for parent in Path(__file__).resolve().parents:
        if (path := parent / "shared" / "fixtures" / "opensora" / name).is_file():
            return path
    pytest.skip(f"{name} is not here: it is too large for the repository")


def small_stdit3(**changes: Any) -> STDiT3:
    """The port at the size of the recorded weights, random."""
    config = {"hidden_size": 96, "depth": 2, "num_heads": 4, "caption_channels": 32, "model_max_length": 12}
    return STDiT3(**(config | changes)).eval()


def recorded_stdit3(**changes: Any) -> STDiT3:
    """The port with the recorded weights, loaded by their published names."""
    model = small_stdit3(**changes)
    model.load_state_dict(tensors("stdit3_weights"), strict=True)
    return model


def relative_distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


def largest_difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return float((left.double() - right.double()).abs().max()) if torch.isfinite(left).all() else float("inf")

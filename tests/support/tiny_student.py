"""A random student that is told of its camera, and prompts for a bank of noise, with the sizes of the tiny donor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vidaccel.memory.prefixes import with_prefix
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.training.architecture import TEXT_ENCODER_ARCHITECTURE, TextEncoder, new_text_encoder
from vidaccel.training.checkpoint import TrainingState, save_checkpoint
from vidaccel.training.self_rollout import PromptTable
from vidaccel.training.trip_bank import TripBank
from vidaccel.world import vocabulary

ARCHITECTURE: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "camera_dim": 8,
    "clean_pass": "frame",
}
_TEXT = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}


def camera_student(seed: int = 2) -> CausalWanTransformer3DModel:
    """One that already minds its camera."""
    torch.manual_seed(seed)
    model = CausalWanTransformer3DModel(**ARCHITECTURE).eval()
    for parameter in model.camera_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def save_forced(student: CausalWanTransformer3DModel, folder: Path, *, init: str, **known: Any) -> str:
    """A checkpoint as teacher forcing leaves it, of a student that began from `init`; known: fields of its state."""
    recipe = {"init": init, **known.pop("recipe", {})}
    state = TrainingState(kind="causal", architecture={"transformer": ARCHITECTURE}, recipe=recipe, **known)
    save_checkpoint(folder, state, with_prefix("transformer", student.state_dict()))
    return str(folder)


def tiny_text_encoder() -> TextEncoder:
    torch.manual_seed(0)
    return new_text_encoder({**TEXT_ENCODER_ARCHITECTURE, **_TEXT}, words=vocabulary()).eval()


def noise_prompts(bank: TripBank) -> PromptTable:
    return PromptTable(bank, tiny_text_encoder(), length=40)

"""A bank of random latents, a tiny student with memory and camera, and settings, for the tests of offline targets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.training.causal_student import load_donor, new_student, student_architecture, student_tensors
from vidaccel.training.offline.collect import CollectConfig
from vidaccel.training.offline.teacher import Teacher
from vidaccel.training.trip_bank import TripBank

CHANNELS, SIZE, NUM_CHUNKS, TEXT = 4, 4, 6, 5
CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 128,
    "camera_dim": 8,
    "clean_pass": "frame",
}


def network(seed: int = 0) -> CausalWanTransformer3DModel:
    """A random student whose camera matters."""
    torch.manual_seed(seed)
    model = CausalWanTransformer3DModel(**CONFIG).eval()
    for parameter in model.camera_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def bank(num_clips: int = 5) -> TripBank:
    """Clips of noise in which every third chunk is a return."""
    draw = torch.Generator().manual_seed(7)
    frames = 3 * NUM_CHUNKS
    columns = torch.randn(num_clips, frames, generator=draw).cumsum(1)
    cells = torch.zeros(num_clips, frames, SIZE, SIZE)
    return TripBank(
        latents=torch.randn(num_clips, frames, CHANNELS, SIZE, SIZE, generator=draw).half(),
        columns=columns,
        motions=columns.diff(dim=1, prepend=columns[:, :1]),
        tokens=torch.randint(3, 20, (num_clips, NUM_CHUNKS, 6), generator=draw),
        coverage=cells,
        landmarks=cells,
        returns=tuple((clip, chunk) for clip in range(num_clips) for chunk in (3, 4)),
        arrivals=(),
        changes=(),
        keyframes=((1, 3),) * num_clips,
        clips=(),
    )


def embed(tokens: Tensor) -> Tensor:
    """Embeddings that depend on every token."""
    table = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
    return table[tokens.long()]


def teacher(seed: int = 1, **changes: Any) -> Teacher:
    """Another random network, with few steps."""
    return Teacher(network=network(seed), **{"num_steps": 8, **changes})


def collection(**changes: Any) -> CollectConfig:
    """Few states in small shards."""
    settings = {"kind": "visited", "num_states": 12, "rollouts_per_shard": 2, "states_per_rollout": 2}
    return CollectConfig(**{**settings, **changes})


def save_tiny_student(donor: str, folder: Path) -> str:
    """The tiny pipeline of `donor` with an untrained student in place of its transformer, as a model's folder."""
    networks = load_donor(donor)
    architecture = student_architecture(networks.transformer, num_layers=1, camera_dim=8)
    student = new_student(architecture, student_tensors(networks.transformer, layers=(0,)))
    shutil.copytree(donor, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "transformer")
    student.save_pretrained(folder / "transformer")
    return str(folder)

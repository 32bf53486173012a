"""A causal Wan transformer of a few thousand weights, and short ways to run it, for the tests of memory and rollout."""

from __future__ import annotations

import random
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vidaccel.memory import MemoryConfig
from vidaccel.memory.keys_values import KeyValueMemory
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.rollout.camera import ChunkCamera
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.loop import rollout
from vidaccel.rollout.state import RolloutState, new_state

CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 128,
}
HEIGHT, WIDTH = 4, 6


def causal_model(**changes: Any) -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(**{**CONFIG, **changes}).eval()


def told_model(**changes: Any) -> CausalWanTransformer3DModel:
    """A random transformer with a camera that matters, whose remembered frames were encoded alone."""
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(**{**CONFIG, "camera_dim": 8, "clean_pass": "frame", **changes}).eval()
    for parameter in model.camera_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def walk(seed: int = 0) -> ChunkCamera:
    """A camera that goes where chance takes it, within a screen or two of 0."""

    def screens(frame: int) -> float:
        return random.Random(f"{seed} {frame}").uniform(-2, 2)

    def camera(chunk: int, first: int, count: int) -> tuple[list[float], list[float]]:
        places = [screens(frame) for frame in range(first, first + count)]
        before = screens(first - 1) if first else places[0]
        return places, [now - then for now, then in zip(places, [before, *places], strict=False)]

    return camera


def text(batch_size: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch_size, 5, CONFIG["text_dim"], generator=torch.Generator().manual_seed(seed))


def video(num_frames: int, batch_size: int = 1, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, CONFIG["in_channels"], num_frames, HEIGHT, WIDTH, generator=generator)


def memory_of(model: CausalWanTransformer3DModel, config: MemoryConfig, batch_size: int = 1) -> KeyValueMemory:
    shape = model.memory_shape(HEIGHT, WIDTH, batch_size=batch_size)
    return KeyValueMemory(config, shape, model.rotary_table(HEIGHT, WIDTH))


def student(model: CausalWanTransformer3DModel | None = None, **changes: Any) -> Student:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    return Student(transformer=model or causal_model(), scheduler=scheduler, **changes)


def state_of(
    student: Student, config: MemoryConfig, seeds: tuple[int, ...] = (0,), decoder: Any = None
) -> RolloutState:
    return new_state(student, config, height=HEIGHT, width=WIDTH, seeds=seeds, decoder=decoder)


def shot(prompt: str = "a", start: int = 0, batch_size: int = 1, **changes: Any) -> Shot:
    embeddings = (text(batch_size, seed=sum(prompt.encode())), torch.zeros(batch_size, 5, CONFIG["text_dim"]))
    return Shot(start_chunk=start, prompt=prompt, embeddings=embeddings, **changes)


def chunks_of(student: Student, state: RolloutState, num_chunks: int, shots: list[Shot] | None = None) -> list[Chunk]:
    given = shots or [shot(batch_size=len(state.seeds))]
    return list(rollout(student, state, given, num_chunks=num_chunks))

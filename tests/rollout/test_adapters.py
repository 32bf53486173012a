"""Adapters that change while a rollout streams: it goes on as one that was entered anew with the same memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rollout.test_passes import FakeRecorder
from tests.support.tiny_causal import causal_model, shot, state_of, student
from vidaccel.memory import MemoryConfig
from vidaccel.models.fused_layers import fuse_layers
from vidaccel.rollout.chunk import Student
from vidaccel.rollout.loop import rollout
from vidaccel.rollout.passes import CapturedPass, compiled, eager, speed_up
from vidaccel.rollout.state import RolloutState

peft = pytest.importorskip("peft")

MEMORY = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6, keyframe_rule="uniform")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def load(model: Any, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)


def merge_in_one_go(model: Any) -> None:
    """Load, fuse, unload: no layer is another one afterwards, and no weight lies elsewhere."""
    load(model, "third", 3)
    model.set_adapters("third")
    model.fuse_lora(adapter_names=["third"])
    model.unload_lora()


CHANGES: list[tuple[str, Callable[[Any], Any]]] = [
    ("merge in one go", merge_in_one_go),
    ("load", lambda model: load(model, "first", 1)),
    ("load another", lambda model: load(model, "second", 2)),
    ("set", lambda model: model.set_adapters("first")),
    ("scale", lambda model: model.set_adapters(["first", "second"], [0.5, 2.0])),
    ("disable", lambda model: model.disable_adapters()),
    ("enable", lambda model: model.enable_adapters()),
    ("delete", lambda model: model.delete_adapters("second")),
    ("fuse", lambda model: (model.set_adapters("first"), model.fuse_lora(adapter_names=["first"]))),
    ("unfuse", lambda model: model.unfuse_lora()),
    ("unload", lambda model: model.unload_lora()),
]


def run_of(kind: str, model: Any) -> Any:
    if kind == "captured":
        return CapturedPass(eager(model), FakeRecorder())
    return compiled(model, backend="eager") if kind == "compiled" else None


def copied(state: RolloutState, made: Student) -> RolloutState:
    tensors, values = state.save_state()
    other = state_of(made, MEMORY)
    other.load_state({name: part.clone() for name, part in tensors.items()}, copy.deepcopy(values))
    return other


@torch.no_grad()
def next_of(stream: Any) -> Tensor:
    return next(stream).latents


@pytest.mark.parametrize(
    ("kind", "joined"), [("eager", False), ("eager", True), ("captured", False), ("captured", True)]
)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_stream_follows_every_change_like_one_entered_anew(kind: str, joined: bool, guidance_scale: float) -> None:
    model = causal_model()
    if joined:
        fuse_layers(model)
    made = student(model, num_inference_steps=2, guidance_scale=guidance_scale, run=run_of(kind, model))
    state, one = state_of(made, MEMORY), shot()
    stream = rollout(made, state, [one], num_chunks=100)
    next_of(stream)
    before = None
    for name, change in CHANGES:
        next_of(stream)
        change(model)
        plain = student(model, num_inference_steps=2, guidance_scale=guidance_scale)
        anew = next_of(rollout(plain, copied(state, plain), [one], num_chunks=100))
        running = next_of(stream)
        assert torch.equal(running, anew), name
        assert before is None or not torch.equal(running, before)
        before = running


def test_a_change_reaches_what_the_weights_alone_would_give() -> None:
    """The slow twin: a model that never had layers joined, adapters or a stream, with the merged weights."""
    model, twin = causal_model(), causal_model()
    fuse_layers(model)
    made, plain = student(model, num_inference_steps=1), student(twin, num_inference_steps=1)
    state = state_of(made, MEMORY)
    stream = rollout(made, state, [shot()], num_chunks=9)
    next_of(stream)
    merge_in_one_go(model)
    merge_in_one_go(twin)
    expected = next_of(rollout(plain, copied(state, plain), [shot()], num_chunks=9))
    torch.testing.assert_close(next_of(stream), expected, rtol=0, atol=1e-5)


def test_compiled_passes_follow_too() -> None:
    model = causal_model(num_layers=1)
    made = student(model, num_inference_steps=1)
    made = speed_up(Student(**{**vars(made), "run": None}), state_of(made, MEMORY), "eager")
    made = Student(**{**vars(made), "run": compiled(model, backend="eager")})
    state = state_of(made, MEMORY)
    stream = rollout(made, state, [shot()], num_chunks=9)
    for change in (None, *(change for _, change in CHANGES[:4])):
        if change is not None:
            change(model)
        with torch.compiler.set_stance("force_eager"):
            anew = next_of(rollout(made, copied(state, made), [shot()], num_chunks=9))
        torch.testing.assert_close(next_of(stream), anew, rtol=0, atol=1e-5)


def test_remembered_keys_stay_as_they_were_written_until_a_shot_rewrites_them() -> None:
    model = causal_model()
    made = student(model, num_inference_steps=1)
    state, shots = state_of(made, MEMORY), [shot()]
    stream = rollout(made, state, shots, num_chunks=9)
    for _ in range(3):
        next_of(stream)
    before = state.memory.buffers.raw.clone()
    merge_in_one_go(model)
    next_of(stream)
    kept = [place for place, slot in enumerate(state.memory.buffers.slots[0]) if slot is not None and slot[0] < 3]
    tokens = state.memory.shape.tokens_per_frame

    def of_first_frames(buffer: Tensor) -> Tensor:
        return buffer.unflatten(2, (-1, tokens))[:, :, kept]

    assert len(kept) == 3
    assert torch.equal(of_first_frames(state.memory.buffers.raw), of_first_frames(before))
    shots.append(shot(start=state.num_chunks))  # the same prompt: all that is remembered is passed again
    next_of(stream)
    assert not torch.equal(of_first_frames(state.memory.buffers.raw), of_first_frames(before))

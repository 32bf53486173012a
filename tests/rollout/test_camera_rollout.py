"""Rollouts of a student that is told of its camera and remembers every frame alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.support.slow_frames import SlowFrames
from tests.support.slow_rollout import Sampling
from tests.support.tiny_causal import CONFIG, HEIGHT, WIDTH, causal_model, shot, state_of, student, told_model, walk
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.loop import ingest, replay, rollout
from vidaccel.rollout.state import RolloutState

SMALL = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6, keyframe_rule="uniform")
SHOTS = [shot("a"), shot("b", 5), shot("c", 8, cut="hard"), shot("d", 11)]
CHUNKS = 13


def same(first: Sequence[Chunk], second: Sequence[Chunk]) -> bool:
    assert len(first) == len(second)
    return all(torch.equal(a.latents, b.latents) for a, b in zip(first, second, strict=True))


def made(
    model: Student, state: RolloutState, shots: Sequence[Shot] = SHOTS, *, until: int = CHUNKS, camera: Any = None
) -> list[Chunk]:
    return list(rollout(model, state, shots, num_chunks=until, camera=camera))


def copy_of(state: RolloutState, model: Student, policy: Any = SMALL) -> RolloutState:
    tensors, values = state.save_state()
    again = state_of(model, policy, state.seeds)
    again.load_state({name: part.clone() for name, part in tensors.items()}, json.loads(json.dumps(values)))
    return again


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_rollout_is_the_slow_one_that_encodes_every_remembered_frame_anew(guidance_scale: float) -> None:
    """With evictions, promotions, soft and hard cuts, two videos and a camera that never rests."""
    sampling = Sampling(guidance_scale=guidance_scale)
    model = student(told_model(), num_inference_steps=2, guidance_scale=guidance_scale)
    shots = [shot(one.prompt, one.start_chunk, 2, cut=one.cut) for one in SHOTS]
    chunks = made(model, state_of(model, SMALL, (3, 4)), shots, camera=walk())
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    assert any(chunk.slow for chunk in chunks)
    for sample, seed in enumerate((3, 4)):
        slow = SlowFrames(model.transformer, SMALL, sampling, seed, (HEIGHT, WIDTH), walk())
        expected = slow.make([(one, sample) for one in shots], CHUNKS)
        torch.testing.assert_close(latents[sample], expected, rtol=1e-4, atol=1e-4)


def test_a_camera_that_holds_at_0_is_none_bit_for_bit_and_one_that_moves_is_seen() -> None:
    model = student(told_model(clean_pass="chunk"), num_inference_steps=1)
    still = made(model, state_of(model, SMALL))
    held = made(model, state_of(model, SMALL), camera=lambda chunk, first, count: ([0.0] * count, [0.0] * count))
    assert same(still, held)
    moved = made(model, state_of(model, SMALL), camera=walk(), until=2)
    assert not torch.equal(moved[0].latents, still[0].latents)
    assert still[0].camera is None
    assert moved[1].camera == walk()(1, 3, 3)


@pytest.mark.parametrize("clean_pass", ["chunk", "frame"])
@pytest.mark.parametrize("way", ["load", "replay", "ingest"])
def test_a_rollout_goes_on_bit_for_bit_with_its_camera(clean_pass: str, way: str) -> None:
    model = student(told_model(clean_pass=clean_pass), num_inference_steps=1)
    shots = SHOTS if way != "ingest" else [shot("a"), shot("b", 8)]
    whole = made(model, state_of(model, SMALL), shots, camera=walk())
    state, begun = state_of(model, SMALL), 7
    made(model, state, shots, until=begun, camera=walk())
    if way == "load":
        again = copy_of(state, model)
    else:
        again, latents = state_of(model, SMALL), [chunk.latents for chunk in whole[:begun]]
        if way == "replay":
            replay(model, again, shots, iter(latents), camera=walk())
        else:
            list(ingest(model, again, shots[0], torch.cat(latents, dim=2), camera=walk()))
    assert same(made(model, again, shots, camera=walk()), whole[begun:])
    assert not same(made(model, copy_of(state, model), shots, camera=walk(1)), whole[begun:])


def test_a_state_from_before_there_was_a_camera_has_one_that_holds() -> None:
    model = student(told_model(), num_inference_steps=1)
    whole, state = made(model, state_of(model, SMALL)), state_of(model, SMALL)
    made(model, state, until=7)
    tensors, values = state.save_state()
    for memory in values["memories"]:
        assert all(point[1:] == [0, 0] for row in memory.pop("cameras") for point in row)
    again = state_of(model, SMALL)
    again.load_state({name: part.clone() for name, part in tensors.items()}, values)
    assert same(made(model, again), whole[7:])


def test_a_camera_is_refused_by_a_student_that_is_not_told_of_one() -> None:
    model = student(causal_model(), num_inference_steps=1)
    latents = torch.zeros(1, CONFIG["in_channels"], 3, HEIGHT, WIDTH)
    for call in (
        lambda state: rollout(model, state, [shot()], num_chunks=1, camera=walk()),
        lambda state: ingest(model, state, shot(), latents, camera=walk()),
        lambda state: replay(model, state, [shot()], iter([latents]), camera=walk()),
    ):
        with pytest.raises(UserError, match=r"^This student is not told of a camera \(`camera_dim`"):
            call(state_of(model, SMALL))
    told = student(told_model(), num_inference_steps=1)
    state = state_of(told, SMALL)
    made(told, state, until=1)
    with pytest.raises(UserError, match="has a camera, of which this student is not told"):
        state_of(model, SMALL).load_state(*state.save_state())


def test_a_camera_that_does_not_fit_the_chunk_is_refused() -> None:
    model = student(told_model(), num_inference_steps=1)
    for wrong in (([0.0], [0.0]), ([0.0] * 3, [0.0, float("nan"), 0.0])):
        with pytest.raises(ValueError, match="The camera of chunk 0 must be finite positions and motions of 3"):
            made(model, state_of(model, SMALL), camera=lambda *_, wrong=wrong: wrong, until=1)

"""Rollouts of a student that is told of its camera and remembers every frame alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.slow_frames import SlowFrames
from tests.support.slow_rollout import Sampling
from tests.support.tiny_causal import CONFIG, HEIGHT, WIDTH, causal_model, shot, state_of, student, told_model, walk
from vidaccel.errors import UserError
from vidaccel.memory import ChunkPass, Entry, MemoryConfig, MemoryPolicy, Part, being_made
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.fingerprint import model_digests
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


def entries_of(state: RolloutState) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys before rotation and values of every remembered frame of the first video, all layers."""
    memory = state.memory
    sides = [
        part.unflatten(2, (-1, memory.shape.tokens_per_frame))[:, 0]
        for part in (memory.buffers.raw, memory.buffers.values)
    ]
    slots = enumerate(memory.buffers.slots[0])
    return {slot[0]: tuple(side[:, place].clone() for side in sides) for place, slot in slots if slot}


def are_equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("clean_pass", ["frame", "chunk"])
def test_what_is_remembered_of_a_frame_alone_does_not_depend_on_what_came_before(clean_pass: str) -> None:
    """Another past, and another policy that remembers more and has the frame elsewhere: the same bits."""
    model = student(told_model(clean_pass=clean_pass), num_inference_steps=1)
    draw = torch.Generator().manual_seed(1)
    size = (1, CONFIG["in_channels"], 12, HEIGHT, WIDTH)
    past, other, now = (torch.randn(size, generator=draw) for _ in range(3))
    found = []
    for before, policy in ((past, SMALL), (other, SMALL), (past, MemoryConfig.full(24))):
        state = state_of(model, policy)
        list(ingest(model, state, shot(), torch.cat([before, now], dim=2), camera=walk()))
        found.append(entries_of(state))
    shared = [frame for frame in found[0] if frame >= 12]
    assert len(shared) == 7
    for another in found[1:]:
        assert all(are_equal(found[0][frame], another[frame]) for frame in shared) == (clean_pass == "frame")


@pytest.mark.parametrize("clean_pass", ["frame", "chunk"])
def test_the_frames_in_a_window_are_enough_to_go_on(clean_pass: str) -> None:
    """Another policy is given the latents of a rollout: once all, and once those that it still has in the end."""
    model, window = student(told_model(clean_pass=clean_pass), num_inference_steps=1), MemoryConfig.sliding_window(6)
    latents = torch.cat([chunk.latents for chunk in made(model, state_of(model, SMALL), [shot()], until=8)], dim=2)
    rest = []
    for first in (0, 18):
        state = state_of(model, window)
        state.num_chunks, state.num_frames, state.shot_start = first // 3, first, first
        list(ingest(model, state, shot(), latents, camera=walk()))
        rest.append(made(model, state, [shot()], camera=walk()))
    assert same(*rest) == (clean_pass == "frame")


def test_a_soft_cut_writes_every_remembered_frame_alone() -> None:
    """After it a frame is what it would be had it been made under the new prompt, whatever group it was passed in."""
    model = student(told_model(), num_inference_steps=1)
    chunks = made(model, state_of(model, SMALL), [shot("a")], until=8, camera=walk())
    state = state_of(model, SMALL)
    list(rollout(model, state, [shot("a"), shot("b", 8)], num_chunks=9, camera=walk()))
    fresh = state_of(model, MemoryConfig.full(24))
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    list(ingest(model, fresh, shot("b"), latents, camera=walk()))
    wanted, found = entries_of(fresh), entries_of(state)
    rewritten = [frame for frame in found if frame < 24]
    assert len(rewritten) == 9
    for frame in rewritten:
        for one, other in zip(found[frame], wanted[frame], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@dataclass(frozen=True, kw_only=True)
class Hiding(MemoryPolicy):
    """Everything, but that some frames are forgotten when a chunk begins: the parts shrink anywhere, at any time."""

    num_frames: int
    hidden: Mapping[int, tuple[int, ...]]  # first frame of a chunk, what is forgotten then
    chunk_frames: int = 3

    @property
    def part_frames(self) -> Mapping[Part, int]:
        return {"fast": self.num_frames}

    def start(self) -> list[int]:
        return []

    def begin(self, kept: list[int], frames: range) -> list[int]:
        return [frame for frame in kept if frame not in self.hidden.get(frames.start, ())]

    def commit(self, kept: list[int], done: ChunkPass) -> tuple[list[int], bool]:
        return [*kept, *done.frames], False

    def entries(self, kept: list[int], current: range) -> tuple[Entry, ...]:
        return (*(Entry(frame, "fast") for frame in kept), *being_made(current))


def test_a_policy_may_hide_any_remembered_frame_between_two_chunks() -> None:
    """The first, the last, every other one, and in the end all of them; with a soft cut on what is left."""
    hidden = {9: (0, 8), 12: (1, 3, 5, 7), 15: (2, 14), 18: (), 21: tuple(range(21))}
    policy = Hiding(num_frames=27, hidden=hidden)
    model, shots = student(told_model(), num_inference_steps=2), [shot("a"), shot("b", 6)]
    state, kept = state_of(model, policy), []
    chunks = []
    for chunk in rollout(model, state, shots, num_chunks=9, camera=walk()):
        chunks.append(chunk.latents)
        kept.append(chunk.fast)
    assert kept[3] == (1, 2, 3, 4, 5, 6, 7, 9, 10, 11)
    assert kept[4] == (2, 4, 6, 9, 10, 11, 12, 13, 14)
    assert kept[7] == (21, 22, 23)
    slow = SlowFrames(model.transformer, policy, Sampling(), 0, (HEIGHT, WIDTH), walk())
    expected = slow.make([(one, 0) for one in shots], 9)
    torch.testing.assert_close(torch.cat(chunks, dim=2)[0], expected, rtol=1e-4, atol=1e-4)


def test_parts_in_memory_that_remember_otherwise_are_another_model_for_a_session() -> None:
    digests = []
    for clean_pass in ("chunk", "frame"):
        model = told_model(clean_pass=clean_pass)
        digests.append(model_digests(SimpleNamespace(config=SimpleNamespace(), transformer=model)))
    assert digests[0] != digests[1]

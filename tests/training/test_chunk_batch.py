"""Slots, batches and velocities of chunks, against the memory of a rollout and against one sample at a time."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from tests.support.tiny_donor import noise_bank
from tests.support.tiny_student import camera_student
from vidaccel.memory import MemoryConfig, MemoryIndex
from vidaccel.memory.camera import Camera
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.training.causal_student import load_donor
from vidaccel.training.chunk_batch import (
    EMPTY,
    SLOTS,
    ChunkBatch,
    SlotLayout,
    draw_slots,
    gather_batch,
    slots_of,
    velocity_of,
)
from vidaccel.training.trip_bank import TripBank

KEYFRAMES = (3, 4, 7, 9, 10)


@pytest.fixture(scope="module")
def bank() -> TripBank:
    return noise_bank()


@pytest.fixture(scope="module")
def student() -> CausalWanTransformer3DModel:
    """A random student that is told of its camera, with the sizes of the tiny donor."""
    return camera_student()


def prompted(batch: ChunkBatch, donor_folder: str) -> ChunkBatch:
    return batch.with_prompt(load_donor(donor_folder).text_encoder, batch.tokens, length=64)


def frames_of(index: MemoryIndex) -> list[int]:
    return [entry.frame for entry in index.entries if entry.part != "current"]


@pytest.mark.parametrize("after_image", [False, True])
@pytest.mark.parametrize("mode", ["uniform", "every second", "keyframes", "none"])
def test_slots_are_those_of_the_memory_of_a_rollout(mode: str, after_image: bool) -> None:
    rule = {"uniform": "uniform", "every second": "uniform", "keyframes": "similarity", "none": "none"}[mode]
    interval = 6 if mode == "every second" else 3
    index = MemoryIndex(MemoryConfig(keyframe_rule=rule, keyframe_interval=interval))
    for chunk in range(40):
        index.begin_chunk(1 if after_image and chunk == 0 else 3)
        layout = slots_of(chunk, mode, keyframes=KEYFRAMES, after_image=after_image)
        assert [frame for frame in layout.frames if frame != EMPTY] == frames_of(index), chunk
        assert layout.first == index.current[0]
        index.commit(similarity=0.0 if chunk in KEYFRAMES else 1.0)


def test_drawn_slots_are_disjoint_in_order_and_of_any_fill() -> None:
    draw, fills, sinks = random.Random(0), Counter[int](), Counter[bool]()
    for _ in range(3000):
        chunk, after_image = draw.randrange(1, 15), draw.random() < 0.2
        frames, first = draw_slots(draw, chunk, keyframes=KEYFRAMES, after_image=after_image)
        kept = [frame for frame in frames if frame != EMPTY]
        assert len(frames) == SLOTS == 18
        assert kept == sorted(set(kept))
        assert all(frame < 3 for frame in kept[:3] if frame in frames[:3])
        assert all(3 <= frame < first for frame in frames[3:] if frame != EMPTY)
        assert not [frame for frame in frames[15:] if frame != EMPTY and frame < first - 3]
        if chunk >= 5:
            fills[sum(frame != EMPTY for frame in frames[3:15])] += 1
            sinks[frames[0] == 0] += 1
    assert set(fills) == set(range(13))
    assert 0.8 < sinks[True] / sinks.total() < 0.9


def test_a_batch_is_what_its_samples_are_alone(bank: TripBank) -> None:
    draw = random.Random(3)
    rows, chunks = [0, 3, 2, 1, 1], [6, 0, 4, 1, 5]
    slots = [draw_slots(draw, chunk, after_image=chunk == 4) for chunk in chunks]
    batch = gather_batch(bank, rows, torch.tensor(chunks), slots)
    for sample, (row, chunk, slot) in enumerate(zip(rows, chunks, slots, strict=True)):
        kept = [place for place, frame in enumerate(slot.frames) if frame != EMPTY]
        frames, current = [slot.frames[place] for place in kept], list(range(slot.first, slot.first + 3))
        assert batch.context_mask[sample].nonzero()[:, 0].tolist() == kept
        assert torch.equal(batch.context[sample, :, kept], bank.latents[row, frames].float().transpose(0, 1))
        assert torch.equal(batch.context_camera.columns[sample, kept], bank.columns[row, frames])
        assert torch.equal(batch.context_camera.motions[sample, kept], bank.motions[row, frames])
        assert batch.context_positions[sample, kept].tolist() == list(range(len(kept)))
        assert batch.chunk_positions[sample].tolist() == [len(kept) + place for place in range(3)]
        assert torch.equal(batch.chunk[sample], bank.latents[row, current].float().transpose(0, 1))
        assert torch.equal(batch.chunk_camera.columns[sample], bank.columns[row, current])
        assert torch.equal(batch.tokens[sample], bank.tokens[row, chunk])
        assert torch.equal(batch.coverage[sample, 0], bank.coverage[row, current].float())
    assert batch.context[~batch.context_mask[:, None].expand(-1, 16, -1)].abs().max() == 0


def test_own_latents_take_the_place_of_those_of_the_bank(bank: TripBank) -> None:
    own = torch.randn(2, *bank.latents.shape[1:])
    batch = gather_batch(bank, [2, 0], [5, 5], [slots_of(5, "uniform")] * 2, latents=own)
    assert torch.equal(batch.chunk, own[:, 15:18].transpose(1, 2))
    assert torch.equal(batch.context[:, :, 0], own[:, 0])
    assert torch.equal(batch.chunk_camera.columns[0], bank.columns[2, 15:18])


def test_a_chunk_of_ones_own_replaces_its_frames_and_no_others(bank: TripBank) -> None:
    batch = gather_batch(bank, [0, 1, 2], [5, 5, 1], [slots_of(5, "uniform")] * 2 + [slots_of(1, "none")])
    own = torch.randn_like(batch.chunk)
    changed = batch.with_chunk(own, torch.tensor([12, -3, 0])).context
    assert torch.equal(changed[0, :, 15:], own[0])
    assert torch.equal(changed[0, :, :15], batch.context[0, :, :15])
    assert torch.equal(changed[1], batch.context[1])
    assert torch.equal(changed[2, :, :3], own[2])


@torch.no_grad()
def test_hidden_frames_are_as_if_they_had_never_been(
    bank: TripBank, student: CausalWanTransformer3DModel, donor_folder: str
) -> None:
    full = slots_of(6, "uniform")
    fewer = SlotLayout((*[EMPTY] * 3, *full.frames[3:]), full.first)
    batch, short = (prompted(gather_batch(bank, [1], [6], [slots]), donor_folder) for slots in (full, fewer))
    noisy, sigmas = torch.randn_like(batch.chunk), torch.tensor([0.9])
    expected = velocity_of(student, short, noisy, sigmas)
    found = velocity_of(student, batch.without(batch.frames < 3), noisy, sigmas)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(velocity_of(student, batch, noisy, sigmas), expected, atol=1e-4)


@torch.no_grad()
def test_velocities_of_copies_and_samples_are_what_one_full_pass_over_frames_in_order_gives(
    bank: TripBank, student: CausalWanTransformer3DModel, donor_folder: str
) -> None:
    rows, chunks = [0, 2], [6, 2]
    slots = [slots_of(6, "every second"), slots_of(2, "none", sink=False)]
    batch = prompted(gather_batch(bank, rows, chunks, slots), donor_folder)
    noisy, sigmas = torch.randn(4, 16, 3, 4, 4), torch.tensor([0.9, 0.2, 0.5, 0.7])
    found = velocity_of(student, batch, noisy, sigmas, copies=2)
    assert batch.embeddings is not None
    for place in range(4):
        sample = place // 2
        frames = [frame for frame in slots[sample].frames if frame != EMPTY]
        frames += range(slots[sample].first, slots[sample].first + 3)
        past = bank.latents[rows[sample], frames[:-3]].float().transpose(0, 1)[None]
        seen = torch.eye(len(frames), dtype=torch.bool)
        seen[-3:] = True
        times = torch.tensor([[0.0] * (len(frames) - 3) + [1000 * float(sigmas[place])] * 3])
        expected = student(
            torch.cat([past, noisy[place : place + 1]], dim=2),
            times,
            batch.embeddings[sample : sample + 1],
            visibility=seen,
            camera=Camera(bank.columns[None, rows[sample], frames], bank.motions[None, rows[sample], frames]),
        ).sample[0, :, -3:]
        torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=1e-4)


def test_gradients_reach_what_is_remembered(
    bank: TripBank, student: CausalWanTransformer3DModel, donor_folder: str
) -> None:
    batch = prompted(gather_batch(bank, [0], [6], [slots_of(6, "every second")]), donor_folder)
    batch.context.requires_grad_()
    velocity_of(student, batch, torch.randn_like(batch.chunk), torch.tensor([0.8])).square().mean().backward()
    assert batch.context.grad is not None
    reached = batch.context.grad.abs().amax((0, 1, 3, 4)) > 0
    assert torch.equal(reached, batch.context_mask[0])


def test_a_batch_without_embeddings_is_refused(bank: TripBank, student: CausalWanTransformer3DModel) -> None:
    batch = gather_batch(bank, [0], [1], [slots_of(1, "none")])
    with pytest.raises(ValueError, match="no embeddings"):
        velocity_of(student, batch, batch.chunk, torch.tensor([0.5]))

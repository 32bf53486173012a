"""The rollout: sampling, determinism, prompts that change, state that goes on exactly, work that is accounted for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.support.tiny_causal import (
    CONFIG,
    HEIGHT,
    WIDTH,
    causal_model,
    chunks_of,
    memory_of,
    shot,
    state_of,
    student,
    text,
    video,
)
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.rollout.chunk import Chunk, Student
from vidaccel.rollout.loop import ingest, replay, rollout
from vidaccel.rollout.noise import chunk_generators
from vidaccel.rollout.state import RolloutState

SMALL = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6, similarity_threshold=0.999)


def same(first: list[Chunk], second: list[Chunk]) -> bool:
    assert len(first) == len(second)
    return all(torch.equal(a.latents, b.latents) for a, b in zip(first, second, strict=True))


class PixelCounter:
    """A decoder that remembers how many frames it saw: its state is a number."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seen = 0

    def decode(self, latents: Tensor) -> Tensor:
        frames = latents.shape[2] * 4 - (3 if self.seen == 0 else 0)
        self.seen += latents.shape[2]
        return torch.full((latents.shape[0], frames, 3, 2, 2), self.seen % 256, dtype=torch.uint8)

    def save_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"seen": self.seen}

    def load_state(self, tensors: Any, values: Any) -> None:
        self.seen = values["seen"]


def test_four_steps_are_the_warped_ones_of_self_forcing():
    """Behaviour 1: indices 1000, 750, 500, 250 on the grid of shift 5."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    last = float(scheduler.sigmas[-1])
    assert last == pytest.approx(0.0049801, abs=1e-6)
    times: list[float] = []

    def run(latents: Tensor, timestep: Tensor, prompt: Any, memory: Any) -> Tensor:
        times.append(float(timestep[0]))
        return torch.zeros_like(latents)

    chunks_of(student(run=run), state_of(student(), SMALL), 1)
    assert times == pytest.approx([1000, 937.5, 833.3333, 625, 0], abs=1e-3)


@pytest.mark.parametrize("sigma_index", range(4))
def test_the_estimate_is_exact_for_the_true_velocity_at_every_step(sigma_index: int):
    """Behaviour 2: x = (1 - s) x0 + s e and v = e - x0 give x0 back, re-noised with fresh noise to the next level."""
    x0, noise = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 4, 3, 4, 6)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    scheduler.set_begin_index(sigma_index)
    sigma, following = scheduler.sigmas[sigma_index], scheduler.sigmas[sigma_index + 1]
    noisy = (1 - sigma) * x0 + sigma * noise
    generator = torch.Generator().manual_seed(3)
    fresh = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    stepped = scheduler.step(noise - x0, scheduler.timesteps[sigma_index], noisy, generator=generator)[0]
    torch.testing.assert_close(stepped, (1 - following) * x0 + following * fresh, atol=1e-6, rtol=0)


def test_a_perfect_student_gives_the_clean_video_whatever_the_noise():
    target = video(12)

    def run(latents: Tensor, timestep: Tensor, prompt: Any, memory: Any) -> Tensor:
        frames = memory.indexes[0].current or memory.indexes[0].fast[-3:]
        sigma = (timestep / 1000).clamp(min=1e-6)
        return (latents - target[:, :, list(frames)]) / sigma

    made = chunks_of(student(run=run), state_of(student(), MemoryConfig.full(12)), 4)
    torch.testing.assert_close(torch.cat([chunk.latents for chunk in made], dim=2), target, atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_video_and_another_seed_another():
    """Behaviours 28 and 29: bit for bit, also in a state that was used before nothing of."""
    one, again, other = (chunks_of(student(), state_of(student(), SMALL, (seed,)), 5) for seed in (7, 7, 8))
    assert same(one, again)
    assert not torch.equal(one[0].latents, other[0].latents)


def test_a_longer_rollout_begins_like_a_shorter_one():
    """Behaviour 29: the noise of a chunk depends on the seed and its number only."""
    short, long = (chunks_of(student(), state_of(student(), SMALL), count) for count in (4, 9))
    assert same(short, long[:4])
    draws = [torch.randn(4, generator=chunk_generators([seed], chunk)[0]) for seed in (0, 1) for chunk in (0, 1)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_videos_of_a_batch_are_those_made_alone():
    together = chunks_of(student(), state_of(student(), SMALL, (3, 4)), 8, [shot(batch_size=2)])
    batch_text = shot(batch_size=2).embeddings
    for sample, seed in enumerate((3, 4)):
        own = shot()
        own = type(own)(start_chunk=0, prompt="a", embeddings=tuple(part[sample : sample + 1] for part in batch_text))
        alone = chunks_of(student(), state_of(student(), SMALL, (seed,)), 8, [own])
        for one, both in zip(alone, together, strict=True):
            torch.testing.assert_close(one.latents[0], both.latents[sample], atol=1e-4, rtol=0)


def test_every_chunk_takes_the_steps_and_one_pass_more():
    """Behaviour 30: 5 N / 3 passes for N frames at 4 steps."""
    model, calls = causal_model(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    made = student(model)
    chunks_of(made, state_of(made, SMALL), 6)
    assert len(calls) == made.passes_per_chunk * 6 == 5 * 18 // 3
    guided = student(model, num_inference_steps=2, guidance_scale=3.0)
    calls.clear()
    chunks_of(guided, state_of(guided, SMALL), 2)
    assert len(calls) == guided.passes_per_chunk * 2 == 12


def test_guidance_extrapolates_from_the_negative_branch_which_has_a_memory_of_its_own():
    velocities: dict[int, list[float]] = {0: [], 1: []}
    state = state_of(student(guidance_scale=3.0), SMALL)

    def run(latents: Tensor, timestep: Tensor, prompt: Any, memory: Any) -> Tensor:
        branch = state.memories.index(memory)
        velocities[branch].append(float(timestep[0]))
        return torch.full_like(latents, 1.0 if branch == 0 else 0.5)

    made = student(run=run, guidance_scale=3.0, num_inference_steps=1)
    (chunk,) = chunks_of(made, state, 1)
    noise = torch.randn(4, 3, HEIGHT, WIDTH, generator=chunk_generators((0,), 0)[0])
    torch.testing.assert_close(chunk.latents[0], noise - (0.5 + 3.0 * 0.5))
    assert velocities[0] == velocities[1] == [1000.0, 0.0]
    long = student(guidance_scale=3.0)
    state = state_of(long, SMALL)
    chunks_of(long, state, 8)
    first, second = (memory.indexes[0] for memory in state.memories)
    assert first.state() == second.state()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_saved_rollout_goes_on_bit_for_bit(guidance_scale: float):
    made = student(guidance_scale=guidance_scale)
    whole = chunks_of(made, state_of(made, SMALL, decoder=PixelCounter()), 9)
    state = state_of(made, SMALL, decoder=PixelCounter())
    begin = chunks_of(made, state, 5)
    tensors, values = state.save_state()
    resumed = state_of(made, SMALL, decoder=PixelCounter())
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, values)
    rest = chunks_of(made, resumed, 9)
    assert same(whole, begin + rest)
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(whole, begin + rest, strict=True))
    with pytest.raises(UserError, match="same seed"):
        state_of(made, SMALL, (5,)).load_state(tensors, values)


def test_replayed_latents_bring_the_state_back_bit_for_bit():
    shots = [shot("a"), shot("b", 3), shot("c", 5, cut="hard")]
    state = state_of(student(), SMALL, decoder=PixelCounter())
    made = chunks_of(student(), state, 8, shots)
    again = state_of(student(), SMALL, decoder=PixelCounter())
    replay(student(), again, shots, (chunk.latents for chunk in made))
    (tensors, values), (twin_tensors, twin_values) = state.save_state(), again.save_state()
    assert values == twin_values
    assert tensors.keys() == twin_tensors.keys()
    assert all(torch.equal(tensor, twin_tensors[name]) for name, tensor in tensors.items())


def test_a_new_prompt_changes_nothing_before_it_and_rewrites_what_is_remembered():
    """Behaviour 27: after the cut the memory is that of a pass over the same latents under the new prompt."""
    config = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6, keyframe_rule="uniform")
    plain = chunks_of(student(), state_of(student(), config), 8)
    shots = [shot("a"), shot("new", 6)]
    changed = chunks_of(student(), state_of(student(), config), 8, shots)
    assert same(plain[:6], changed[:6])
    assert not torch.equal(plain[6].latents, changed[6].latents)

    model, seen = causal_model(), []

    def run(latents: Tensor, timestep: Tensor, prompt: Any, memory: Any) -> Tensor:
        if timestep[0] == 1000 and len(memory.indexes[0].current) and memory.indexes[0].current[0] == 18:
            seen.append(
                (memory.indexes[0].entries, memory.buffers.raw.clone(), [row[:] for row in memory.buffers.slots])
            )
        return model(latents, timestep, prompt, memory=memory).sample

    chunks_of(student(model, run=run), state_of(student(), config), 7, shots)
    ((entries, raw, slots),) = seen
    frames = [entry.frame for entry in entries if entry.part != "current"]
    # The twin: a full pass over those frames in groups as long as a chunk, at their positions, remembered as it goes.
    # Before the eviction that began the chunk there were three frames more, which later groups saw.
    before = [*range(3), *[frame for frame in range(3, 18) if frame in _remembered(config, 6)]]
    twin = memory_of(model, MemoryConfig.full(len(before)))
    prompt = model.cache_prompt(shots[1].embeddings[0])
    with torch.no_grad():
        for group in torch.cat([chunk.latents for chunk in plain], dim=2)[:, :, before].split(3, dim=2):
            twin.begin_chunk(group.shape[2])
            model(group, torch.zeros(1), prompt, memory=twin)
            twin.commit()
    tokens = twin.shape.tokens_per_frame
    for frame in frames:
        place, other = slots[0].index((frame, None)), before.index(frame)
        found = raw[:, 0, place * tokens : (place + 1) * tokens]
        wanted = twin.buffers.raw[:, 0, other * tokens : (other + 1) * tokens]
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def _remembered(config: MemoryConfig, num_chunks: int) -> set[int]:
    state = state_of(student(), config)
    chunks_of(student(), state, num_chunks)
    index = state.memory.indexes[0]
    return {*index.sink, *index.slow, *index.fast}


def test_a_hard_cut_forgets_the_picture_and_starts_the_decoder_anew():
    shots = [shot("a"), shot("b", 3, cut="hard")]
    state = state_of(student(), SMALL, decoder=PixelCounter())
    made = chunks_of(student(), state, 6, shots)
    assert [chunk.frames.shape[1] for chunk in made] == [9, 12, 12, 9, 12, 12]
    assert made[3].sink == (9, 10, 11)
    assert made[5].fast == (12, 13, 14, 15, 16, 17)
    fresh = state_of(student(), SMALL)
    fresh.num_chunks = 3  # the same noise
    begin = next(rollout(student(), fresh, [shot("b")], num_chunks=4))
    assert torch.equal(begin.latents, made[3].latents)


def test_a_rollout_starts_from_given_latents_as_if_it_had_made_them():
    plain = chunks_of(student(), state_of(student(), SMALL), 6)
    given = torch.cat([chunk.latents for chunk in plain[:3]], dim=2)
    state = state_of(student(), SMALL)
    begin = list(ingest(student(), state, shot(), given))
    assert same(begin, plain[:3])
    assert same(chunks_of(student(), state, 6), plain[3:])
    again = state_of(student(), SMALL)  # interrupted after the first of the given chunks
    next(ingest(student(), again, shot(), given))
    assert [chunk.index for chunk in ingest(student(), again, shot(), given)] == [1, 2]
    with pytest.raises(UserError, match="to begin with"):
        next(ingest(student(), state_of(student(), SMALL), shot(), given[:, :2]))


def test_only_latents_of_remembered_frames_are_kept():
    """Behaviour 14: an hour needs as much as seconds."""
    state = state_of(student(num_inference_steps=1), SMALL)
    sizes = []
    for chunk in rollout(student(num_inference_steps=1), state, [shot()], num_chunks=60):
        sizes.append((len(state.remembered), sum(t.nbytes for t in state.save_state()[0].values())))
        index = state.memory.indexes[0]
        assert set(state.remembered) == {*index.sink, *index.slow, *index.fast}
        assert chunk.index + 1 == state.num_chunks
    assert len(set(sizes[10:])) == 1


def test_an_interrupted_chunk_leaves_no_trace():
    """An exception in the middle of a chunk: the next attempt makes the same chunk."""
    model, broken = causal_model(), [True]

    def run(latents: Tensor, timestep: Tensor, prompt: Any, memory: Any) -> Tensor:
        if broken and memory.indexes[0].num_frames == 15 and timestep[0] < 900:
            broken.clear()
            raise RuntimeError("lost device")
        return model(latents, timestep, prompt, memory=memory).sample

    made = student(model, run=run)
    state: RolloutState = state_of(made, SMALL)
    expected = chunks_of(student(model), state_of(made, SMALL), 9)
    found: list[Chunk] = []
    with pytest.raises(RuntimeError):
        found.extend(rollout(made, state, [shot()], num_chunks=9))
    found += chunks_of(made, state, 9)
    assert same(found, expected)


def test_wrong_shots_and_settings_are_refused():
    made = student()
    for shots in ([], [shot(start=1)], [shot(), shot(start=0)]):
        with pytest.raises(ValueError, match="shots"):
            next(rollout(made, state_of(made, SMALL), shots, num_chunks=1))
    with pytest.raises(ValueError, match="num_inference_steps"):
        Student(transformer=causal_model(), scheduler=made.scheduler, num_inference_steps=0)


def test_the_text_of_a_chunk_is_that_of_its_shot():
    made = chunks_of(student(), state_of(student(), SMALL), 4, [shot("one"), shot("two", 2)])
    assert [chunk.prompt for chunk in made] == ["one", "one", "two", "two"]
    assert CONFIG["text_dim"] == text().shape[-1]


def test_a_shot_added_while_the_rollout_runs_is_one_that_was_known_before():
    shots, made = [shot("a")], []
    for chunk in rollout(student(), state_of(student(), SMALL), shots, num_chunks=6):
        made.append(chunk)
        if len(made) == 3:
            shots.append(shot("b", 3))
    assert same(made, chunks_of(student(), state_of(student(), SMALL), 6, [shot("a"), shot("b", 3)]))
    assert not same(made, chunks_of(student(), state_of(student(), SMALL), 6))

"""Steps that are left out: what is refused, which passes are made, and that nothing of it outlives a chunk.

What comes out of them is compared with the slow rollout in `test_twin.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.support.tiny_causal import causal_model, shot
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.rollout.loop import rollout
from vidaccel.rollout.passes import eager
from vidaccel.rollout.record import RolloutRecord
from vidaccel.rollout.skipping import ChunkSteps, StepSkipping
from vidaccel.rollout.state import new_state

MEMORY = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6)


def student(**changes: Any) -> Student:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    return Student(transformer=causal_model(), scheduler=scheduler, **changes)


def made(one: Student, prompt: Shot | None = None, *, seeds: tuple[int, ...] = (3,)) -> tuple[list[Chunk], list[float]]:
    """Three chunks, and the timesteps of all passes."""
    run, times = eager(one.transformer), []

    def noting(latents: Tensor, timestep: Tensor, *rest: Any, **more: Any) -> Tensor:
        times.append(float(timestep[0]))
        return run(latents, timestep, *rest, **more)

    counted = Student(**{**vars(one), "run": noting})
    state = new_state(counted, MEMORY, height=4, width=6, seeds=seeds)
    return list(rollout(counted, state, [prompt or shot("p", 0, len(seeds))], num_chunks=3)), times


@pytest.mark.parametrize("text", ["3", "1", "2+3", "3+4@0.15", "3@1", "3@0.123456789", "3@0.0000001"])
def test_a_rule_is_written_as_it_is_read(text: str) -> None:
    assert str(StepSkipping.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("three", "are written as '3' or '2.3', with a threshold as '3.4@0.15'; got 'three'"),
        ("9" * 5000, "are written as"),
        (3, "are written as '3' or '2.3', .* got 3"),
        ((3,), "are written as"),
        ("0", "must be numbers from 1 on, each once and in order, as 3.4; got 0"),
        ("3+2", "each once and in order"),
        ("2@0.1", "numbers from 3 on .the first two decide."),
        ("3@0", "must be a number above 0, got 0"),
        ("3@" + "9" * 400, "must be a number above 0, got inf"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(text: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        StepSkipping.parse(text)


@pytest.mark.parametrize(
    "values", [{"steps": "3"}, {"steps": ("3",)}, {"steps": (True,)}, {"steps": (3,), "threshold": "0.1"}]
)
def test_a_rule_of_other_types_is_refused(values: Any) -> None:
    with pytest.raises(UserError, match="must be"):
        StepSkipping(**values)


def test_a_student_refuses_steps_that_it_does_not_take_and_to_take_none() -> None:
    with pytest.raises(UserError, match="Step 5 cannot be left out of 4; name steps up to 4"):
        student(skipping=StepSkipping.parse("5"))
    with pytest.raises(UserError, match="All 2 steps cannot be left out"):
        student(num_inference_steps=2, skipping=StepSkipping.parse("1+2"))


def test_the_official_mode_remembers_noisy_passes_and_leaves_none_out() -> None:
    one = student(skipping=StepSkipping.parse("3"))
    state = new_state(one, MemoryConfig(mode="official"), height=4, width=6)
    with pytest.raises(UserError, match="The official mode remembers noisy passes"):
        rollout(one, state, [shot()], num_chunks=1)


@pytest.mark.parametrize(
    ("rule", "chunks"),
    [
        ("3", [[1000, 900, 500, 0]] * 3),
        ("2+3", [[1000, 500, 0]] * 3),
        ("1", [[1000, 900, 750, 500, 0]] + [[900, 750, 500, 0]] * 2),
        ("3+4@1000", [[1000, 900, 0]] * 3),
        ("3+4@0.0001", [[1000, 900, 750, 500, 0]] * 3),
    ],
)
def test_passes_are_made_for_the_other_steps_alone(rule: str, chunks: list[list[float]]) -> None:
    one = student(skipping=StepSkipping.parse(rule))
    found, times = made(one)
    assert times == pytest.approx([time for chunk in chunks for time in chunk])
    assert [one.passes_of(chunk) for chunk in found] == [[len(chunk)] for chunk in chunks]


def test_leaving_a_step_out_is_as_if_its_noise_level_had_never_been() -> None:
    """With the noise of the other steps: that of step 3 goes with it."""
    noise = [torch.randn(1, 2, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    sigmas = [1.0, 0.9, 0.75, 0.5, 0.0]

    def network(x: Tensor, sigma: float) -> Tensor:
        return torch.sin(3 * x) + sigma

    steps, x = ChunkSteps(StepSkipping.parse("3"), sigmas), noise[0]
    for number, sigma in enumerate(sigmas[:-1]):
        velocity = steps.velocity(x, lambda x=x, sigma=sigma: network(x, sigma))  # type: ignore[misc]
        following = sigmas[number + 1]
        x = (1 - following) * (x - sigma * velocity) + following * noise[min(number + 1, 3)]
    short, others = noise[0], iter((noise[1], noise[3], noise[0]))
    for sigma, following in ((1.0, 0.9), (0.9, 0.5), (0.5, 0.0)):
        short = (1 - following) * (short - sigma * network(short, sigma)) + following * next(others)
    torch.testing.assert_close(x, short)


def test_a_sample_is_the_same_alone_and_beside_others() -> None:
    one = student(skipping=StepSkipping.parse("3+4@1.21"))
    together, _ = made(one, seeds=(3, 4, 5))
    counts = {count for chunk in together for count in chunk.skipped}
    assert counts == {0, 2}, "some leave steps out and some do not; take another threshold"
    for place, seed in enumerate((3, 4, 5)):
        own = (shot("p", 0, 3).embeddings[0][place : place + 1],)
        alone, _ = made(one, Shot(start_chunk=0, prompt="p", embeddings=own), seeds=(seed,))
        assert [chunk.skipped[0] for chunk in alone] == [chunk.skipped[place] for chunk in together]
        torch.testing.assert_close(alone[-1].latents[0], together[-1].latents[place], rtol=1e-4, atol=1e-4)


def test_a_report_counts_the_passes_that_were_made() -> None:
    one = student(skipping=StepSkipping.parse("3"))
    chunks, times = made(one)
    record = RolloutRecord(MEMORY, ChunkGrid(chunk_frames=3, fps=16), passes_per_chunk=one.passes_per_chunk)
    for chunk in chunks:
        record.add(chunk)
    assert record.num_passes == len(times) == 12

"""Rollouts in training: how long, where they begin, what they remember, and where the only gradients are."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.support.tiny_donor import noise_bank
from tests.support.tiny_student import camera_student, noise_prompts, tiny_text_encoder
from vidaccel.errors import UserError
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.training import self_rollout
from vidaccel.training.chunk_batch import EMPTY
from vidaccel.training.chunk_sampler import FEW_STEPS, Sampler, sample_chunk, shifted_sampler
from vidaccel.training.context_forcing_config import RolloutRule
from vidaccel.training.context_forcing_views import ErrorBank, foreign_memory, short_view, view_of
from vidaccel.training.ranks import shared_by_ranks
from vidaccel.training.self_rollout import (
    PromptTable,
    ScoredChunk,
    Start,
    StartShares,
    Video,
    draw_starts,
    drawn_length,
    exit_pass,
    layout_rule,
    new_video,
    roll_out_chunks,
)
from vidaccel.training.trip_bank import TripBank

ONLY = {"returns": 0.0, "arrivals": 0.0, "changes": 0.0, "anything": 0.0, "own": 0.0}


@pytest.fixture(scope="module")
def bank() -> TripBank:
    return noise_bank()


@pytest.fixture(scope="module")
def prompts(bank: TripBank) -> PromptTable:
    return noise_prompts(bank)


@pytest.fixture
def student() -> CausalWanTransformer3DModel:
    return camera_student()


def video(bank: TripBank, prompts: PromptTable, *, first: int = 2, layouts: Any = "uniform") -> Video:
    starts = [Start(row, first) for row in range(len(bank.latents))]
    return new_video(bank, prompts, starts, rule=layout_rule(bank, layouts, random.Random(0)))


def rolled_out(
    student: CausalWanTransformer3DModel,
    video: Video,
    *,
    num_chunks: int = 3,
    num_scored: int = 1,
    seed: int = 0,
    sampler: Sampler = FEW_STEPS,
) -> list[ScoredChunk]:
    return roll_out_chunks(
        student,
        video,
        num_chunks=num_chunks,
        num_scored=num_scored,
        draw=random.Random(seed),
        generator=torch.Generator().manual_seed(seed),
        sampler=sampler,
    )


class Passes:
    """Counts passes of a student over chunks, and can add a probe to what a chunk's first pass is given."""

    def __init__(self, student: CausalWanTransformer3DModel) -> None:
        self.with_gradients: list[bool] = []
        self.timesteps: list[float] = []
        self.probes: dict[int, Tensor] = {}
        self._handle = student.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.with_gradients.append(torch.is_grad_enabled())
        self.timesteps.append(float(args[1][0]))
        probe = self.probes.get(len(self.timesteps) - 1)
        return None if probe is None else ((args[0] + probe, *args[1:]), kwargs)

    def close(self) -> None:
        self._handle.remove()


@pytest.fixture
def passes(student: CausalWanTransformer3DModel) -> Iterator[Passes]:
    counted = Passes(student)
    yield counted
    counted.close()


# ---- how long ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "progress", "expected"),
    [
        ("linear", 0.0, {2}),
        ("linear", 0.5, {2, 3, 4}),
        ("linear", 1.0, {2, 3, 4, 5, 6}),
        ("linear", 7.0, {2, 3, 4, 5, 6}),
        ("exponential", 0.0, {2, 3, 4, 5, 6}),
        ("exponential", 0.5, {2, 3, 4, 5, 6}),
        ("exponential", 1.0, {2, 3, 4, 5, 6}),
        ("uniform", 0.0, {2, 3, 4, 5, 6}),
        ("uniform", 1.0, {2, 3, 4, 5, 6}),
    ],
)
def test_lengths_have_inclusive_bounds_at_every_time(rule: Any, progress: float, expected: set[int]) -> None:
    draw = random.Random(0)
    drawn = {drawn_length(rule, draw, progress=progress, least=2, most=6) for _ in range(4000)}
    assert drawn == expected


def test_the_exponential_rule_is_short_at_first_and_uniform_in_the_end() -> None:
    def mean(progress: float) -> float:
        draw = random.Random(0)
        return statistics.mean(
            drawn_length("exponential", draw, progress=progress, least=1, most=5) for _ in range(4000)
        )

    assert mean(0.0) < mean(0.5) < mean(1.0)
    assert mean(1.0) == pytest.approx(3.0, abs=0.1)
    assert drawn_length("linear", random.Random(0), progress=0.3, least=1, most=1) == 1
    with pytest.raises(ValueError, match="`least`"):
        drawn_length("linear", random.Random(0), progress=0, least=3, most=2)


def test_all_ranks_take_the_value_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_by_ranks(4, torch.device("cpu")) == 4
    sources = []

    def broadcast(tensor: Tensor, src: int) -> None:
        sources.append(src)
        tensor.fill_(2)  # what rank 0 drew

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    assert shared_by_ranks(5, torch.device("cpu")) == 2
    assert sources == [0]


# ---- where ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["returns", "arrivals", "changes"])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_the_event_of_a_share_happens_in_a_chunk_that_the_student_makes(kind: str, num_chunks: int) -> None:
    bank = noise_bank(num_clips=24, num_chunks=15, side=2)
    shares = StartShares(**{**ONLY, kind: 1.0})
    starts = draw_starts(bank, random.Random(0), count=300, num_chunks=num_chunks, shares=shares)
    events = set(getattr(bank, kind))
    places = set()
    for start in starts:
        assert 0 <= start.chunk <= bank.num_chunks - num_chunks
        made = [(start.row, start.chunk + chunk) in events for chunk in range(num_chunks)]
        assert any(made)
        places |= {place for place, is_event in enumerate(made) if is_event}
    assert places == set(range(num_chunks))


def test_starts_have_the_shares_that_were_asked_for_and_a_bank_without_events_lends_any_chunk(bank: TripBank) -> None:
    def starts(bank: TripBank, **shares: float) -> Counter[int]:
        drawn = draw_starts(bank, random.Random(1), count=2000, num_chunks=2, shares=StartShares(**{**ONLY, **shares}))
        return Counter(start.chunk for start in drawn)

    anything = starts(bank, anything=1.0)
    assert set(anything) == set(range(bank.num_chunks - 1))
    own = starts(bank, anything=1.0, own=0.25)
    expected = 2000 * (0.25 + 0.75 / (bank.num_chunks - 1))
    assert own[0] == pytest.approx(expected, abs=90)
    assert set(starts(replace(bank, changes=()), changes=1.0)) == set(anything)
    with pytest.raises(ValueError, match="does not fit"):
        draw_starts(bank, random.Random(0), count=1, num_chunks=bank.num_chunks + 1, shares=StartShares())


def test_shares_that_are_no_shares_are_refused() -> None:
    with pytest.raises(UserError, match="must sum to 1"):
        StartShares(returns=0.9)
    with pytest.raises(UserError, match="from 0 to 1"):
        StartShares(own=1.5)


# ---- what is made -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [3.0, 1.5])
def test_the_student_samples_at_the_levels_of_the_shipped_rollout(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # as `vidaccel.rollout` asks for
    made = RolloutRule(shift=shift).sampler
    assert (*made.sigmas, 0.0) == pytest.approx(scheduler.sigmas.tolist())
    assert made.stochastic
    assert RolloutRule().sampler == FEW_STEPS


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_is_none_is_refused(shift: float) -> None:
    with pytest.raises(UserError, match="`shift`"):
        RolloutRule(shift=shift)


def test_own_chunks_become_the_past_of_the_next_one_and_the_rest_stays_real(
    student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable
) -> None:
    made = video(bank, prompts, first=2)
    (scored,) = rolled_out(student, made, num_chunks=3)
    real = bank.latents.float()
    changed = [bool((made.latents[:, frame] != real[:, frame]).any()) for frame in range(real.shape[1])]
    assert changed == [6 <= frame < 12 for frame in range(real.shape[1])]
    frames = scored.batch.frames[0].tolist()
    for slot, frame in enumerate(frames):
        if frame != EMPTY:
            assert torch.equal(scored.batch.context[:, :, slot], made.latents[:, frame])
    assert {9, 10, 11} <= set(frames)


def test_a_chunk_is_made_by_clean_estimates_and_fresh_noise_as_in_the_shipped_rollout(
    student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable
) -> None:
    batch = video(bank, prompts).batch(0)
    context = self_rollout.context_of(student, batch)
    noise = torch.randn(batch.chunk.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        drawn = [torch.Generator().manual_seed(6) for _ in range(2)]
        made = sample_chunk(student, context, noise, lambda: torch.randn(noise.shape, generator=drawn[0]))
        generator, chunk = drawn[1], noise
        for sigma, following in zip(FEW_STEPS.sigmas, (*FEW_STEPS.sigmas[1:], 0.0), strict=True):
            levels = torch.full((len(chunk),), sigma)
            clean = chunk - sigma * self_rollout.velocity_in(student, context, chunk, levels)
            if following:
                fresh = torch.randn(chunk.shape, generator=generator)
                chunk = (1 - following) * clean + following * fresh
    torch.testing.assert_close(made, clean)


def test_chunks_are_made_and_exit_at_the_levels_that_are_asked_for(
    student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable, passes: Passes
) -> None:
    sampler = shifted_sampler(3, shift=1.5, stochastic=True)
    (scored,) = rolled_out(student, video(bank, prompts), num_chunks=2, sampler=sampler)
    exit_pass(student, scored)
    levels = [1000 * sigma for sigma in sampler.sigmas]
    assert passes.timesteps == pytest.approx([*levels, *levels[: scored.exit_step + 1]])


@pytest.mark.parametrize("seed", range(6))
def test_the_exit_step_decides_how_many_passes_there_are_and_at_which_level_the_gradient_is(
    student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable, passes: Passes, seed: int
) -> None:
    (scored,) = rolled_out(student, video(bank, prompts), num_chunks=2, seed=seed)
    exit_pass(student, scored).square().mean().backward()
    steps = len(FEW_STEPS.sigmas)
    assert len(passes.with_gradients) == steps + scored.exit_step + 1
    assert passes.with_gradients == [False] * (steps + scored.exit_step) + [True]
    assert passes.timesteps[-1] == pytest.approx(1000 * FEW_STEPS.sigmas[scored.exit_step])
    assert scored.sigma == FEW_STEPS.sigmas[scored.exit_step]


def test_every_exit_step_is_drawn(student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable) -> None:
    short = replace(video(bank, prompts), starts=[Start(0, 2)], latents=bank.latents[:1].float())
    drawn = {rolled_out(student, short, num_chunks=1, seed=seed)[0].exit_step for seed in range(24)}
    assert drawn == set(range(len(FEW_STEPS.sigmas)))


def test_a_loss_on_a_chunk_has_no_gradient_in_the_passes_that_made_earlier_ones(
    student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable, passes: Passes
) -> None:
    shape = bank.latents[:, :3].transpose(1, 2).shape
    last = 2 * len(FEW_STEPS.sigmas)
    probes = {number: torch.zeros(shape, requires_grad=True) for number in range(last + 4)}
    passes.probes = probes
    scored = rolled_out(student, video(bank, prompts), num_chunks=3)
    loss = exit_pass(student, scored[-1]).square().mean()
    loss.backward()
    exit_number = len(passes.timesteps) - 1
    assert probes[exit_number].grad is not None
    assert probes[exit_number].grad.abs().max() > 0
    assert all(probes[number].grad is None for number in range(exit_number))
    assert not scored[-1].batch.context.requires_grad


def test_of_a_window_every_chunk_is_scored_with_an_own_exit_step_and_a_past_that_is_denoised_to_the_end(
    student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable, passes: Passes
) -> None:
    made = video(bank, prompts, first=1)
    scored = rolled_out(student, made, num_chunks=4, num_scored=3, seed=3)
    assert [int(chunk.batch.first[0]) for chunk in scored] == [6, 9, 12]
    assert len(passes.timesteps) == 3 * len(FEW_STEPS.sigmas) + scored[-1].exit_step
    assert len({chunk.exit_step for chunk in scored}) > 1
    for earlier, later in itertools.pairwise(scored):
        first = int(earlier.batch.first[0])
        slots = [later.batch.frames[0].tolist().index(frame) for frame in range(first, first + 3)]
        past = later.batch.context[:, :, slots].transpose(1, 2)
        assert torch.equal(past, made.latents[:, first : first + 3])
    with pytest.raises(ValueError, match="`num_scored`"):
        rolled_out(student, made, num_chunks=2, num_scored=3)


def test_only_scored_chunks_have_gradients_and_checkpointing_does_not_change_them(
    student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable
) -> None:
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            student.train().enable_gradient_checkpointing()
        scored = rolled_out(student, video(bank, prompts, layouts="drawn"), num_chunks=4, num_scored=2)
        assert all(parameter.grad is None for parameter in student.parameters())
        for chunk in scored:
            exit_pass(student, chunk).square().mean().backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
        student.zero_grad()
    for plain, checkpoint in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpoint, plain, rtol=1e-5, atol=1e-8)


def test_a_rollout_from_nothing_has_nothing_of_the_real_clip_in_it(
    student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable
) -> None:
    other = replace(bank, latents=bank.latents + 1)
    made = [video(clips, prompts, first=0, layouts="drawn") for clips in (bank, other)]
    first, second = (rolled_out(student, clips, num_chunks=4) for clips in made)
    assert torch.equal(first[0].noisy, second[0].noisy)
    assert torch.equal(first[0].batch.context, second[0].batch.context)
    assert not torch.equal(made[0].latents, made[1].latents)


def test_prompts_are_embedded_as_the_text_encoder_embeds_them(bank: TripBank, prompts: PromptTable) -> None:
    encoder = tiny_text_encoder()
    batch = video(bank, prompts, first=3).batch(1)
    assert batch.embeddings is not None
    expected = batch.with_prompt(encoder, batch.tokens, length=40).embeddings
    torch.testing.assert_close(batch.embeddings, expected)


# ---- what is seen -----------------------------------------------------------------------------------------------


def test_long_and_short_views_differ_in_what_is_remembered_and_in_nothing_else(
    student: CausalWanTransformer3DModel, bank: TripBank, prompts: PromptTable
) -> None:
    batch = video(bank, prompts, first=5).batch(0)
    long, short = view_of(batch, "long"), view_of(batch, "short")
    assert long is batch
    for name in ("chunk", "chunk_camera", "tokens", "embeddings", "frames", "first", "coverage"):
        assert getattr(short, name) is getattr(batch, name)
    kept = [
        sorted(frame for frame, is_kept in zip(frames, mask, strict=True) if is_kept)
        for frames, mask in zip(short.frames.tolist(), short.context_mask.tolist(), strict=True)
    ]
    assert kept == [[12, 13, 14]] * len(kept)
    assert short.chunk_positions.tolist() == [[3, 4, 5]] * len(kept)
    alone = video(bank, prompts, first=5).batch(0).without(batch.frames < 12)
    sigmas, noisy = torch.full((len(kept),), 0.7), torch.randn(batch.chunk.shape)
    with torch.no_grad():
        seen = self_rollout.velocity_in(student, self_rollout.context_of(student, short), noisy, sigmas)
        expected = self_rollout.velocity_in(student, self_rollout.context_of(student, alone), noisy, sigmas)
    assert torch.equal(seen, expected)


def test_the_short_view_of_the_second_chunk_is_the_first_one(bank: TripBank, prompts: PromptTable) -> None:
    short = short_view(video(bank, prompts, first=1).batch(0))
    assert short.context_mask.sum(1).tolist() == [3] * len(bank.latents)
    assert not short_view(video(bank, prompts, first=0).batch(0)).context_mask.any()


def test_foreign_memory_is_the_last_chunk_with_older_frames_of_another_clip(
    bank: TripBank, prompts: PromptTable
) -> None:
    starts = [Start(0, 5), Start(1, 3), Start(2, 1), Start(3, 6)]
    batch = new_video(bank, prompts, starts, rule=layout_rule(bank, "uniform", random.Random(0))).batch(0)
    foreign = foreign_memory(batch)
    last = batch.frames >= batch.first[:, None] - 3
    for sample in range(4):
        other = (sample - 1) % 4
        for slot in range(batch.frames.shape[1]):
            source = sample if last[sample, slot] else other
            assert foreign.context_mask[sample, slot] == batch.context_mask[source, slot]
            assert torch.equal(foreign.context[sample, :, slot], batch.context[source, :, slot])
            if foreign.context_mask[sample, slot]:
                for ours, theirs in zip(foreign.context_camera, batch.context_camera, strict=True):
                    assert ours[sample, slot] == theirs[source, slot]
    counts = foreign.context_mask.sum(1)
    assert torch.equal(foreign.chunk_positions, counts[:, None] + torch.arange(3))


def test_recycled_errors_are_added_to_the_last_chunk_of_a_share_of_samples(
    bank: TripBank, prompts: PromptTable
) -> None:
    batch = video(bank, prompts, first=5).batch(0)
    errors = ErrorBank(6, tuple(batch.chunk.shape[1:]), device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    assert errors.disturbed(batch, share=1.0, slow=False, generator=generator) is batch
    errors.add(torch.randn(32, *batch.chunk.shape[1:]), torch.linspace(1, 0, 32))
    assert errors.count == 8
    for slow in (False, True):
        difference = errors.disturbed(batch, share=1.0, slow=slow, generator=generator).context - batch.context
        touched = difference.abs().amax((1, 3, 4)) > 0
        last = batch.frames >= batch.first[:, None] - 3
        assert torch.equal(touched, batch.context_mask & (batch.context_mask if slow else last))
    added = (errors.disturbed(batch, share=1.0, slow=False, generator=generator).context - batch.context)[:, :, -3:]
    for sample in added:
        distance = (errors.residuals.float() - sample).abs().amax((1, 2, 3, 4))
        assert distance.min() < 1e-5
    assert errors.disturbed(batch, share=0.0, slow=True, generator=generator) is batch
    hits = 0
    for _ in range(200):
        changed = errors.disturbed(batch, share=0.25, slow=False, generator=generator).context != batch.context
        hits += int(changed.flatten(1).any(1).sum())
    assert hits == pytest.approx(200, abs=60)


def test_errors_at_the_lowest_noise_are_kept_and_the_oldest_replaced() -> None:
    errors = ErrorBank(3, (1, 1, 1, 1), device=torch.device("cpu"))
    for start in (0, 10):
        values = torch.arange(start, start + 8.0).view(8, 1, 1, 1, 1)
        errors.add(values, torch.tensor([0.9, 0.1, 0.8, 0.7, 0.2, 0.6, 0.5, 0.95]))
    assert sorted(errors.residuals.flatten().tolist()) == [4.0, 11.0, 14.0]

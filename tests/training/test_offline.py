"""Offline distillation: a store that survives a kill, targets that are the teacher's, a loss that is the online one."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.offline_world import bank, collection, embed, network, teacher
from vidaccel.errors import UserError
from vidaccel.training.chunk_batch import EMPTY, context_of, gather_batch, slots_of, velocity_in
from vidaccel.training.loop import Schedule
from vidaccel.training.offline.collect import collect, collect_shard, shard_plan
from vidaccel.training.offline.distill import FreshTargets, OfflineDistill, OfflineTask, StoredTargets, end_errors
from vidaccel.training.offline.fingerprint import TeacherFingerprint, check_consistency, weights_digest
from vidaccel.training.offline.states import HistoryView, States
from vidaccel.training.offline.store import INDEX_FILE, TargetStore
from vidaccel.training.offline.teacher import Teacher, ask, trajectory
from vidaccel.training.offline.visits import noise_states, plan_rollouts, states_at, visit

CPU = torch.device("cpu")
LEVELS = [1.0, 0.9, 0.75, 0.5]
PRINT = TeacherFingerprint(
    weights="0123", structure="causal", history="own", guidance_scale=1.0, schedule="euler 8 steps, shift 3"
)


def some_states(count: int = 4, *, seed: int = 0, chunk: int = 4) -> States:
    """Noise at several levels, with several layouts of the memory."""
    modes = ("uniform", "none", "window", "every second")
    slots = [slots_of(chunk, modes[row % len(modes)], sink=row % 3 > 0) for row in range(count)]
    batch = gather_batch(bank(), [row % 5 for row in range(count)], [chunk] * count, slots)
    noise = torch.randn(batch.chunk.shape, generator=torch.Generator().manual_seed(seed))
    states = states_at(batch, noise, 1.0)
    return replace(states, sigmas=torch.tensor([LEVELS[row % 4] for row in range(count)]))


def stored(folder: Path, **changes: Any) -> TargetStore:
    return collect(network(), teacher(), bank(), folder=folder, config=collection(**changes), embed=embed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TargetStore:
    return stored(tmp_path_factory.mktemp("targets"))


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# Fingerprints


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "4567"}, "weights is '0123' there, asked for '4567'"),
        ({"structure": "bidirectional"}, "structure is 'causal'"),
        ({"history": "last:3"}, "history is 'own' there, asked for 'last:3'"),
        ({"guidance_scale": 3.0}, "guidance_scale is 1.0"),
        ({"schedule": "euler 4 steps, shift 3"}, "schedule is"),
    ],
)
@pytest.mark.parametrize("stage", ["ode", "visited", "consistency"])
def test_a_stage_that_follows_trajectories_refuses_another_teacher(
    stage: Any, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match="must follow the trajectories") as raised:
        check_consistency(PRINT, replace(PRINT, **changes), stage=stage)
    assert words in str(raised.value)
    assert check_consistency(PRINT, PRINT, stage=stage) == ()


def test_distribution_matching_only_warns_of_another_teacher(caplog: pytest.LogCaptureFixture) -> None:
    other = replace(PRINT, structure="bidirectional", weights="4567")
    with caplog.at_level(logging.WARNING):
        assert len(check_consistency(PRINT, other, stage="dmd")) == 2
    (record,) = caplog.records
    assert "structure is 'causal' there, asked for 'bidirectional'" in record.getMessage()
    with pytest.raises(UserError, match="`stage` must be one of"):
        check_consistency(PRINT, other, stage="later")  # type: ignore[arg-type]


def test_a_fingerprint_changes_with_any_weight_and_survives_json() -> None:
    first, second = network(), network()
    assert weights_digest(first) == weights_digest(second)
    with torch.no_grad():
        second.blocks[1].ffn.net[2].weight[-1, -1] += 1e-3
    assert weights_digest(first) != weights_digest(second)
    assert weights_digest(first) != weights_digest(first.bfloat16())
    found = teacher(history=HistoryView(frames=3), guidance_scale=2.0).fingerprint
    assert (found.history, found.guidance_scale, found.schedule) == ("last:3", 2.0, "euler 8 steps, shift 3")
    assert TeacherFingerprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(UserError, match="A fingerprint of a teacher has"):
        TeacherFingerprint.from_dict({"weights": "0"})


# The store


class Killed(BaseException):
    """The end of a process: nothing tidies up after it."""


def die_at(last: int, patch: pytest.MonkeyPatch) -> None:
    """Let renaming number `last` fail as in a process that ends there, and everything that would tidy up after it."""
    rename, unlink, done = os.replace, Path.unlink, itertools.count()
    is_dead = False

    def renamed(*paths: Any) -> None:
        nonlocal is_dead
        is_dead = is_dead or next(done) == last
        if is_dead:
            raise Killed
        rename(*paths)

    def unlinked(path: Path, **options: Any) -> None:
        if is_dead:
            raise Killed
        unlink(path, **options)

    patch.setattr(os, "replace", renamed)
    patch.setattr(Path, "unlink", unlinked)


@pytest.mark.parametrize("last", range(7))  # of an index, and a shard and an index three times
def test_a_collection_that_is_killed_goes_on_to_the_same_records(last: int, tmp_path: Path, whole: TargetStore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die_at(last, patch)
        with pytest.raises(Killed):
            stored(tmp_path)
    assert list(tmp_path.glob(".*.part.*")), "a kill leaves what was half written"
    if last > 0:
        assert len(TargetStore(tmp_path)) == 4 * ((last - 1) // 2)
    again = stored(tmp_path)
    assert_same(again.read(), whole.read())
    assert again.cost.teacher_forwards == whole.cost.teacher_forwards


def test_records_are_read_in_the_order_that_is_asked_for_and_latents_lie_in_bf16(whole: TargetStore) -> None:
    every = whole.read()
    assert {name for name, tensor in every.items() if tensor.dtype == torch.bfloat16} == {"noisy", "context", "ends"}
    rows = [11, 0, 5, 5, 4]
    assert_same(whole.read(rows), {name: tensor[rows] for name, tensor in every.items()})
    with pytest.raises(IndexError):
        whole.read([12])


def test_a_store_of_another_collection_or_teacher_is_not_mixed_with_this_one(tmp_path: Path) -> None:
    stored(tmp_path, num_states=4)
    assert len(stored(tmp_path, num_states=8, max_bytes=10**9)) == 8, "a longer collection goes on"
    with pytest.raises(UserError, match="seed is 0 there, asked for 1"):
        stored(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"another collection .*student is"):
        collect(network(5), teacher(), bank(), folder=tmp_path, config=collection(), embed=embed)
    viewer = teacher(history=HistoryView(frames=3))
    with pytest.raises(UserError, match=r"teacher\.history is 'own' there, asked for 'last:3'"):
        collect(network(), viewer, bank(), folder=tmp_path, config=collection(), embed=embed)
    assert len(TargetStore(tmp_path)) == 8


def test_what_does_not_fit_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    size = stored(tmp_path / "whole").num_bytes / 12
    with pytest.raises(UserError, match=r"12 states of .* 1 states fit"):
        stored(tmp_path / "small", max_bytes=int(1.5 * size))
    assert not (tmp_path / "small").exists()
    assert stored(tmp_path / "enough", max_bytes=int(12 * size)).num_bytes <= 12 * size


def test_a_broken_store_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no targets"):
        TargetStore(tmp_path)
    stored(tmp_path, num_states=4)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match="missing or cut short"):
        TargetStore(tmp_path)
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        TargetStore(tmp_path)


# States and targets


def test_the_context_of_states_is_that_of_the_batch_they_were_taken_from() -> None:
    student, slots = network(), [slots_of(4, "uniform"), slots_of(4, "none", sink=False)]
    batch = gather_batch(bank(), [0, 3], [4, 4], slots)
    batch = replace(batch, context=batch.context.bfloat16().float(), embeddings=embed(batch.tokens))
    noisy, sigmas = torch.randn(batch.chunk.shape).bfloat16().float(), torch.tensor([0.9, 0.5])
    states = replace(states_at(batch, noisy, 1.0), sigmas=sigmas)
    with torch.no_grad():
        context = context_of(student, states.surroundings(embed(states.tokens)))
        found = velocity_in(student, context, noisy, sigmas)
        expected = velocity_in(student, context_of(student, batch), noisy, sigmas)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_short_view_is_a_batch_whose_other_slots_are_empty() -> None:
    whole, frames = slots_of(4, "uniform"), (9, 10, 11)
    short = whole._replace(frames=tuple(frame if frame in frames else EMPTY for frame in whole.frames))
    batches = [gather_batch(bank(), [1], [4], [slots]) for slots in (whole, short)]
    states = [states_at(batch, torch.ones_like(batch.chunk), 0.75) for batch in batches]
    views = (HistoryView(frames=3), HistoryView())
    first, second = (ask(teacher(history=view), one, embed).ends for one, view in zip(states, views, strict=True))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert not torch.allclose(first, ask(teacher(), states[0], embed).ends, atol=1e-3)
    assert (HistoryView(frames=3).name, HistoryView().name) == ("last:3", "own")
    with pytest.raises(ValueError, match="at least 1"):
        HistoryView(frames=0)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_answers_are_those_of_one_state_at_a_time_by_hand(scale: float) -> None:
    asked, states = teacher(guidance_scale=scale), some_states(6)
    answer = ask(asked, states, embed)
    grid = [1.0, 0.9545454545, 0.9, 0.8333333333, 0.75, 0.6428571429, 0.5, 0.3, 0.0]
    count = 0
    for row in range(6):
        one = states.rows(slice(row, row + 1))
        chunk = one.noisy.float()
        remaining = [level for level in grid if level <= float(one.sigmas) + 1e-6]
        for number, (sigma, following) in enumerate(itertools.pairwise(remaining)):
            step = _by_hand(asked, one, chunk, sigma)
            if number == 0:
                torch.testing.assert_close(answer.velocities[row : row + 1], step, atol=1e-5, rtol=0)
            chunk = chunk + (following - sigma) * step
            count += 1 if scale == 1 else 2
        torch.testing.assert_close(answer.ends[row : row + 1], chunk, atol=1e-4, rtol=0)
    assert answer.num_forwards == count


def _by_hand(asked: Teacher, states: States, chunk: Tensor, sigma: float) -> Tensor:
    nothing = torch.tensor([[1, *[0] * 31]])
    steps = []
    for tokens in (states.tokens, nothing):
        context = context_of(asked.network, states.surroundings(embed(tokens), view=asked.history))
        steps.append(velocity_in(asked.network, context, chunk, torch.tensor([sigma])))
    return steps[1] + asked.guidance_scale * (steps[0] - steps[1])


def test_a_way_from_noise_ends_where_its_states_end() -> None:
    asked, plan = teacher(), plan_of(own_chunks=1)
    noise = noise_states(bank(), plan, torch.Generator().manual_seed(0))
    way = trajectory(asked, noise, LEVELS, embed)
    assert [round(sigma, 3) for sigma, _, _ in way.stops] == LEVELS
    for sigma, chunks, step in way.stops:
        states = replace(noise.at(chunks, torch.full((len(noise),), sigma)), noisy=chunks)
        answer = ask(asked, states, embed)
        torch.testing.assert_close(answer.ends, way.ends, atol=1e-4, rtol=0)
        torch.testing.assert_close(answer.velocities, step, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"do not stop at the student's noise level 0\.9"):
        trajectory(teacher(num_steps=6), noise, LEVELS, embed)


def plan_of(**changes: Any) -> Any:
    settings = {
        "num_rollouts": 4,
        "own_chunks": 2,
        "num_steps": 4,
        "states_per_rollout": 3,
        "return_share": 0.5,
    }
    return plan_rollouts(bank(), random.Random(3), **{**settings, **changes})


def test_a_plan_keeps_as_many_states_of_every_rollout_and_begins_at_returns() -> None:
    plan = plan_of(num_rollouts=40, return_share=1.0)
    kept = [rollout for rollouts in plan.kept.values() for rollout in rollouts]
    assert sorted(kept) == sorted(list(range(40)) * 3)
    assert len(plan.kept) == 8
    assert set(zip(plan.rows, plan.first_chunks, strict=True)) <= set(bank().returns)
    assert {1, 2} < set(plan_of(num_rollouts=40, return_share=0.0).first_chunks) <= {1, 2, 3, 4}


@torch.no_grad()
def test_visited_states_are_those_of_a_slow_rollout_and_later_chunks_remember_own_ones() -> None:
    student, plan = network(), plan_of()
    made = visit(student, bank(), plan, num_steps=4, embed=embed, generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(1)
    videos = bank().latents[list(plan.rows)].float()
    expected = []
    for number in range(2):
        first = [3 * chunk for chunk in plan.chunks(number)]
        batch = gather_batch(bank(), plan.rows, plan.chunks(number), plan.slots[number], latents=videos)
        batch = replace(batch, context=batch.context.bfloat16().float(), embeddings=embed(batch.tokens))
        chunk = torch.randn(batch.chunk.shape, generator=draw).bfloat16().float()
        for step, (sigma, following) in enumerate(itertools.pairwise([*LEVELS, 0.0])):
            expected += [(sigma, chunk[row]) for row in plan.kept.get((number, step), ())]
            step_velocity = velocity_in(student, context_of(student, batch), chunk, torch.full((4,), sigma))
            clean = chunk - sigma * step_velocity
            if following > 0:
                chunk = (1 - following) * clean + following * torch.randn(clean.shape, generator=draw)
        for row, start in enumerate(first):
            videos[row, start : start + 3] = clean[row].transpose(0, 1)
    torch.testing.assert_close(made.videos, videos, atol=1e-4, rtol=0)
    assert made.states is not None
    torch.testing.assert_close(made.states.sigmas, torch.tensor([sigma for sigma, _ in expected]))
    torch.testing.assert_close(made.states.noisy.float(), torch.stack([x for _, x in expected]), atol=2e-2, rtol=2e-2)
    assert made.num_forwards == 4 * 2 * 4


@pytest.mark.parametrize("kind", ["ode", "visited"])
def test_a_shard_depends_on_its_seed_and_number_alone(kind: Any) -> None:
    config = collection(kind=kind, keep_velocities=True)

    def shard(number: int, **changes: Any) -> dict[str, Tensor]:
        made = replace(config, **changes)
        return collect_shard(network(), teacher(), bank(), config=made, number=number, embed=embed)[0].tensors()

    assert_same(shard(1), shard(1))
    assert_same(shard(1), shard(1, num_states=400))
    for other in (shard(2), shard(1, seed=1)):
        assert not torch.equal(other["noisy"], shard(1)["noisy"])
    assert shard_plan(bank(), replace(config, num_states=9), 2).rows.__len__() == 1


# The loss and the training


def test_the_offline_loss_is_the_online_one_on_the_same_states(whole: TargetStore) -> None:
    config, student = collection(), network()
    fresh = FreshTargets(network(), teacher(), bank(), config=config, embed=embed, refresh_steps=100)
    states, ends = fresh.draw(4)
    shard, _ = collect_shard(network(), teacher(), bank(), config=config, number=0, embed=embed)
    records = whole.read(range(4))
    online = end_errors(student, states, ends, embed).mean()
    offline = end_errors(student, States.of(records, CPU), records["ends"], embed).mean()
    torch.testing.assert_close(offline, online, atol=1e-6, rtol=0)
    exact = ask(teacher(), shard.states, embed).ends
    torch.testing.assert_close(end_errors(student, shard.states, exact, embed).mean(), offline, atol=1e-3, rtol=1e-3)
    gradients = []
    for loss in (online, offline):
        student.zero_grad()
        loss.backward()
        gradients.append(student.proj_out.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_distance_of_one_step_ends(whole: TargetStore) -> None:
    records = whole.read()
    states = States.of(records, CPU)
    with torch.no_grad():
        context = context_of(network(), states.surroundings(embed(states.tokens)))
        noisy = states.noisy.float()
        velocities = velocity_in(network(), context, noisy, states.sigmas)
        by_hand = [
            float((noisy[row] - states.sigmas[row] * velocities[row] - records["ends"][row].float()).square().mean())
            for row in range(len(states))
        ]
        found = end_errors(network(), states, records["ends"], embed)
    torch.testing.assert_close(found, torch.tensor(by_hand), atol=1e-5, rtol=1e-5)


def test_batches_from_disk_are_those_from_the_device_and_held_out_records_are_never_drawn(whole: TargetStore) -> None:
    cached, read = (StoredTargets(whole, CPU, seed=3, held_out=2, cached_bytes=size) for size in (10**9, 0))
    drawn = []
    for _ in range(6):
        (states, ends), (again, same_ends) = cached.draw(5), read.draw(5)
        assert_same(states.tensors(), again.tensors())
        assert torch.equal(ends, same_ends)
        drawn += [row.tobytes() for row in ends.float().numpy()]
    assert len(set(drawn)) == 10
    assert all(drawn.count(row) == 3 for row in drawn), "every record as often in three passes"
    held = [row.tobytes() for row in cached.held_out()[1].float().numpy()]
    assert len(held) == 2
    assert not set(held) & set(drawn)
    with pytest.raises(UserError, match="12 are held out"):
        StoredTargets(whole, CPU, seed=0, held_out=12)


def test_online_states_are_those_of_the_student_as_it_is_then() -> None:
    student = network()
    fresh = FreshTargets(student, teacher(), bank(), config=collection(), embed=embed, refresh_steps=2)
    first, second = fresh.draw(4)[0], fresh.draw(4)[0]
    before = fresh.cost
    with torch.no_grad():
        student.proj_out.weight += 0.1
    third = fresh.draw(4)[0]

    def chunks(states: States) -> set[bytes]:
        return {row.tobytes() for row in states.noisy.float().numpy()}

    assert chunks(first) == chunks(second)
    assert not chunks(first) & chunks(third)
    assert fresh.cost.teacher_forwards > before.teacher_forwards > 0
    shard, _ = collect_shard(student, teacher(), bank(), config=collection(), number=1, embed=embed)
    assert chunks(shard.states) == chunks(third)


def test_training_brings_the_students_ends_to_the_teachers(whole: TargetStore) -> None:
    student, source = network(), StoredTargets(whole, CPU, seed=0, held_out=2)
    schedule = Schedule(steps=30, learning_rate=3e-3, warmup_steps=1)
    task = OfflineTask(
        student, source, embed, config=OfflineDistill(schedule=schedule, batch_size=5), held_out=source.held_out()
    )
    before = task.validate()["held_out_end_distance"]
    losses = []
    for _ in range(30):
        loss, scalars = task.loss(0.0)
        loss.backward()
        for optimizer in task.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        assert float(scalars["end_distance"]) == pytest.approx(losses[-1] ** 0.5)
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert task.validate()["held_out_end_distance"] < before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "dmd"}, "`kind` must be one of ode, visited"),
        ({"num_states": 0}, "`num_states`"),
        ({"states_per_rollout": 9}, "from 1 to 8, its states"),
        ({"kind": "ode", "states_per_rollout": 5}, "from 1 to 4, its states"),
        ({"return_share": 1.5}, "`return_share` must be from 0 to 1"),
    ],
)
def test_a_collection_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        collection(**changes)

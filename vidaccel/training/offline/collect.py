"""Collecting targets: shard after shard of states with the teacher's answers, each a function of its number alone.

Offline on-policy distillation asks the teacher once, at states of the student as it was then (arXiv 2604.13010; one
round of DAgger, arXiv 1011.0686). "ode" pairs come from the teacher's own ways from noise, as CausVid and Self-Forcing
begin their students (arXiv 2412.07772, 2506.08009).
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vidaccel.errors import check_choice, check_count, check_seed, check_share
from vidaccel.training.architecture import Transformer
from vidaccel.training.chunk_sampler import euler_sigmas
from vidaccel.training.device import seeded_generator
from vidaccel.training.offline.fingerprint import weights_digest
from vidaccel.training.offline.states import STORED, Embed, States
from vidaccel.training.offline.store import Cost, TargetStore, bytes_of, check_budget
from vidaccel.training.offline.teacher import Teacher, ask, trajectory
from vidaccel.training.offline.visits import RolloutPlan, noise_states, plan_rollouts, visit
from vidaccel.training.trip_bank import TripBank

Kind = Literal["ode", "visited"]
ENDS, VELOCITIES = "ends", "velocities"


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Which states are collected.

    kind: "ode": on the teacher's ways from pure noise, with real history; "visited": in the student's own rollouts.
    num_states: how many in all. states_per_rollout: of one rollout, or of one way from noise.
    own_chunks: chunks of a rollout after its real prefix. student_steps: noise levels of the student.
    return_share: rollouts that begin where the camera comes back. rollouts_per_shard: made and stored together.
    keep_velocities: store the teacher's velocity at the state too. max_bytes: of the store.
    Raises UserError for values that make no sense.
    """

    kind: Kind
    num_states: int
    states_per_rollout: int = 2
    own_chunks: int = 2
    student_steps: int = 4
    return_share: float = 0.6
    rollouts_per_shard: int = 64
    keep_velocities: bool = False
    max_bytes: int = 8 * 10**9
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_choice("kind", self.kind, get_args(Kind))
        for name in ("num_states", "own_chunks", "student_steps", "rollouts_per_shard", "max_bytes"):
            check_count(name, getattr(self, name), minimum=1)
        most = self.student_steps * self.num_own
        check_count("states_per_rollout", self.states_per_rollout, minimum=1, maximum=most, limit=", its states")
        check_share("return_share", self.return_share)

    @property
    def num_own(self) -> int:
        """Chunks of a rollout; a way from noise is one chunk."""
        return self.own_chunks if self.kind == "visited" else 1

    @property
    def num_rollouts(self) -> int:
        """In all."""
        return math.ceil(self.num_states / self.states_per_rollout)

    @property
    def num_shards(self) -> int:
        """In all."""
        return math.ceil(self.num_rollouts / self.rollouts_per_shard)

    def of_shards(self, number: int) -> "CollectConfig":
        """The same collection as long as `number` whole shards."""
        return replace(self, num_states=number * self.rollouts_per_shard * self.states_per_rollout)

    def to_dict(self) -> dict[str, Any]:
        """What tells one collection from another; its length and its budget may grow."""
        return {name: value for name, value in asdict(self).items() if name not in ("num_states", "max_bytes")}


@dataclass(frozen=True, kw_only=True)
class Targets:
    """States with the ends of the teacher's ways from them, (n, C, f, h, w) bf16, and velocities if they are kept."""

    states: States
    ends: Tensor
    velocities: Tensor | None = None

    def rows(self, rows: Tensor) -> "Targets":
        """Some of them."""
        velocities = None if self.velocities is None else self.velocities[rows]
        return Targets(states=self.states.rows(rows), ends=self.ends[rows], velocities=velocities)

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a store takes them."""
        more = {} if self.velocities is None else {VELOCITIES: self.velocities}
        return {**self.states.tensors(), ENDS: self.ends, **more}


def collect(
    student: Transformer,
    teacher: Teacher,
    bank: TripBank,
    *,
    folder: Path,
    config: CollectConfig,
    embed: Embed,
    on_progress: Callable[[int, int], None] | None = None,
) -> TargetStore:
    """Fill the store in `folder` up to `config.num_states`, beginning with the shards that are missing.

    A collection that was killed goes on where it was, to the same records. on_progress: called with the states that are
    there and all. Raises UserError, before any pass, where the states do not fit in `max_bytes`, where the store holds
    another collection, and where the teacher's steps do not stop at the student's levels.
    """
    teacher.check_levels(euler_sigmas(config.student_steps)[:-1])
    check_budget(config.num_states, _record_bytes(bank, config), config.max_bytes)
    settings = {**config.to_dict(), "clips": list(bank.latents.shape)}
    if config.kind == "visited":
        settings["student"] = weights_digest(student)
    store = TargetStore.begin(folder, teacher.fingerprint, settings)
    while store.num_shards < config.num_shards:
        began = time.monotonic()
        targets, cost = collect_shard(student, teacher, bank, config=config, number=store.num_shards, embed=embed)
        tensors = {name: tensor.cpu() for name, tensor in targets.tensors().items()}
        store.append(tensors, cost + Cost(seconds=time.monotonic() - began))
        if on_progress is not None:
            on_progress(len(store), max(config.num_states, len(store)))
    return store


def collect_shard(
    student: Transformer, teacher: Teacher, bank: TripBank, *, config: CollectConfig, number: int, embed: Embed
) -> tuple[Targets, Cost]:
    """The states of one shard and what the teacher says to them; the same for the same seed and number."""
    plan = shard_plan(bank, config, number)
    generator = seeded_generator(bank.latents.device, config.seed, number)
    if config.kind == "ode":
        targets, cost = _ways_from_noise(teacher, noise_states(bank, plan, generator), plan, config=config, embed=embed)
    else:
        made = visit(student, bank, plan, num_steps=config.student_steps, embed=embed, generator=generator)
        assert made.states is not None
        targets, cost = _answered(teacher, made.states, config=config, embed=embed)
        cost = replace(cost, student_forwards=made.num_forwards)
    order = torch.randperm(len(targets.states), device=generator.device, generator=generator)
    return targets.rows(order), cost


def _answered(teacher: Teacher, states: States, *, config: CollectConfig, embed: Embed) -> tuple[Targets, Cost]:
    answer = ask(teacher, states, embed)
    velocities = answer.velocities.to(STORED) if config.keep_velocities else None
    targets = Targets(states=states, ends=answer.ends.to(STORED), velocities=velocities)
    return targets, Cost(teacher_forwards=answer.num_forwards)


def shard_plan(bank: TripBank, config: CollectConfig, number: int) -> RolloutPlan:
    """The rollouts of shard `number`."""
    before = number * config.rollouts_per_shard
    return plan_rollouts(
        bank,
        random.Random(f"vidaccel {config.kind} states {config.seed} {number}"),
        num_rollouts=min(config.rollouts_per_shard, config.num_rollouts - before),
        own_chunks=config.num_own,
        num_steps=config.student_steps,
        states_per_rollout=config.states_per_rollout,
        return_share=config.return_share,
    )


def _ways_from_noise(
    teacher: Teacher, noise: States, plan: RolloutPlan, *, config: CollectConfig, embed: Embed
) -> tuple[Targets, Cost]:
    """Pairs on the teacher's own ways; all states of one way have the same end."""
    levels = euler_sigmas(config.student_steps)[:-1]
    way = trajectory(teacher, noise, levels, embed)
    states, ends, velocities = [], [], []
    for step, (sigma, noisy, velocity) in enumerate(way.stops):
        if rollouts := plan.kept.get((0, step)):
            rows = torch.tensor(rollouts, device=noisy.device)
            states.append(noise.at(noisy, noise.sigmas.new_full((len(noise),), sigma)).rows(rows))
            ends.append(way.ends[rows].to(STORED))
            velocities.append(velocity[rows].to(STORED))
    targets = Targets(
        states=States.joined(states),
        ends=torch.cat(ends),
        velocities=torch.cat(velocities) if config.keep_velocities else None,
    )
    return targets, Cost(teacher_forwards=way.num_forwards)


def _record_bytes(bank: TripBank, config: CollectConfig) -> int:
    """Bytes of one record, found on the states of one rollout."""
    plan = shard_plan(bank, CollectConfig(kind=config.kind, num_states=1, states_per_rollout=1), 0)
    states = noise_states(bank, plan, seeded_generator(bank.latents.device, 0))
    velocities = states.noisy if config.keep_velocities else None
    return bytes_of(Targets(states=states, ends=states.noisy, velocities=velocities).tensors())

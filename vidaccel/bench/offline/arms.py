"""The arms of the offline benchmark, and how each is trained: the same student, updates and batch, other states.

All arms go on from one student that was begun on the teacher's ways from noise.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_trainer import trained_student
from vidaccel.training.checkpoint import TrainingState
from vidaccel.training.loop import Schedule, train
from vidaccel.training.offline.collect import CollectConfig, collect
from vidaccel.training.offline.distill import FreshTargets, OfflineDistill, OfflineTask, StoredTargets, TargetSource
from vidaccel.training.offline.states import Embed
from vidaccel.training.offline.teacher import Teacher
from vidaccel.training.trip_bank import TripBank

Arm = Literal["a", "b", "c", "d"]
ARMS: dict[Arm, str] = {
    "a": "ways from noise only",
    "b": "and states it visited once",
    "c": "and states it visits as it learns",
    "d": "as b, with another teacher",
}
_WARMUP_STEPS = 20
_EMA_DECAY = 0.99
_LOG_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A student and what it took: passes of the teacher and of the student to collect, seconds of both parts."""

    student: Transformer
    updates: int
    loss: float
    teacher_forwards: int
    student_forwards: int
    collect_seconds: float
    train_seconds: float

    def costs(self) -> dict[str, float]:
        """Everything but the student, as a record has it."""
        names = ("updates", "loss", "teacher_forwards", "student_forwards", "collect_seconds", "train_seconds")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What all arms are trained with.

    teacher, other: the teacher of the beginning, and that of arm d. ways, visits: the collections of both kinds.
    refreshes: how often arm c collects, `visits.num_states` in all. folder: for targets and checkpoints.
    """

    teacher: Teacher
    other: Teacher
    bank: TripBank
    embed: Embed
    architecture: Mapping[str, Any]
    ways: CollectConfig
    visits: CollectConfig
    refreshes: int
    batch_size: int
    learning_rate: float
    folder: Path

    def student_folder(self, name: str) -> Path:
        """The checkpoint of an arm, or of "begun", that all go on from."""
        return self.folder / "students" / name

    def begun(self, student: Transformer, *, seconds: float, updates: int | None) -> Trained:
        """The student that all arms go on from: so many updates, or as many as fit in `seconds`."""
        schedule = self._schedule(updates=updates, seconds=seconds)
        return self._train(student, self._stored("ways", self.teacher, student, self.ways), schedule, name="begun")

    def arm(self, arm: Arm, begun: Transformer, *, updates: int) -> Trained:
        """One arm."""
        student, schedule = copy.deepcopy(begun), self._schedule(updates=updates)
        if arm == "a":
            trained = self._train(student, self._stored("ways", self.teacher, begun, self.ways), schedule, name=arm)
            return replace(
                trained, teacher_forwards=0, student_forwards=0, collect_seconds=0.0
            )  # paid at the beginning
        if arm == "c":
            return self._train(student, self._fresh(student, updates), schedule, name=arm)
        teacher = self.teacher if arm == "b" else self.other
        source = self._stored(f"visits-{teacher.history.name.replace(':', '-')}", teacher, begun, self.visits)
        return self._train(student, source, schedule, name=arm)

    def _fresh(self, student: Transformer, updates: int) -> FreshTargets:
        rollouts = max(1, self.visits.num_rollouts // self.refreshes)
        config = replace(self.visits, rollouts_per_shard=rollouts)
        steps = math.ceil(updates / self.refreshes)
        return FreshTargets(student, self.teacher, self.bank, config=config, embed=self.embed, refresh_steps=steps)

    def _stored(self, name: str, teacher: Teacher, student: Transformer, config: CollectConfig) -> StoredTargets:
        # A run that goes on may have encoded more clips or fewer than the one before: then its targets are others.
        folder = self.folder / "targets" / f"{name}-{len(self.bank.latents)}-clips"
        store = collect(student, teacher, self.bank, folder=folder, config=config, embed=self.embed)
        return StoredTargets(store, self.bank.latents.device, seed=config.seed)

    def _schedule(self, *, updates: int | None, seconds: float | None = None) -> Schedule:
        return Schedule(
            steps=updates,
            seconds=seconds if updates is None else None,
            learning_rate=self.learning_rate,
            warmup_steps=_WARMUP_STEPS,
            ema_decay=_EMA_DECAY,
            log_steps=_LOG_STEPS if updates is None else max(1, min(_LOG_STEPS, updates // 2)),
            num_validations=1,
        )

    def _train(self, student: Transformer, source: TargetSource, schedule: Schedule, *, name: str) -> Trained:
        """Train through the loop that all trainings share; the student of the result has the averaged weights."""
        folder, began, before = self.student_folder(name), time.monotonic(), source.cost
        task = OfflineTask(
            student, source, self.embed, config=OfflineDistill(schedule=schedule, batch_size=self.batch_size)
        )
        state = TrainingState(kind="causal", architecture={"transformer": dict(self.architecture)})
        records = [
            record
            for record in train(task, schedule, state=state, output=folder, began=began, reserve=0.0)
            if "loss" in record
        ]
        device = self.bank.latents.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = source.cost.seconds - before.seconds  # online targets are collected in between
        state, averaged = trained_student(folder)
        return Trained(
            student=averaged.to(device),
            updates=state.step,
            loss=records[-1]["loss"] if records else float("nan"),
            teacher_forwards=source.cost.teacher_forwards,
            student_forwards=source.cost.student_forwards,
            collect_seconds=source.cost.seconds,
            train_seconds=time.monotonic() - began - spent,
        )

"""Are targets at states that the student visited once worth as much as those at states it visits as it learns?

A teacher-forced student is the teacher, with many steps; the same weights with few steps are the student. All students
are begun on the teacher's ways from noise and then trained for as many updates on other states; what they become is
compared with what it cost.
"""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from vidaccel.bench.offline.arms import ARMS, Arm, Workshop
from vidaccel.bench.offline.measures import DRIFT_CHUNKS, Judge
from vidaccel.bench.offline.tables import offline_markdown, summarise_offline
from vidaccel.bench.shared.benchmark import Benchmark, BenchProgress, Tell, option
from vidaccel.catalog.models import EMBEDDED_TEACHER
from vidaccel.errors import UserError, check_amount, check_count
from vidaccel.machine.environment import describe_environment
from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_student import Donor
from vidaccel.training.causal_trainer import trained_student
from vidaccel.training.chunk_sampler import Sampler, shifted_sampler
from vidaccel.training.context_forcing_starts import load_beginning
from vidaccel.training.device import training_device
from vidaccel.training.offline.collect import CollectConfig
from vidaccel.training.offline.loading import embedding
from vidaccel.training.offline.states import HistoryView
from vidaccel.training.offline.teacher import Teacher
from vidaccel.training.return_visits import ReturnVisits
from vidaccel.training.trip_bank import build_trip_bank, training_clips

_FIRST_SEED = 1_400_000_000
_VISITS_SEED = 79_000_000
TEACHER, START, BEGUN = "teacher", "start", "begun"


@dataclass(frozen=True, kw_only=True)
class OfflineBench(Benchmark):
    """Finished arms are not trained again; the targets and the students are removed when all are finished."""

    name = "offline"

    model: str = option("Checkpoint of `vidaccel train causal`, or a model with a causal student.", EMBEDDED_TEACHER)
    weights: str = option("trained, toy, random, external: noted in the result.", "trained", recorded=False)
    arms: tuple[str, ...] = option(f"Of {', '.join(ARMS)}.", tuple(ARMS))
    train_seconds: float = option(
        "Training in all; the beginning and each arm get a part, and every arm as many updates as the beginning.", 110.0
    )
    updates: int | None = option("Instead, updates of the beginning and of each arm.", None)
    num_states: int = option("States that are asked about, of each kind.", 4096)
    refreshes: int = option("How often arm c collects, as many states in all.", 8)
    other_history: str = option("What the teacher of arm d is shown: own or last:N.", "last:3")
    teacher_steps: int = option("Euler steps of the teacher.", 16)
    student_steps: int = option("Steps of the student.", 4)
    batch_size: int = option("States of an update.", 64)
    learning_rate: float = option("Peak of the learning rate.", 5e-4)
    bank_clips: int = option("Clips to roll out from.", 2000)
    bank_seconds: float = option("Fewer, if encoding them takes longer.", 30.0)
    trips: int = option("Held-out trips.", 64)
    seed: int = option("Draws states and batches.", 0)
    budget_seconds: float | None = option("No arm begins after it.", None, recorded=False)

    def __post_init__(self) -> None:
        check_amount("budget_seconds", self.budget_seconds, optional=True)
        for name in ("num_states", "refreshes", "batch_size", "bank_clips", "trips"):
            check_count(name, getattr(self, name), minimum=1)
        check_count("updates", self.updates, minimum=1, optional=True)
        if not self.arms or set(self.arms) - set(ARMS) or len(set(self.arms)) < len(self.arms):
            raise UserError(f"`arms` must be some of {', '.join(ARMS)}; got {', '.join(self.arms) or 'none'}.")
        if not self.train_seconds > 0 or not self.learning_rate > 0:
            raise UserError("`train_seconds` and `learning_rate` must be above 0.")
        if HistoryView.parse(self.other_history).frames is None and "d" in self.arms:
            raise UserError("`other_history` must differ from what the student remembers; give last:N.")

    def run(self, *, on_progress: Tell = None) -> dict[str, Any]:
        began = time.monotonic()
        device = training_device(self.device)
        environment = describe_environment(device=device, weights=self.weights, model=self.model)
        results = self.results(self.protocol({"drift_chunks": DRIFT_CHUNKS}), environment)
        wanted = (TEACHER, START, BEGUN, *self.arms)
        if any(results.find(arm=name) is None for name in wanted):
            run = _Comparison(self, device)
            for done, name in enumerate(wanted):
                if results.find(arm=name) is not None or self._is_over(began):
                    continue
                if on_progress is not None:
                    on_progress(BenchProgress(done=done, total=len(wanted), label=ARMS.get(cast(Arm, name), name)))
                begun = results.find(arm=BEGUN)
                results.add({"arm": name, **run.record(name, updates=begun["updates"] if begun else None)})
        summary = results.finish(summarise_offline(results.records, trips=self.trips))
        self.write_table(offline_markdown(results.content))
        if all(results.find(arm=name) is not None for name in wanted):
            shutil.rmtree(self.output / "work", ignore_errors=True)
        return summary

    def _is_over(self, began: float) -> bool:
        return self.budget_seconds is not None and time.monotonic() - began > self.budget_seconds


class _Comparison:
    """Networks, clips and held-out trips, loaded once for all arms."""

    def __init__(self, config: OfflineBench, device: torch.device) -> None:
        self.config = config
        beginning = load_beginning(config.model, option="model")
        donor = replace(beginning.donor, transformer=beginning.student)
        for part in (donor.vae, donor.text_encoder, donor.transformer):
            part.to(device).eval().requires_grad_(False)
        self.donor: Donor = donor
        self.few_steps = shifted_sampler(config.student_steps, stochastic=True)
        self.teacher = Teacher(network=donor.transformer, num_steps=config.teacher_steps)
        seeds = range(_FIRST_SEED, _FIRST_SEED + config.bank_clips)
        trips = training_clips(seeds, num_chunks=DRIFT_CHUNKS + 3)
        bank = build_trip_bank(donor.vae, donor.tokenizer, trips=trips, seconds=config.bank_seconds)
        visits = ReturnVisits(donor, range(_VISITS_SEED, _VISITS_SEED + config.trips))
        self.judge = Judge.of(
            donor, self.teacher, visits, num_states=4 * config.trips, student_steps=config.student_steps
        )
        visited = CollectConfig(
            kind="visited", num_states=config.num_states, student_steps=config.student_steps, seed=config.seed
        )
        self.workshop = Workshop(
            teacher=self.teacher,
            other=replace(self.teacher, history=HistoryView.parse(config.other_history)),
            bank=bank,
            embed=embedding(donor),
            architecture=beginning.architecture,
            ways=replace(visited, kind="ode", states_per_rollout=config.student_steps),
            visits=visited,
            refreshes=config.refreshes,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            folder=config.output / "work",
        )

    def record(self, name: str, *, updates: int | None) -> dict[str, Any]:
        """Train what is to be trained, and measure it."""
        config = self.config
        if name == TEACHER:
            return self._measured(self.donor.transformer, sampler=shifted_sampler(config.teacher_steps))
        if name == START:
            return self._measured(self.donor.transformer, sampler=self.few_steps)
        if name == BEGUN:
            student = copy.deepcopy(self.donor.transformer).requires_grad_(True)
            seconds = config.train_seconds / (1 + len(config.arms))
            trained = self.workshop.begun(student, seconds=seconds, updates=config.updates)
        else:
            begun = trained_student(self.workshop.student_folder(BEGUN))[1].to(self.workshop.bank.latents.device)
            assert updates is not None
            trained = self.workshop.arm(cast(Arm, name), begun, updates=updates)
        measured = self._measured(trained.student, sampler=self.few_steps)
        return {**trained.costs(), **measured}

    def _measured(self, student: Transformer, *, sampler: Sampler) -> dict[str, Any]:
        began = time.monotonic()
        results = self.judge.results(student.eval(), sampler=sampler)
        rounded = {name: round(value, 5) for name, value in results.items()}
        return {**rounded, "measure_seconds": time.monotonic() - began}

"""Which of the few steps of a chunk can be left out, what that saves, and what it costs; decided by a rule given first.

A student of four steps makes five passes a chunk: one a step, and the clean one that remembers. A step that is left out
saves a fifth. Samplers are compared with the student as it is, on the same prompts, trips and noise: loss under the
many-step model, what the oracles read of subjects and places, and the difference of the latents. That of the student
under other noise says how much of the difference means nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vidaccel.bench.recall.recall import check_can_be_measured
from vidaccel.bench.recall.trips import RecallTrips
from vidaccel.bench.shared.benchmark import BenchProgress, ModelBenchmark, Tell, changed, option
from vidaccel.bench.skipping.loss import LATE_CHUNKS, Judge
from vidaccel.bench.skipping.measures import Arm, Held, measure_trips
from vidaccel.bench.skipping.summary import OTHER_NOISE, PLAIN, summarise_skipping
from vidaccel.bench.skipping.tables import save_skipping_plot, skipping_markdown
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.errors import UserError, check_count

SAMPLERS = (
    OTHER_NOISE,
    "skip:3",
    "skip:2",
    "skip:4",
    "steps:3",
    "skip:1",
    "skip:1+3",
    "skip:2+3",
    "skip:3+4@0.15",
    "skip:2+3+4",
)


@dataclass(frozen=True, kw_only=True)
class SkippingBench(ModelBenchmark):
    """The protocol; samplers that the result file has are not measured again, and others may be added later."""

    name = "skipping"

    model: str = changed(ModelBenchmark, "model", EMBEDDED_STUDENT)
    num_prompts: int = option("Unseen prompts that are held.", 8)
    num_chunks: int = option("Chunks that each is held for.", 12)
    num_trips: int = option("Unseen trips, for returns and for own videos.", 8)
    samplers: tuple[str, ...] = option(
        "What is compared with the student: skip:STEPS, steps:N, euler:N, or other-noise.", SAMPLERS, recorded=False
    )
    seed: int = option("Draws prompts, trips and noise.", 0)

    def __post_init__(self) -> None:
        for name, least in (("num_prompts", 2), ("num_trips", 2), ("num_chunks", LATE_CHUNKS)):
            check_count(name, getattr(self, name), minimum=least)
        if len({PLAIN, *self.samplers}) != len(self.samplers) + 1:
            raise UserError(f"`samplers` must name different ones beside the student; got {', '.join(self.samplers)}.")
        for arm in self.arms:
            if arm.sampler.is_euler:
                raise UserError(f"Trips are sampled as the student is; got {arm.text}.")

    @property
    def arms(self) -> list[Arm]:
        """The student, and what it is compared with."""
        return [Arm(text=text) for text in (PLAIN, *self.samplers)]

    def run(self, *, pipe: Any = None, on_progress: Tell = None) -> dict[str, Any]:
        pipe = self.loaded_student(pipe)
        check_can_be_measured(pipe)
        for arm in self.arms:
            arm.sampler.student(pipe)
        judge = Judge(self.device)
        judge.check(pipe)
        results = self.results(self.student_protocol(pipe), self.environment(pipe))
        measured = _Measures(self, pipe, judge)
        for done, arm in enumerate(self.arms):
            if results.find(sampler=arm.text) is None:
                if on_progress is not None:
                    on_progress(BenchProgress(done=done, total=len(self.arms), label=arm.text))
                results.add({"sampler": arm.text, **measured(arm)})
        summary = results.finish({"samplers": summarise_skipping(results.records)})
        self.write_table(skipping_markdown(results.content))
        save_skipping_plot(self.path("png"), results.content)
        return summary


class _Measures:
    """What all samplers are measured on."""

    def __init__(self, bench: SkippingBench, pipe: Any, judge: Judge) -> None:
        count, seed = bench.num_prompts, bench.seed
        self._held = Held(pipe, judge, count=count, seed=seed, num_chunks=bench.num_chunks)
        cell = Arm(text=PLAIN).cell("return")
        self._trips = RecallTrips(pipe, cell, count=bench.num_trips, seed=seed)

    def __call__(self, arm: Arm) -> dict[str, Any]:
        began = time.perf_counter()
        found: dict[str, Any] = {"held": self._held.measure(arm), "return": [], "own": []}
        if arm.has_trips:
            found |= {
                "return": measure_trips(self._trips, arm, "return"),
                "own": measure_trips(self._trips, arm, "own"),
            }
        return found | {"seconds": round(time.perf_counter() - began, 2)}

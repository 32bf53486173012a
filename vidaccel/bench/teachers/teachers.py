"""Does the memory of the teacher decide whether a student remembers? Long against short teachers, all else equal.

Context Forcing (arXiv 2602.06028) says that a student which is distilled by a teacher of short clips has no reason to
use its long memory, and that one whose teacher is given the student's memory has. Generators start without recall
(`context_forcing_starts`) and are distilled for equal numbers of updates by the same teacher, which sees all that the
student remembers (long) or the last chunk only (short), and so does the critic; recall of the last weights is compared
on held-out trips. What counts as success is in `rule` and was written down first. Beside it, whether a student that
recalls keeps it (`keeps`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.benchmark import Benchmark, BenchProgress, Tell, option
from vidaccel.bench.shared.records import ResultFile
from vidaccel.bench.teachers.arms import Ground, measured, run_arm, starts_of
from vidaccel.bench.teachers.keeps import AS_IS, keeping
from vidaccel.bench.teachers.merge import copy_pictures, merged_results
from vidaccel.bench.teachers.rule import decide
from vidaccel.bench.teachers.tables import save_teachers_plot, teachers_markdown
from vidaccel.catalog.models import EMBEDDED_TEACHER
from vidaccel.errors import UserError, check_amount, check_count, check_seed
from vidaccel.machine.environment import describe_environment, without_folders
from vidaccel.training.context_forcing_config import ContextForcingConfig, MatchingRule, RolloutRule
from vidaccel.training.context_forcing_networks import compile_blocks
from vidaccel.training.context_forcing_starts import Forcing, load_beginning
from vidaccel.training.context_forcing_trainer import training_bank
from vidaccel.training.device import training_device
from vidaccel.training.return_visits import ReturnVisits
from vidaccel.training.self_rollout import PromptTable

STARTS = ("ignore", "short")
VIEWS = ("long", "short")
_TRIP_SEED = 79_000_000
_SPARE = 1.15  # an arm is begun if this many times the seconds of the longest one are left


@dataclass(frozen=True, kw_only=True)
class TeachersBench(Benchmark):
    """Finished arms are not run again; the students that they start from are kept in `starts` of the output."""

    name = "teachers"

    init: str = option("The teacher-forced student that teaches: a checkpoint, a folder or a name.", EMBEDDED_TEACHER)
    base: str = option("What the starts begin from: a model without recall.", "wan-tiny")
    starts: tuple[str, ...] = option(
        "Of ignore, short, which cannot recall, and as-is, which can: does it keep that?", STARTS, recorded=False
    )
    seeds: tuple[int, ...] = option("Training seeds of every arm.", (0, 1, 2), recorded=False)
    updates: int = option("Updates of the generator in every arm.", 250)
    start_steps: int = option("Steps of teacher forcing for every start.", 450)
    max_chunks: int = option("Most chunks of a rollout in training.", 2)
    shift: float = option("Of the noise levels of the four steps, in training and when measured.", 3.0)
    num_trips: int = option("Held-out trips.", 256)
    away_chunks: int = option("Chunks that the camera stays away on them.", 6)
    bank_clips: int = option("Clips to train on.", 2560)
    batch_size: int = option("Rollouts an iteration.", 64)
    num_chunks: int = option("Chunks of a clip.", 15)
    curve_updates: int = option("Measure recall on some trips after every so many updates.", 50)
    compile: bool = option("Compile the blocks first; pays on a GPU.", False)
    budget_seconds: float | None = option("No arm begins that would not end within it.", None, recorded=False)
    merge: tuple[str, ...] = option(
        "Run nothing; decide from the arms of these output folders, which runs side by side wrote.", (), recorded=False
    )

    def __post_init__(self) -> None:
        check_amount("budget_seconds", self.budget_seconds, optional=True)
        if unknown := sorted(set(self.starts) - {*STARTS, AS_IS}):
            raise UserError(f"`starts` may name {', '.join((*STARTS, AS_IS))}; got {', '.join(unknown)}.")
        if not self.starts or not self.seeds:
            raise UserError("`starts` and `seeds` must not be empty.")
        for seed in self.seeds:
            check_seed(seed)
        counts = ("updates", "start_steps", "num_trips", "away_chunks", "bank_clips", "batch_size", "curve_updates")
        for name in counts:
            check_count(name, getattr(self, name), minimum=1)
        check_amount("shift", self.shift)

    def run(self, *, on_progress: Tell = None) -> dict[str, Any]:
        if self.merge:
            folders = [Path(folder) for folder in self.merge]
            results = merged_results(self.path("json"), [folder / self.path("json").name for folder in folders])
            copy_pictures(folders, self.output / "pictures")
            return self._finish(results)
        began = time.monotonic()
        device = training_device(self.device)
        environment = describe_environment(device=device, weights="trained", model=without_folders(self.init))
        results = self.results(
            self.protocol({name: without_folders(getattr(self, name)) for name in ("init", "base")}), environment
        )
        tell = on_progress or (lambda progress: None)
        waiting = [arm for arm in self.arms if results.find(kind="arm", **arm) is None]
        if waiting:
            tell(BenchProgress(done=0, total=len(self.arms), label="clips"))
            _Comparison(self, results, device=device, began=began).run(waiting, tell)
        return self._finish(results)

    @property
    def arms(self) -> list[dict[str, Any]]:
        """Start, seed and view of every arm; pairs follow one another, seed after seed."""
        return [
            {"seed": seed, "start": start, "view": view}
            for seed in self.seeds
            for start in self.starts
            for view in VIEWS
        ]

    def config(self, seed: int, view: Any) -> ContextForcingConfig:
        """The distillation of an arm; nothing but the view differs within a pair."""
        return ContextForcingConfig(
            init=self.init,
            updates=self.updates,
            stage="2",
            seed=seed,
            device=self.device,
            rollout=RolloutRule(max_chunks=self.max_chunks, layouts="uniform", shift=self.shift),
            matching=MatchingRule(view=view, error_share=0.0),
            batch_size=self.batch_size,
            num_chunks=self.num_chunks,
            bank_clips=self.bank_clips,
            compile=self.compile,
        )

    def _finish(self, results: ResultFile) -> dict[str, Any]:
        arms = [record for record in results.records if record["kind"] == "arm"]
        starts = [start for start in STARTS if any(arm["start"] == start for arm in arms)]
        claims = [decide(arms, start=start) for start in starts]
        summary = results.finish({"claims": claims, "keeping": keeping(arms)})
        self.write_table(teachers_markdown(results.content))
        save_teachers_plot(self.path("png"), results.content)
        return summary


class _Comparison:
    """The arms that are left, with what they share."""

    def __init__(self, bench: TeachersBench, results: ResultFile, *, device: Any, began: float) -> None:
        self.bench, self.results, self._began = bench, results, began
        beginning = load_beginning(bench.init)
        for network in (beginning.student, beginning.donor.vae, beginning.donor.text_encoder):
            network.to(device).eval()
        if bench.compile:
            compile_blocks(beginning.student)
        settings = bench.config(0, "long")
        bank = training_bank(settings, beginning)
        trips = range(_TRIP_SEED, _TRIP_SEED + bench.num_trips)
        visits = ReturnVisits(
            beginning.donor,
            trips,
            batch_size=bench.batch_size,
            text=settings.text,
            away_chunks=bench.away_chunks,
        )
        self.ground = Ground(
            beginning=beginning,
            bank=bank,
            prompts=PromptTable(bank, beginning.donor.text_encoder, length=settings.text),
            visits=visits,
            sampler=settings.rollout.sampler,
            device=device,
            compile=bench.compile,
        )
        self._starts: dict[int, dict[str, Any]] = {}
        self._longest = 0.0

    def run(self, waiting: list[dict[str, Any]], tell: Any) -> None:
        """Measure the teacher, then every arm for which there is time, each recorded when it ends."""
        if self.results.find(kind="teacher") is None:
            ceiling = {name: list(values) for name, values in vars(self.ground.visits.ceiling()).items()}
            cells = measured(self.ground.beginning.student, self.ground)
            self.results.add({"kind": "teacher", "cells": cells, "ceiling": ceiling})
        for arm in waiting:
            left = None if self.bench.budget_seconds is None else self.bench.budget_seconds - self._elapsed()
            if left is not None and left < _SPARE * self._longest:
                return
            done = len([record for record in self.results.records if record["kind"] == "arm"])
            label = f"{arm['start']}, {arm['view']}, seed {arm['seed']}"
            tell(BenchProgress(done=done, total=len(self.bench.arms), label=label))
            began = time.monotonic()
            self.results.add({"kind": "arm", **arm, **self._measured(arm)})
            self._longest = max(self._longest, time.monotonic() - began)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _measured(self, arm: dict[str, Any]) -> dict[str, Any]:
        seed, start = arm["seed"], arm["start"]
        if seed not in self._starts:
            self._starts = {seed: self._new_starts(seed)}
        picture = self.bench.output / "pictures" / f"{start}-{arm['view']}-{seed}.png"
        config = self.bench.config(seed, arm["view"])
        return run_arm(
            self.ground,
            self._starts[seed][start],
            config,
            curve_updates=self.bench.curve_updates,
            picture=picture,
        )

    def _new_starts(self, seed: int) -> dict[str, Any]:
        """The starts of a seed, measured once; what begins as the teacher was measured as it."""
        given = {AS_IS: self.ground.beginning.student}
        ignorant = [name for name in self.bench.starts if name not in given]
        if not ignorant:
            return given
        forcing = Forcing(steps=self.bench.start_steps, batch_size=self.bench.batch_size, seed=seed)
        starts = starts_of(self.ground, self.bench.base, forcing, kept=self.bench.output / "starts")
        for name in ignorant:
            if self.results.find(kind="start", seed=seed, start=name) is None:
                cells = measured(starts[name], self.ground)
                self.results.add({"kind": "start", "seed": seed, "start": name, "cells": cells})
        return starts | given

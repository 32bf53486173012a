"""EasyCache against the caches diffusers has, and against choices of steps that look at nothing: equal executed work.

For every prompt and seed the plain video is made first and each method's video is compared with it, frame by frame as
decoded. What a method ran is counted in operations of the transformer's blocks, so that caches inside the model and
around it stand on one scale. Those figures do not depend on what else the machine does, so processes may share them out
(`shard`). Times do: they are taken in a pass of its own, one video at a time, and never by a shard.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidaccel.bench.caching.builtin_caches import calibrate_mag_cache
from vidaccel.bench.caching.cache_summary import summarise_caches
from vidaccel.bench.caching.cache_tables import caches_markdown
from vidaccel.bench.caching.comparison import CacheComparison
from vidaccel.bench.caching.methods import (
    Method,
    builtin_methods,
    easycache_methods,
    fewer_steps_methods,
    known_predictors,
    plain_again,
    random_methods,
    uniform_methods,
)
from vidaccel.bench.caching.passes import FidelityPass, MethodRunner, TimingPass
from vidaccel.bench.shared.benchmark import Tell, changed, option
from vidaccel.catalog.registry import spec_of
from vidaccel.errors import UserError
from vidaccel.generation.request import GenerationRequest, request_for
from vidaccel.video.metrics import METRICS
from vidaccel.world import unseen_prompts

RECORD_KEY = ("kind", "prompt", "seed", "method")
_SECONDS_BETWEEN_WRITES = 5.0


def _shard(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal()):
        raise UserError(f"`shard` must be i/n, such as 1/8, got {text!r}.")
    return int(first), int(second)


@dataclass(frozen=True, kw_only=True)
class CachesBench(CacheComparison):
    """The protocol, and how much of it this run does.

    Records of shards found in `output` are taken in, and a shard takes in those of caches.json.
    """

    name = "caches"

    seeds: tuple[int, ...] = changed(CacheComparison, "seeds", (0, 1))
    predictors: tuple[str, ...] = changed(CacheComparison, "predictors", known_predictors())
    fixed_predictors: tuple[str, ...] = option(
        "The same of uniform and random reuse, which look at nothing.", ("transformation",), recorded=False
    )
    thresholds: tuple[float, ...] = changed(CacheComparison, "thresholds", (0.01, 0.025, 0.05, 0.1, 0.15))
    uniform_intervals: tuple[int, ...] = changed(CacheComparison, "uniform_intervals", (2, 3, 4, 8))
    fewer_steps: tuple[int, ...] = changed(CacheComparison, "fewer_steps", (34, 25, 20, 16))
    metrics: tuple[str, ...] = changed(CacheComparison, "metrics", tuple(name for name in METRICS if name != "lpips"))
    methods: tuple[str, ...] = option("Only methods whose names contain one of these texts.", (), recorded=False)
    shard: tuple[int, int] | None = option(
        "i/n: this process makes every n-th video, untimed, into a file of its own.", None, recorded=False, read=_shard
    )
    timing_prompts: int = option("Prompts on which methods are timed.", 2, recorded=False)
    time_limit: float | None = option(
        "Seconds after which no further video begins; 0 only writes the tables.", None, recorded=False
    )

    def __post_init__(self) -> None:
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise UserError(f"`shard` must be i/n with i from 1 to n, got {self.shard[0]}/{self.shard[1]}.")
        if self.timing_prompts < 0 or (self.time_limit is not None and not self.time_limit >= 0):
            raise UserError("`timing_prompts` and `time_limit` must be at least 0.")
        super().__post_init__()
        if missing := set(self.fixed_predictors) - set(self.predictors):
            raise UserError(f"`fixed_predictors` names {', '.join(sorted(missing))}, which `predictors` leaves out.")
        if not self.chosen_methods():
            raise UserError(
                f"`methods` {', '.join(self.methods)} is in no method's name, such as: {plain_again().name}."
            )

    def all_methods(self) -> list[Method]:
        methods = [plain_again(), *fewer_steps_methods(self.fewer_steps)]
        for predictor in self.predictors:
            methods += easycache_methods(predictor, self.thresholds, warmup_steps=self.warmup_steps)
        for predictor in self.fixed_predictors:
            methods += uniform_methods(predictor, self.uniform_intervals, warmup_steps=self.warmup_steps)
            methods += random_methods(predictor, self.thresholds)
        return [*methods, *builtin_methods(warmup_steps=self.warmup_steps)]

    def chosen_methods(self) -> list[Method]:
        """The methods this run measures: those of `methods`, and what a random choice among them has to match."""
        everything = self.all_methods()
        chosen = [one for one in everything if not self.methods or any(text in one.name for text in self.methods)]
        matched = {one.as_many_as for one in chosen}
        return [one for one in everything if one in chosen or one.name in matched]

    def run(self, *, pipe: Any = None, on_progress: Tell = None) -> dict[str, Any]:
        deadline = None if self.time_limit is None else time.monotonic() + self.time_limit
        pipe = self.loaded(pipe)
        # Whole rounds over the prompts, one per seed: a run that is cut short has every method on the same prompts.
        requests = [request for seed in self.seeds for request in self.requests((seed,))]
        calibration = self._calibration_request()
        settled = self.settled(requests[0]) | {"calibration_prompt": calibration.prompt}
        results = self.results(
            self.protocol(settled), self.environment(pipe), seconds_between_writes=_SECONDS_BETWEEN_WRITES
        )
        others = self.output.glob("caches.json" if self.shard is not None else "caches-*-of-*.json")
        for path in sorted(others):
            results.take(path, key=RECORD_KEY)
        runner = MethodRunner(
            pipe=pipe,
            results=results,
            calibrate=lambda: calibrate_mag_cache(pipe, calibration),
            warmup_steps=self.warmup_steps,
        )
        methods = self.chosen_methods()
        part = requests if self.shard is None else requests[self.shard[0] - 1 :: self.shard[1]]
        fidelity = FidelityPass(runner=runner, methods=methods, requests=part, metrics=self.metrics)
        timing = TimingPass(runner=runner, methods=methods, requests=requests[: self.timing_prompts])
        # What shards have made is timed before this process makes what they left: a limit must not cost the times.
        passes: list[FidelityPass | TimingPass] = [fidelity] if self.shard is not None else [timing, fidelity, timing]
        try:
            for one in passes:
                one.run(deadline=deadline, on_progress=on_progress)
        finally:
            results.write()
        summary = results.finish(summarise_caches(results.records))
        if self.shard is None:
            self.write_table(caches_markdown(results.content))
            self.write_plot(results)
        return summary

    def path(self, suffix: str) -> Path:
        part = "" if self.shard is None else f"-{self.shard[0]}-of-{self.shard[1]}"
        return self.output / f"{self.name}{part}.{suffix}"

    def _calibration_request(self) -> GenerationRequest:
        """A prompt of the world that the benchmark does not measure."""
        texts = (prompt.text for count in (len(self.texts) + 1, 2000) for prompt in unseen_prompts(count))
        text = next(text for text in texts if text not in self.texts)
        return request_for(spec_of(self.model).defaults, text, seed=1000 * len(self.seeds) + 999, **self.sizes)

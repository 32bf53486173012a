"""EasyCache against the caches diffusers has, and against choices of steps that look at nothing: equal executed work.

For every prompt and seed the plain video is made first and each method's video is compared with it, frame by frame as
decoded. What a method ran is counted in operations of the transformer's blocks, so that caches inside the model and
around it stand on one scale. Those figures do not depend on what else the machine does, so processes may share them out
(`shard`). Times do: they are taken in a pass of its own, one video at a time, and never by a shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vidaccel.bench.builtin_caches import calibrate_mag_cache
from vidaccel.bench.cache_run import FidelityPass, MethodRunner, TimingPass
from vidaccel.bench.cache_summary import summarise_caches
from vidaccel.bench.cache_tables import caches_markdown
from vidaccel.bench.methods import (
    Method,
    builtin_methods,
    easycache_methods,
    fewer_steps_methods,
    known_predictors,
    plain_again,
    random_methods,
    uniform_methods,
)
from vidaccel.bench.plots import save_pareto
from vidaccel.bench.progress import BenchProgress
from vidaccel.bench.records import ResultFile
from vidaccel.bench.requests import bench_requests
from vidaccel.catalog.registry import EMBEDDED_MODEL, spec_of
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.files.text import write_text
from vidaccel.generation.generate import GenerationRequest, request_for
from vidaccel.generation.loading import load_pipeline
from vidaccel.machine.environment import describe_environment, hardware_line, without_folders
from vidaccel.video.metrics import METRICS
from vidaccel.world import unseen_prompts

RECORD_KEY = ("kind", "prompt", "seed", "method")
_SECONDS_BETWEEN_WRITES = 5.0
_DEFAULTS = EasyCacheConfig()


@dataclass(frozen=True, kw_only=True)
class CachesBenchConfig:
    """The protocol, and how much of it this run does. A setting that is None is the model's own default.

    output: folder for caches.json, caches.md and caches.png. Records of shards found there are taken in, and a shard
        takes in those of caches.json.
    prompts: None takes `num_prompts` of the world's unseen prompts.
    seeds: each prompt is made once per seed; the noise seed is 1000 x seed + the prompt's number.
    predictors: reuse rules of EasyCache, a family each.
    fixed_predictors: reuse rules of the choices of steps that look at nothing (every k-th, random).
    thresholds, uniform_intervals, fewer_steps: one method each.
    methods: of these only the ones whose name contains one of the texts; not part of the protocol, as are:
    shard: (i, n): every n-th video from the i-th (from 1) on, into a file of its own, without times.
    timing_prompts: prompts on which every method is timed.
    time_limit: seconds after which no further video begins; what is there is summarised. 0 only writes the tables.
    """

    output: Path
    model: str = EMBEDDED_MODEL
    prompts: tuple[str, ...] | None = None
    num_prompts: int = 32
    seeds: tuple[int, ...] = (0, 1)
    predictors: tuple[str, ...] = known_predictors()
    fixed_predictors: tuple[str, ...] = ("transformation",)
    thresholds: tuple[float, ...] = (0.01, 0.025, 0.05, 0.1, 0.15)
    warmup_steps: int = _DEFAULTS.warmup_steps
    uniform_intervals: tuple[int, ...] = (2, 3, 4, 8)
    fewer_steps: tuple[int, ...] = (34, 25, 20, 16)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    metrics: tuple[str, ...] = tuple(name for name in METRICS if name != "lpips")
    methods: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    timing_prompts: int = 2
    time_limit: float | None = None
    weights: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.prompts is not None and not self.prompts:
            raise UserError("`prompts` is empty; give at least one, or None for the world's unseen prompts.")
        if not 1 <= self.num_prompts <= 1000 or not self.seeds:
            raise UserError(f"`num_prompts` must be from 1 to 1000 and `seeds` not empty; got {self.num_prompts}.")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise UserError(f"`shard` must be i/n with i from 1 to n, got {self.shard[0]}/{self.shard[1]}.")
        if self.timing_prompts < 0 or (self.time_limit is not None and not self.time_limit >= 0):
            raise UserError("`timing_prompts` and `time_limit` must be at least 0.")
        for name in ("predictors", "fixed_predictors"):
            if unknown := set(getattr(self, name)) - set(known_predictors()):
                raise UserError(f"`{name}` may name {', '.join(known_predictors())}; got {', '.join(sorted(unknown))}.")
        if missing := set(self.fixed_predictors) - set(self.predictors):
            raise UserError(f"`fixed_predictors` names {', '.join(sorted(missing))}, which `predictors` leaves out.")
        if "psnr" not in self.metrics or set(self.metrics) - set(METRICS):
            raise UserError(f"`metrics` must contain psnr and may name {', '.join(METRICS)}; got {self.metrics}.")
        for name in ("prompts", "seeds", "predictors", "thresholds", "uniform_intervals", "fewer_steps"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise UserError(f"`{name}` has a value twice; each is measured once.")
        if any(interval < 2 for interval in self.uniform_intervals) or any(count < 1 for count in self.fewer_steps):
            raise UserError("`uniform_intervals` must be at least 2 and `fewer_steps` at least 1.")
        try:
            chosen = self.chosen_methods()
        except ValueError as error:  # a threshold or warm-up that EasyCacheConfig does not take
            raise UserError(str(error)) from error
        if not chosen:
            raise UserError(
                f"`methods` {', '.join(self.methods)} is in no method's name, such as: {plain_again().name}."
            )

    def all_methods(self) -> list[Method]:
        """All methods of the protocol in the order they run for a prompt."""
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


def run_caches_bench(
    config: CachesBenchConfig,
    *,
    pipe: Any = None,
    on_progress: Callable[[BenchProgress], None] | None = None,
) -> dict[str, Any]:
    """Measure, write the files into `config.output`, and return the summary.

    pipe: a loaded pipeline to use instead of loading `config.model`. An interrupted or limited run continues.
    """
    deadline = None if config.time_limit is None else time.monotonic() + config.time_limit
    spec = spec_of(config.model)
    pipe = load_pipeline(config.model, device=config.device, dtype=config.dtype) if pipe is None else pipe
    weights = spec.weights if config.weights is None else config.weights
    requests = _requests(config)
    results = ResultFile(
        _path(config),
        protocol=_protocol(config, requests[0]),
        environment=describe_environment(
            device=torch.device(pipe._execution_device), weights=weights, model=config.model
        ),
        seconds_between_writes=_SECONDS_BETWEEN_WRITES,
    )
    others = config.output.glob("caches.json" if config.shard is not None else "caches-*-of-*.json")
    for path in sorted(others):
        results.take(path, key=RECORD_KEY)
    runner = MethodRunner(
        pipe=pipe,
        results=results,
        calibrate=lambda: calibrate_mag_cache(pipe, _calibration_request(config)),
        warmup_steps=config.warmup_steps,
    )
    methods = config.chosen_methods()
    part = requests if config.shard is None else requests[config.shard[0] - 1 :: config.shard[1]]
    fidelity = FidelityPass(runner=runner, methods=methods, requests=part, metrics=config.metrics)
    timing = TimingPass(runner=runner, methods=methods, requests=requests[: config.timing_prompts])
    # What shards have made is timed before this process makes what they left: a limit must not cost the times.
    passes: list[FidelityPass | TimingPass] = [fidelity] if config.shard is not None else [timing, fidelity, timing]
    try:
        for one in passes:
            one.run(deadline=deadline, on_progress=on_progress)
    finally:
        results.write()
    results.summary = summarise_caches(results.records)
    results.write()
    if config.shard is None:
        _write_reports(config, results)
    return results.summary


def _path(config: CachesBenchConfig) -> Path:
    name = "caches.json" if config.shard is None else f"caches-{config.shard[0]}-of-{config.shard[1]}.json"
    return config.output / name


def _prompts(config: CachesBenchConfig) -> tuple[str, ...]:
    if config.prompts is not None:
        return config.prompts
    return tuple(prompt.text for prompt in unseen_prompts(config.num_prompts))


def _requests(config: CachesBenchConfig) -> list[GenerationRequest]:
    """Whole rounds over the prompts, one per seed: a run that is cut short has every method on the same prompts."""
    return [
        request
        for seed in config.seeds
        for request in bench_requests(spec_of(config.model).defaults, _prompts(config), seeds=(seed,), **_sizes(config))
    ]


def _calibration_request(config: CachesBenchConfig) -> GenerationRequest:
    """A prompt of the world that the benchmark does not measure."""
    used = set(_prompts(config))
    texts = (prompt.text for prompt in unseen_prompts(len(used) + 1))
    text = next(text for text in (*texts, *(prompt.text for prompt in unseen_prompts(2000))) if text not in used)
    return request_for(spec_of(config.model).defaults, text, seed=1000 * len(config.seeds) + 999, **_sizes(config))


def _sizes(config: CachesBenchConfig) -> dict[str, Any]:
    names = ("num_inference_steps", "guidance_scale", "num_frames", "height", "width")
    return {name: getattr(config, name) for name in names}


def _protocol(config: CachesBenchConfig, first: GenerationRequest) -> dict[str, Any]:
    return {
        "benchmark": "caches",
        "model": without_folders(config.model),
        "prompts": list(_prompts(config)),
        "num_prompts": len(_prompts(config)),
        "seeds": list(config.seeds),
        "methods": [method.name for method in config.all_methods()],
        "warmup_steps": config.warmup_steps,
        "calibration_prompt": _calibration_request(config).prompt,
        **{name: getattr(first, name) for name in _sizes(config)},
        "metrics": list(config.metrics),
        "dtype": config.dtype,
    }


def _write_reports(config: CachesBenchConfig, results: ResultFile) -> None:
    content = {
        "protocol": results.protocol,
        "environments": results.environments,
        "summary": results.summary,
        "records": results.records,
    }
    write_text(config.output / "caches.md", caches_markdown(content))
    curves = [method for method in results.summary["methods"] if method["family"] != "repeat"]
    caption = hardware_line(results.environments[-1]) if results.environments else "nothing measured yet"
    save_pareto(config.output / "caches.png", curves, caption=caption)

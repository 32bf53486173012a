"""EasyCache against the plain run and against simpler ways to save forwards: fixed protocol, one process.

For every prompt and seed the plain video is made first and each method's video is compared with it, frame by frame as
decoded. Time is compared with the plain run of the same prompt in the same session. The result is written after every
video; a second run with the same settings continues, and makes the plain video of an unfinished prompt again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vidaccel.bench.methods import (
    Method,
    easycache_methods,
    fewer_steps_methods,
    known_predictors,
    plain_again,
    uniform_methods,
)
from vidaccel.bench.plots import save_pareto
from vidaccel.bench.progress import BenchProgress
from vidaccel.bench.records import ResultFile
from vidaccel.bench.requests import bench_requests, decision_letters
from vidaccel.bench.summary import METRIC_FIELDS, ratios, summarise_methods
from vidaccel.bench.tables import easycache_markdown
from vidaccel.catalog.registry import EMBEDDED_MODEL, spec_of
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.files.text import json_number, write_text
from vidaccel.generation.generate import Generation, GenerationRequest, generate
from vidaccel.generation.loading import load_pipeline
from vidaccel.machine.environment import describe_environment, hardware_line, without_folders
from vidaccel.video.metrics import METRICS, compare_videos
from vidaccel.world import unseen_prompts

_DEFAULTS = EasyCacheConfig()


@dataclass(frozen=True, kw_only=True)
class EasyCacheBenchConfig:
    """The protocol. A setting that is None is the model's own default.

    output: folder for easycache.json, easycache.md and easycache.png.
    prompts: None takes `num_prompts` of the world's unseen prompts.
    seeds: each prompt is made once per seed; the noise seed is 1000 x seed + the prompt's number.
    predictors: reuse rules of EasyCache and of the uniform baseline.
    thresholds, uniform_intervals, fewer_steps: one method each (per rule for the former two).
    metrics: of `vidaccel.video.metrics.METRICS`; one that this machine cannot take is left out of the tables.
    weights: "trained", "toy", "random" or "external"; None takes what the model's folder or the registry says.
    """

    output: Path
    model: str = EMBEDDED_MODEL
    prompts: tuple[str, ...] | None = None
    num_prompts: int = 32
    seeds: tuple[int, ...] = (0,)
    predictors: tuple[str, ...] = ("transformation", "output")
    thresholds: tuple[float, ...] = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4)
    warmup_steps: int = _DEFAULTS.warmup_steps
    uniform_intervals: tuple[int, ...] = (2, 3, 4, 6, 12)
    fewer_steps: tuple[int, ...] = (40, 30, 25, 20, 15)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    metrics: tuple[str, ...] = METRICS
    weights: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.prompts is not None and not self.prompts:
            raise UserError("`prompts` is empty; give at least one, or None for the world's unseen prompts.")
        if not 1 <= self.num_prompts <= 1000 or not self.seeds:
            raise UserError(f"`num_prompts` must be from 1 to 1000 and `seeds` not empty; got {self.num_prompts}.")
        for name in ("prompts", "seeds", "predictors", "thresholds", "uniform_intervals", "fewer_steps"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise UserError(f"`{name}` has a value twice; each is measured once.")
        if unknown := set(self.predictors) - set(known_predictors()):
            raise UserError(f"`predictors` may name {', '.join(known_predictors())}; got {', '.join(sorted(unknown))}.")
        if any(interval < 2 for interval in self.uniform_intervals):
            raise UserError(f"`uniform_intervals` must be at least 2, got {self.uniform_intervals}.")
        if any(count < 1 for count in self.fewer_steps):
            raise UserError(f"`fewer_steps` must be at least 1, got {self.fewer_steps}.")
        if "psnr" not in self.metrics or set(self.metrics) - set(METRICS):
            raise UserError(f"`metrics` must contain psnr and may name {', '.join(METRICS)}; got {self.metrics}.")
        try:
            self.methods()
        except ValueError as error:  # a threshold or warm-up that EasyCacheConfig does not take
            raise UserError(str(error)) from error

    def methods(self) -> list[Method]:
        """All methods in the order they run for a prompt."""
        methods = []
        for predictor in self.predictors:
            methods += easycache_methods(predictor, self.thresholds, warmup_steps=self.warmup_steps)
            methods += uniform_methods(predictor, self.uniform_intervals, warmup_steps=self.warmup_steps)
        return [*methods, *fewer_steps_methods(self.fewer_steps), plain_again()]


def run_easycache_bench(
    config: EasyCacheBenchConfig,
    *,
    pipe: Any = None,
    on_progress: Callable[[BenchProgress], None] | None = None,
) -> dict[str, Any]:
    """Measure, write the three files into `config.output`, and return the summary.

    pipe: a loaded pipeline to use instead of loading `config.model`.
    """
    spec = spec_of(config.model)
    pipe = load_pipeline(config.model, device=config.device, dtype=config.dtype) if pipe is None else pipe
    weights = spec.weights if config.weights is None else config.weights
    environment = describe_environment(device=torch.device(pipe._execution_device), weights=weights, model=config.model)
    requests = _requests(config)
    path = config.output / "easycache.json"
    results = ResultFile(path, protocol=_protocol(config, requests), environment=environment)
    run = _Run(config=config, pipe=pipe, results=results, on_progress=on_progress, num_requests=len(requests))
    for request in requests:
        run.measure(request)
    results.summary = summarise_methods(results.records)
    results.write()
    _write_reports(config, results)
    return results.summary


@dataclass(kw_only=True)
class _Run:
    """The measuring loop: which videos are missing, and one record for each."""

    config: EasyCacheBenchConfig
    pipe: Any
    results: ResultFile
    on_progress: Callable[[BenchProgress], None] | None
    num_requests: int
    warm: bool = False

    def measure(self, request: GenerationRequest) -> None:
        """All missing videos of one prompt and seed, the plain one first."""
        key = {"prompt": request.prompt, "seed": request.seed}
        is_first = not self.results.records or self.results.records[0].items() >= key.items()
        methods = [method for method in self.config.methods() if is_first or not method.only_first]
        missing = [method for method in methods if self.results.find(method=method.name, **key) is None]
        if not missing:
            return
        self._warm_up(request)
        self._tell(request, "plain")
        plain = generate(self.pipe, request)
        if self.results.find(method="plain", **key) is None:
            figures = _figures(plain)
            self.results.add({**key, "method": "plain", "family": "plain", "parameter": 0, **figures})
        for method in missing:
            self._tell(request, method.name)
            self.results.add({**key, **self._measure_method(method, request, plain)})

    def _measure_method(self, method: Method, request: GenerationRequest, plain: Generation) -> dict[str, Any]:
        if method.num_inference_steps is not None:
            request = replace(request, num_inference_steps=method.num_inference_steps)
        made = generate(self.pipe, request, easycache=method.easycache)
        comparison = compare_videos(plain.frames, made.frames, metrics=self.config.metrics)
        values = comparison.to_dict()
        return {
            "method": method.name,
            "family": method.family,
            "parameter": json_number(method.parameter),
            **_figures(made),
            "plain_denoising_seconds": plain.denoising_seconds,
            **ratios(_figures(made), _figures(plain)),
            **{name: values[name] for name in METRIC_FIELDS},
            "lpips": values["lpips"],
            "ms_ssim_scales": values["ms_ssim_scales"],
            "unavailable": dict(comparison.unavailable),
            "decisions": decision_letters(made),
        }

    def _warm_up(self, request: GenerationRequest) -> None:
        """A short run nobody measures: the first calls of a process load code and choose kernels."""
        if self.warm:
            return
        short = replace(request, num_inference_steps=min(3, request.num_inference_steps))
        generate(self.pipe, short)
        self.warm = True

    def _tell(self, request: GenerationRequest, label: str) -> None:
        if self.on_progress is None:
            return
        each = len(self.config.methods())  # the plain run takes the place of the one that only the first prompt has
        total = self.num_requests * each + 1
        done = min(len(self.results.records), total)
        self.on_progress(BenchProgress(done=done, total=total, label=f"{label}: {request.prompt}"))


def _requests(config: EasyCacheBenchConfig) -> list[GenerationRequest]:
    defaults = spec_of(config.model).defaults
    prompts = config.prompts
    if prompts is None:
        prompts = tuple(prompt.text for prompt in unseen_prompts(config.num_prompts))
    names = ("num_inference_steps", "guidance_scale", "num_frames", "height", "width")
    given = {name: getattr(config, name) for name in names}
    return bench_requests(defaults, prompts, seeds=config.seeds, **given)


def _protocol(config: EasyCacheBenchConfig, requests: list[GenerationRequest]) -> dict[str, Any]:
    first = requests[0]
    prompts = [request.prompt for request in requests[:: len(config.seeds)]]
    return {
        "benchmark": "easycache",
        "model": without_folders(config.model),
        "prompts": prompts,
        "num_prompts": len(prompts),
        "seeds": list(config.seeds),
        "methods": [method.name for method in config.methods()],
        "warmup_steps": config.warmup_steps,
        "num_inference_steps": first.num_inference_steps,
        "guidance_scale": first.guidance_scale,
        "num_frames": first.num_frames,
        "height": first.height,
        "width": first.width,
        "metrics": list(config.metrics),
        "dtype": config.dtype,
    }


def _figures(made: Generation) -> dict[str, float]:
    return {
        "num_forwards": made.num_forwards,
        "denoising_seconds": made.denoising_seconds,
        "total_seconds": made.total_seconds,
    }


def _write_reports(config: EasyCacheBenchConfig, results: ResultFile) -> None:
    methods = results.summary["methods"]
    content = {
        "protocol": results.protocol,
        "environments": results.environments,
        "summary": results.summary,
        "records": results.records,
    }
    default = [
        method["method"]
        for method in methods
        if method["family"].startswith("EasyCache") and method["parameter"] == _DEFAULTS.threshold
    ]
    write_text(config.output / "easycache.md", easycache_markdown(content, detailed=default))
    curves = [method for method in methods if method["family"] != "repeat"]
    save_pareto(config.output / "easycache.png", curves, caption=hardware_line(results.environments[-1]))

"""EasyCache against the plain run and against simpler ways to save forwards: fixed protocol, one process.

For every prompt and seed the plain video is made first and each method's video is compared with it, frame by frame as
decoded. Time is compared with the plain run of the same prompt in the same session. The result is written after every
video; a second run with the same settings continues, and makes the plain video of an unfinished prompt again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vidaccel.bench.caching.comparison import DEFAULTS, CacheComparison
from vidaccel.bench.caching.methods import (
    Method,
    easycache_methods,
    fewer_steps_methods,
    plain_again,
    uniform_methods,
)
from vidaccel.bench.caching.summary import METRIC_FIELDS, ratios, summarise_methods
from vidaccel.bench.caching.tables import easycache_markdown
from vidaccel.bench.shared.benchmark import BenchProgress, Tell
from vidaccel.bench.shared.records import ResultFile
from vidaccel.bench.shared.requests import decision_letters
from vidaccel.files.text import json_number
from vidaccel.generation.generate import Generation, generate
from vidaccel.generation.request import GenerationRequest
from vidaccel.video.metrics import compare_videos


@dataclass(frozen=True, kw_only=True)
class EasyCacheBench(CacheComparison):
    """The methods are EasyCache and uniform reuse under each reuse rule, and fewer steps."""

    name = "easycache"

    def all_methods(self) -> list[Method]:
        methods = []
        for predictor in self.predictors:
            methods += easycache_methods(predictor, self.thresholds, warmup_steps=self.warmup_steps)
            methods += uniform_methods(predictor, self.uniform_intervals, warmup_steps=self.warmup_steps)
        return [*methods, *fewer_steps_methods(self.fewer_steps), plain_again()]

    def run(self, *, pipe: Any = None, on_progress: Tell = None) -> dict[str, Any]:
        pipe, requests = self.loaded(pipe), self.requests(self.seeds)
        results = self.results(self.protocol(self.settled(requests[0])), self.environment(pipe))
        run = _Measurement(config=self, pipe=pipe, results=results, on_progress=on_progress, num_requests=len(requests))
        for request in requests:
            run.measure(request)
        summary = results.finish(summarise_methods(results.records))
        default = [
            method["method"]
            for method in summary["methods"]
            if method["family"].startswith("EasyCache") and method["parameter"] == DEFAULTS.threshold
        ]
        self.write_table(easycache_markdown(results.content, detailed=default))
        self.write_plot(results)
        return summary


@dataclass(kw_only=True)
class _Measurement:
    """The measuring loop: which videos are missing, and one record for each."""

    config: EasyCacheBench
    pipe: Any
    results: ResultFile
    on_progress: Tell
    num_requests: int
    warm: bool = False

    def measure(self, request: GenerationRequest) -> None:
        """All missing videos of one prompt and seed, the plain one first."""
        key = {"prompt": request.prompt, "seed": request.seed}
        is_first = not self.results.records or self.results.records[0].items() >= key.items()
        methods = [method for method in self.config.all_methods() if is_first or not method.only_first]
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
        each = len(self.config.all_methods())  # the plain run takes the place of the one that only the first prompt has
        total = self.num_requests * each + 1
        done = min(len(self.results.records), total)
        self.on_progress(BenchProgress(done=done, total=total, label=f"{label}: {request.prompt}"))


def _figures(made: Generation) -> dict[str, float]:
    return {
        "num_forwards": made.num_forwards,
        "denoising_seconds": made.denoising_seconds,
        "total_seconds": made.total_seconds,
    }

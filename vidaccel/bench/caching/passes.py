"""The two passes of the cache benchmark: every video once for its fidelity and its work, and a few for their times."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidaccel.bench.caching.builtin_caches import FAILURES, Setting, enabled_cache
from vidaccel.bench.caching.methods import Method
from vidaccel.bench.caching.schedules import random_schedule, scheduled_reuse
from vidaccel.bench.caching.summary import METRIC_FIELDS
from vidaccel.bench.caching.work import BlockWork
from vidaccel.bench.shared.benchmark import BenchProgress, Tell
from vidaccel.bench.shared.records import ResultFile
from vidaccel.bench.shared.requests import decision_letters
from vidaccel.easycache.apply import find_transformers
from vidaccel.errors import UserError
from vidaccel.files.text import json_number
from vidaccel.generation.generate import Generation, generate
from vidaccel.generation.request import GenerationRequest
from vidaccel.machine.private_names import execution_device
from vidaccel.video.metrics import VideoComparison, compare_videos

_PLAIN_EVERY = 8  # timed methods between two timed plain runs
_WARM_UP_STEPS = 5  # enough for a method's first kernels
_MOST_WAITING = 8  # videos kept until their VMAF is there
_VMAF_AT_A_TIME = 2


@dataclass(kw_only=True)
class MethodRunner:
    """Makes one video by one method on a pipeline that stays plain in between."""

    pipe: Any
    results: ResultFile
    calibrate: Callable[[], tuple[float, ...]]
    warmup_steps: int
    letters: dict[tuple[str, int, str], str] = field(default_factory=dict)

    def run(self, method: Method, request: GenerationRequest) -> Generation:
        """The video, with EasyCache's decisions kept for the random choice that has to match them."""
        if method.num_inference_steps is not None:
            request = replace(request, num_inference_steps=method.num_inference_steps)
        with self._applied(method, request):
            made = generate(self.pipe, request, easycache=method.easycache)
        self.letters[request.prompt, request.seed, method.name] = decision_letters(made)
        return made

    @contextmanager
    def _applied(self, method: Method, request: GenerationRequest) -> Iterator[None]:
        if method.cache is not None:
            ratios = self.ratios() if method.calibrated else ()
            setting = Setting(num_inference_steps=request.num_inference_steps, mag_ratios=ratios)
            with enabled_cache(self.pipe, method.cache, setting):
                yield
        elif method.as_many_as is not None:
            steps = random_schedule(
                request.num_inference_steps,
                self._letters(request, method.as_many_as).count("C"),
                warmup_steps=self.warmup_steps,
                seed=f"{request.seed} {method.name}",
            )
            with scheduled_reuse(self.pipe, steps, predictor=method.predictor):
                yield
        else:
            yield

    def _letters(self, request: GenerationRequest, name: str) -> str:
        key = (request.prompt, request.seed, name)
        if key not in self.letters:
            record = self.results.find(kind="video", prompt=request.prompt, seed=request.seed, method=name)
            assert record is not None, f"{name} runs before the random choice that has to match it"
            self.letters[key] = record["decisions"]
        return self.letters[key]

    def ratios(self) -> tuple[float, ...]:
        """MagCache's, calibrated once for all runs that continue this result; the first time makes a video."""
        known = self.results.find(kind="calibration")
        if known is None:
            self.results.add({"kind": "calibration", "ratios": list(self.calibrate())})
            known = self.results.find(kind="calibration")
            assert known is not None
        return tuple(known["ratios"])


@dataclass(kw_only=True)
class FidelityPass:
    """Every missing video of `methods`, compared with the plain one of its prompt and seed. No times are kept."""

    runner: MethodRunner
    methods: Sequence[Method]
    requests: Sequence[GenerationRequest]
    metrics: tuple[str, ...]

    def run(self, *, deadline: float | None, on_progress: Tell) -> None:
        """Go on until all is there or `deadline` (of time.monotonic) has passed."""
        results = self.runner.results
        work = BlockWork(list(find_transformers(self.runner.pipe).values()))
        with _Judge(results, self.metrics) as judge:
            for request in self.requests:
                missing = self._missing(request)
                if not missing or _is_over(deadline):
                    continue
                self._tell(on_progress, request, "plain")
                plain = self._make(None, request, work)
                if results.find(**_key("plain", request, "plain")) is None:
                    results.add({**_key("plain", request, "plain"), "family": "plain", **_work(*plain, plain)})
                for method in missing:
                    if _is_over(deadline):
                        break
                    if has_failed(results, method):
                        continue
                    self._tell(on_progress, request, method.name)
                    self._measure(method, request, work, plain, judge)

    def _measure(
        self,
        method: Method,
        request: GenerationRequest,
        work: BlockWork,
        plain: tuple[Generation, int],
        judge: _Judge,
    ) -> None:
        try:
            made = self._make(method, request, work)
        except UserError:
            raise
        except FAILURES as error:
            if method.cache is None:
                raise
            reason = f"{type(error).__name__}: {error}"
            self.runner.results.add({**_key("failure", request, method.name), "family": method.family, "why": reason})
            return
        record = {
            **_key("video", request, method.name),
            "family": method.family,
            "parameter": json_number(method.parameter),
            **_work(*made, plain),
            "decisions": decision_letters(made[0]),
        }
        judge.take(record, plain[0].frames, made[0].frames, device=execution_device(self.runner.pipe))

    def _make(self, method: Method | None, request: GenerationRequest, work: BlockWork) -> tuple[Generation, int]:
        if method is not None and method.calibrated:
            self.runner.ratios()  # makes its video before anything is counted
        with work.watch():
            made = generate(self.runner.pipe, request) if method is None else self.runner.run(method, request)
        return made, work.operations

    def _missing(self, request: GenerationRequest) -> list[Method]:
        results = self.runner.results
        done = {
            one["method"] for one in results.records if _key("video", request, one.get("method")).items() <= one.items()
        }
        asked = [one for one in self.methods if not one.only_first or request is self.requests[0]]
        return [one for one in asked if one.name not in done and not has_failed(results, one)]

    def _tell(self, on_progress: Tell, request: GenerationRequest, label: str) -> None:
        if on_progress is None:
            return
        asked = {(request.prompt, request.seed) for request in self.requests}
        num_first = sum(method.only_first for method in self.methods)
        total = len(self.requests) * (len(self.methods) - num_first) + num_first
        names = {method.name for method in self.methods}
        records = (one for one in self.runner.results.records if one["kind"] == "video" and one["method"] in names)
        done = sum((one["prompt"], one["seed"]) in asked for one in records)
        on_progress(BenchProgress(done=min(done, total), total=total, label=f"{label}: {request.prompt}"))


@dataclass(kw_only=True)
class TimingPass:
    """Denoising times of every method that has been measured, one video at a time, with plain runs in between."""

    runner: MethodRunner
    methods: Sequence[Method]
    requests: Sequence[GenerationRequest]

    def run(self, *, deadline: float | None, on_progress: Tell) -> None:
        """Go on until all is there or `deadline` (of time.monotonic) has passed."""
        results = self.runner.results
        warm: set[str] = set()
        for request in self.requests:
            for number, method in enumerate(missing := self._missing(request)):
                if _is_over(deadline):
                    return
                if on_progress is not None:
                    progress = BenchProgress(done=number, total=len(missing), label=f"time of {method.name}")
                    on_progress(progress)
                if number % _PLAIN_EVERY == 0:
                    self._warm_up(None, request, warm)
                    plain = generate(self.runner.pipe, request)
                self._warm_up(method, request, warm)
                made = self.runner.run(method, request)
                times = {"denoising_seconds": made.denoising_seconds, "plain_seconds": plain.denoising_seconds}
                ratio = json_number(plain.denoising_seconds / made.denoising_seconds)
                results.add(
                    {**_key("time", request, method.name), "family": method.family, **times, "time_ratio": ratio}
                )

    def _missing(self, request: GenerationRequest) -> list[Method]:
        """The methods whose video is there and whose time is not."""
        find = self.runner.results.find
        return [
            method
            for method in self.methods
            if not method.only_first
            and find(**_key("video", request, method.name)) is not None
            and find(**_key("time", request, method.name)) is None
        ]

    def _warm_up(self, method: Method | None, request: GenerationRequest, warm: set[str]) -> None:
        """A short run nobody measures: the first calls of a process load code, choose kernels and plan transforms."""
        name = "plain" if method is None else method.family
        if name in warm:
            return
        warm.add(name)
        short = replace(request, num_inference_steps=min(_WARM_UP_STEPS, request.num_inference_steps))
        if method is None or method.as_many_as is not None or method.num_inference_steps is not None:
            generate(self.runner.pipe, short)
        else:
            self.runner.run(method, short)


class _Judge:
    """Takes the metrics of finished videos: VMAF in ffmpeg while the next video is made, the others on the device.

    Records reach the result in the order of the videos, each when it is complete; the end of the block waits for all.
    """

    def __init__(self, results: ResultFile, metrics: tuple[str, ...]) -> None:
        self._results = results
        self._metrics = tuple(name for name in metrics if name != "vmaf")
        self._with_vmaf = "vmaf" in metrics
        self._waiting: deque[tuple[dict[str, Any], Future[VideoComparison]]] = deque()
        self._pool = ThreadPoolExecutor(max_workers=_VMAF_AT_A_TIME)

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            while self._waiting:
                self._finish_first()
        finally:
            self._pool.shutdown()

    def take(self, record: dict[str, Any], reference: Tensor, video: Tensor, *, device: torch.device) -> None:
        """Judge `video` against `reference`, both (F, 3, H, W) in [0, 1], and complete `record` with it."""
        reference, video = reference.to(device), video.to(device)
        found = compare_videos(reference, video, metrics=self._metrics)
        values, unavailable = found.to_dict(), dict(found.unavailable)
        record |= {name: values[name] for name in (*METRIC_FIELDS, "lpips", "ms_ssim_scales")}
        record["unavailable"] = unavailable
        if not self._with_vmaf:
            self._results.add(record)
            return
        pair = [(frames.double() * 255).round().to(torch.uint8).cpu() for frames in (reference, video)]
        self._waiting.append((record, self._pool.submit(compare_videos, *pair, metrics=("vmaf",))))
        while self._waiting and (self._waiting[0][1].done() or len(self._waiting) > _MOST_WAITING):
            self._finish_first()

    def _finish_first(self) -> None:
        record, future = self._waiting[0]
        found = future.result()
        record["vmaf"] = found.vmaf
        record["unavailable"] |= dict(found.unavailable)
        self._waiting.popleft()
        self._results.add(record)


def has_failed(results: ResultFile, method: Method) -> bool:
    """Whether a method of this family could not run; then none of the family is tried again."""
    return method.cache is not None and results.find(kind="failure", family=method.family) is not None


def _key(kind: str, request: GenerationRequest, method: Any) -> dict[str, Any]:
    return {"kind": kind, "prompt": request.prompt, "seed": request.seed, "method": method}


def _work(made: Generation, operations: int, plain: tuple[Generation, int]) -> Mapping[str, Any]:
    """Executed block work in operations, as a share of the plain run's, and as that many of its forwards."""
    share = operations / plain[1]
    return {
        "operations": operations,
        "forwards_share": share,
        "num_forwards": share * plain[0].num_forwards,
        "fewer_forwards": json_number(1 / share if share else float("inf")),
        "num_calls": made.num_forwards,
    }


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline

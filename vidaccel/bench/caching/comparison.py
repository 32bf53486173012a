"""What the two benchmarks of caches share: prompts and seeds, the methods' settings, and the size of a video."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vidaccel.bench.caching.methods import Method, known_predictors
from vidaccel.bench.shared.benchmark import ModelBenchmark, option
from vidaccel.bench.shared.plots import save_pareto
from vidaccel.bench.shared.records import ResultFile
from vidaccel.bench.shared.requests import bench_requests
from vidaccel.catalog.registry import spec_of
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.files.text import read_prompt_file
from vidaccel.generation.request import GenerationRequest
from vidaccel.machine.environment import hardware_line
from vidaccel.video.metrics import METRICS
from vidaccel.world import unseen_prompts

DEFAULTS = EasyCacheConfig()
_SIZES = ("num_inference_steps", "guidance_scale", "num_frames", "height", "width")
_ONE_EACH = ("prompts", "seeds", "predictors", "thresholds", "uniform_intervals", "fewer_steps")


@dataclass(frozen=True, kw_only=True)
class CacheComparison(ModelBenchmark):
    """Videos of several methods, each against the plain run of its prompt and seed.

    prompts: None takes `num_prompts` of the world's unseen prompts. The noise seed of a video is 1000 x seed + the
        prompt's number.
    metrics: of `vidaccel.video.metrics.METRICS`; one that this machine cannot take is left out of the tables.
    """

    prompts: tuple[str, ...] | None = option(
        "A file with one prompt a line. (default: the world's unseen prompts)",
        None,
        flag="--prompt-file",
        read=read_prompt_file,
    )
    num_prompts: int = option("How many unseen prompts.", 32)
    seeds: tuple[int, ...] = option("Each prompt is made once per seed.", (0,))
    predictors: tuple[str, ...] = option("What a reused step returns.", ("transformation", "output"), recorded=False)
    thresholds: tuple[float, ...] = option("Of EasyCache.", (0.01, 0.025, 0.05, 0.1, 0.2, 0.4), recorded=False)
    warmup_steps: int = option("First steps that are always computed.", DEFAULTS.warmup_steps)
    uniform_intervals: tuple[int, ...] = option(
        "Baseline that computes every k-th step.", (2, 3, 4, 6, 12), recorded=False
    )
    fewer_steps: tuple[int, ...] = option("Baseline with fewer steps.", (40, 30, 25, 20, 15), recorded=False)
    num_inference_steps: int | None = option("Denoising steps. (default: the model's)", None)
    guidance_scale: float | None = option("Weight of the prompt. (default: the model's)", None)
    num_frames: int | None = option("Frames, 4k + 1. (default: the model's)", None)
    height: int | None = option("Pixels. (default: the model's)", None)
    width: int | None = option("Pixels. (default: the model's)", None)
    metrics: tuple[str, ...] = option("Which figures to take; psnr is always one.", METRICS)

    def __post_init__(self) -> None:
        if self.prompts is not None and not self.prompts:
            raise UserError("`prompts` is empty; give at least one, or None for the world's unseen prompts.")
        if not 1 <= self.num_prompts <= 1000 or not self.seeds:
            raise UserError(f"`num_prompts` must be from 1 to 1000 and `seeds` not empty; got {self.num_prompts}.")
        for name in _ONE_EACH:
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
            self.all_methods()
        except ValueError as error:  # a threshold or warm-up that EasyCacheConfig does not take
            raise UserError(str(error)) from error

    def all_methods(self) -> list[Method]:
        """All methods of the protocol in the order they run for a prompt."""
        raise NotImplementedError

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The prompts that are asked for, or the world's."""
        return self.prompts or tuple(prompt.text for prompt in unseen_prompts(self.num_prompts))

    @property
    def sizes(self) -> dict[str, Any]:
        """Steps, guidance, frames and pixels; None is the model's own."""
        return {name: getattr(self, name) for name in _SIZES}

    def requests(self, seeds: tuple[int, ...]) -> list[GenerationRequest]:
        """Every prompt with every one of `seeds`."""
        return bench_requests(spec_of(self.model).defaults, self.texts, seeds=seeds, **self.sizes)

    def settled(self, first: GenerationRequest) -> dict[str, Any]:
        """What follows from options and model; `first` is a request of the protocol."""
        return {
            "prompts": list(self.texts),
            "num_prompts": len(self.texts),
            "methods": [method.name for method in self.all_methods()],
            **{name: getattr(first, name) for name in _SIZES},
        }

    def write_plot(self, results: ResultFile) -> None:
        """Fidelity against computed forwards, a curve for each family."""
        curves = [method for method in results.summary["methods"] if method["family"] != "repeat"]
        caption = hardware_line(results.environments[-1]) if results.environments else "nothing measured yet"
        save_pareto(self.path("png"), curves, caption=caption)

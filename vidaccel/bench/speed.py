"""Speed at full size with random weights: is a reused step free, and does time follow the computed forwards?

The loop is diffusers' own pipeline with prompt embeddings and latents out, so text encoder and VAE take no part.
Random weights say nothing about quality, and which steps are reused is arbitrary; both are written into the result.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vidaccel.bench.clock import LoopClock, LoopTimes
from vidaccel.bench.progress import BenchProgress
from vidaccel.bench.records import easycache_settings
from vidaccel.bench.speed_model import call_tensors, random_pipeline
from vidaccel.bench.tables import speed_markdown
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.easycache.apply import apply_easycache, easycache_report, remove_easycache
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.files.text import write_json, write_text
from vidaccel.generation.loading import resolve_device
from vidaccel.machine.attention import NATIVE, attention_call, check_attention_backend, set_attention_backend
from vidaccel.machine.environment import describe_environment

_REHEARSED_REUSES = 2


def _arbitrary_rule() -> EasyCacheConfig:
    """Every decision is taken as usual, but none is refused: two reused steps after each computed one."""
    return EasyCacheConfig(threshold=math.inf, warmup_steps=3, max_consecutive_reuses=2)


@dataclass(frozen=True, kw_only=True)
class SpeedBenchConfig:
    """One measurement: `repeats` pairs of a plain run and a run with reuse, after a short rehearsal.

    output: folder for speed.json and speed.md.
    shape: a row of `vidaccel.catalog.speed_shapes.SHAPES`, whose size and guidance serve where they are None here.
    rehearsal_steps: computed steps of the rehearsal, which loads kernels and fills the allocator, before two reused
        ones; they are not timed.
    easycache: with random weights any threshold is arbitrary; the default lets every third step be computed.
    """

    output: Path
    shape: str = "wan2.1-1.3b"
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    repeats: int = 2
    rehearsal_steps: int = 3
    easycache: EasyCacheConfig = field(default_factory=_arbitrary_rule)
    device: str = "auto"
    attention: str = "native"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UserError(f"`shape` must be one of {', '.join(SHAPES)}; got {self.shape!r}.")
        if self.repeats < 1 or self.num_inference_steps < 3 or self.rehearsal_steps < 2:
            raise UserError(
                "`repeats` must be at least 1, `num_inference_steps` at least 3 and `rehearsal_steps` at least 2."
            )
        shape, size = SHAPES[self.shape], self.size
        if size["num_frames"] < 1 or (size["num_frames"] - shape.frame_offset) % shape.frame_step:
            offset = f" + {shape.frame_offset}" if shape.frame_offset else ""
            raise UserError(
                f"`num_frames` of {self.shape} must be {shape.frame_step}k{offset}; got {size['num_frames']}."
            )
        for name in ("height", "width"):
            if size[name] < 1 or size[name] % shape.pixel_step:
                raise UserError(f"`{name}` of {self.shape} must be a multiple of {shape.pixel_step}; got {size[name]}.")

    @property
    def size(self) -> dict[str, int]:
        """Frames, height and width: as asked for, else those of the row."""
        return {
            name: getattr(SHAPES[self.shape], name) if getattr(self, name) is None else getattr(self, name)
            for name in ("num_frames", "height", "width")
        }

    @property
    def guidance(self) -> float:
        """The guidance scale: as asked for, else that of the row."""
        return SHAPES[self.shape].guidance_scale if self.guidance_scale is None else self.guidance_scale


def run_speed_bench(
    config: SpeedBenchConfig, *, on_progress: Callable[[BenchProgress], None] | None = None
) -> dict[str, Any]:
    """Measure, write speed.json and speed.md into `config.output`, and return the content of the former."""
    device = resolve_device(config.device)
    tell = on_progress or (lambda progress: None)
    total = 1 + 2 * config.repeats
    with _memory_errors(config, device):
        pipe = _pipeline(config, device)
        tell(BenchProgress(done=0, total=total, label="rehearsal"))
        reads = _rehearse(pipe, config, device=device)
        runs = []
        for index in range(2 * config.repeats):
            reuse = index % 2 == 1
            tell(BenchProgress(done=1 + index, total=total, label="with reuse" if reuse else "plain"))
            runs.append(_run(pipe, config, easycache=config.easycache if reuse else None, device=device))
    environment = describe_environment(device=device, weights="random", model=config.shape)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in pipe.transformer.parameters())
    result = {
        "protocol": _protocol(config),
        "environments": [environment],
        "summary": summarise_runs(runs) | {"reads_per_reused_step": reads, "weight_bytes": weights},
        "records": runs,
    }
    write_json(config.output / "speed.json", result)
    write_text(config.output / "speed.md", speed_markdown(result))
    return result


def summarise_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The two statements the benchmark is for, from its plain and its reusing runs (medians)."""
    plain, reusing = ([run for run in runs if run["reuse"] is kind] for kind in (False, True))
    plain_ms, reuse_ms = (statistics.median(run["denoising_ms"] for run in kind) for kind in (plain, reusing))
    time_ratio = reuse_ms / plain_ms
    forwards_ratio = reusing[0]["num_forwards"] / plain[0]["num_forwards"]
    reused = [
        (sum(calls), step)
        for run in reusing
        for computed, calls, step in zip(run["computed"], run["call_ms"], run["step_ms"], strict=True)
        if not computed
    ]
    return {
        "plain_seconds": plain_ms / 1000,
        "reuse_seconds": reuse_ms / 1000,
        "plain_forwards": plain[0]["num_forwards"],
        "reuse_forwards": reusing[0]["num_forwards"],
        "forwards_ratio": forwards_ratio,
        "time_ratio": time_ratio,
        "time_ratio_over_forwards_ratio": time_ratio / forwards_ratio,
        "time_follows_forwards_within_1_percent": abs(time_ratio / forwards_ratio - 1) <= 0.01,
        "forward_ms": statistics.median(ms for run in plain for calls in run["call_ms"] for ms in calls),
        "reused_steps": len(reused) // len(reusing),
        **_reused_step_figures(reused),
        **_peak_figures(plain, reusing),
        "finite": all(run["finite"] for run in runs),
    }


def _reused_step_figures(reused: list[tuple[float, float]]) -> dict[str, Any]:
    """Of a reused step: its transformer calls alone, and the whole step with guidance and scheduler."""
    if not reused:
        return {"reused_step_ms": None, "reused_step_under_1_ms": None}
    calls, steps = ([pair[index] for pair in reused] for index in (0, 1))
    return {
        "reused_step_ms": statistics.median(calls),
        "reused_step_ms_worst": max(calls),
        "reused_step_under_1_ms": statistics.median(calls) < 1,
        "reused_whole_step_ms": statistics.median(steps),
        "reused_whole_step_ms_worst": max(steps),
    }


def _rehearse(pipe: Any, config: SpeedBenchConfig, *, device: torch.device) -> float:
    """A few computed and two reused steps, untimed; returns how often a reused step reads the device's memory."""
    arguments = _call_arguments(config, device) | {"num_inference_steps": config.rehearsal_steps + _REHEARSED_REUSES}
    rule = EasyCacheConfig(threshold=math.inf, warmup_steps=config.rehearsal_steps, tail_steps=0)
    clock = LoopClock(pipe, device, counted=SHAPES[config.shape].counted, reads_from=config.rehearsal_steps)
    apply_easycache(pipe, rule)
    try:
        with clock.watch():
            pipe(**arguments)
    finally:
        remove_easycache(pipe)
    return statistics.mean(clock.times().reads)


def _run(
    pipe: Any, config: SpeedBenchConfig, *, easycache: EasyCacheConfig | None, device: torch.device
) -> dict[str, Any]:
    arguments = _call_arguments(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if easycache is not None:
        apply_easycache(pipe, easycache)
    clock = LoopClock(pipe, device, counted=SHAPES[config.shape].counted)
    try:
        with clock.watch():
            latents = pipe(**arguments)[0]
            times = clock.times()
        report = easycache_report(pipe) if easycache is not None else None
    finally:
        if easycache is not None:
            remove_easycache(pipe)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    decisions = [True] * len(times.steps) if report is None else [step.computed for step in report.decisions]
    record = _record(times, decisions, reuse=easycache is not None)
    return record | {"peak_bytes": peak, "finite": bool(torch.isfinite(latents).all())}


def _record(times: LoopTimes, computed: list[bool], *, reuse: bool) -> dict[str, Any]:
    return {
        "reuse": reuse,
        "denoising_ms": times.total,
        "num_forwards": times.num_forwards,
        "computed": computed,
        "step_ms": [round(value, 4) for value in times.steps],
        "call_ms": [[round(value, 4) for value in calls] for calls in times.calls],
    }


@contextmanager
def _memory_errors(config: SpeedBenchConfig, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = "{num_frames} frames of {width}x{height}".format(**config.size)
        raise UserError(
            f"Too little memory on {device} for {config.shape} with {size}; use fewer frames or a smaller size."
        ) from error


def _pipeline(config: SpeedBenchConfig, device: torch.device) -> Any:
    shape = SHAPES[config.shape]
    call = attention_call(shape.transformer.kind.partition(":")[2], shape.transformer.config)
    check_attention_backend(config.attention, device=device, dtype=_dtype(device), call=call)
    pipe: Any = random_pipeline(shape, device=device, dtype=_dtype(device), guidance_scale=config.guidance)
    if config.attention != NATIVE:
        set_attention_backend(pipe.transformer, config.attention)
    if config.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return pipe


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _call_arguments(config: SpeedBenchConfig, device: torch.device) -> dict[str, Any]:
    """Embeddings and start latents from a fixed seed, the same for every run."""
    shape = SHAPES[config.shape]
    guidance = {"guidance_scale": config.guidance} if shape.guidance == "call" else {}
    return {
        **call_tensors(shape.embeddings, device=device, dtype=_dtype(device)),
        **shape.arguments,
        **guidance,
        "generator": torch.Generator(device).manual_seed(1),
        "num_inference_steps": config.num_inference_steps,
        **config.size,
        "output_type": "latent",
        "return_dict": False,
    }


def _protocol(config: SpeedBenchConfig) -> dict[str, Any]:
    return {
        "benchmark": "speed",
        "shape": config.shape,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance,
        **config.size,
        "repeats": config.repeats,
        "rehearsal_steps": config.rehearsal_steps,
        "easycache": easycache_settings(config.easycache),
        "attention": config.attention,
        "compile": config.compile,
    }


def _peak_figures(plain: list[dict[str, Any]], reusing: list[dict[str, Any]]) -> dict[str, int | None]:
    if plain[0]["peak_bytes"] is None:
        return {"peak_bytes": None, "extra_peak_bytes": None}
    without, with_reuse = (max(run["peak_bytes"] for run in kind) for kind in (plain, reusing))
    return {"peak_bytes": without, "extra_peak_bytes": with_reuse - without}

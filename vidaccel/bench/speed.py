"""Speed at full size with random weights: is a reused step free, and does time follow the computed forwards?

The loop is diffusers' own pipeline with prompt embeddings and latents out, so text encoder and VAE take no part.
Random weights say nothing about quality, and which steps are reused is arbitrary; both are written into the result.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vidaccel.bench.shared.benchmark import Benchmark, BenchProgress, Tell, option
from vidaccel.bench.shared.clock import LoopClock, LoopTimes
from vidaccel.bench.shared.markdown import Content, captions, markdown_table
from vidaccel.bench.shared.random_model import call_tensors, random_pipeline
from vidaccel.bench.shared.records import easycache_settings
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.easycache.apply import apply_easycache, easycache_report, remove_easycache
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.files.text import write_json
from vidaccel.generation.loading import resolve_device
from vidaccel.machine.attention import NATIVE, attention_call, check_attention_backend, set_attention_backend
from vidaccel.machine.environment import describe_environment

_REHEARSED_REUSES = 2


@dataclass(frozen=True, kw_only=True)
class SpeedBench(Benchmark):
    """`repeats` pairs of a plain run and a run with reuse, after a short rehearsal.

    shape: a row of `vidaccel.catalog.speed_shapes.SHAPES`, whose size and guidance serve where they are None here.
    rehearsal_steps: computed steps of the rehearsal, which loads kernels and fills the allocator, before two reused
        ones; they are not timed.
    """

    name = "speed"

    shape: str = option(f"{', '.join(SHAPES)}; weights are random.", "wan2.1-1.3b")
    num_inference_steps: int = option("Denoising steps.", 20)
    guidance_scale: float | None = option("Weight of the prompt. (default: the shape's)", None)
    num_frames: int | None = option("Frames. (default: the shape's)", None)
    height: int | None = option("Pixels. (default: the shape's)", None)
    width: int | None = option("Pixels. (default: the shape's)", None)
    repeats: int = option("Pairs of a plain run and one with reuse.", 2)
    rehearsal_steps: int = option("Computed steps before the timing, at least 2.", 3)
    warmup_steps: int = option("EasyCache: first steps always computed.", 3, recorded=False)
    attention: str = option("Attention backend.", NATIVE)
    compile: bool = option("Compile the transformer's blocks.", False)

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UserError(f"`shape` must be one of {', '.join(SHAPES)}; got {self.shape!r}.")
        if self.repeats < 1 or self.num_inference_steps < 3 or self.rehearsal_steps < 2:
            raise UserError(
                "`repeats` must be at least 1, `num_inference_steps` at least 3 and `rehearsal_steps` at least 2."
            )
        try:
            _ = self.easycache
        except ValueError as error:
            raise UserError(str(error)) from error
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

    @property
    def easycache(self) -> EasyCacheConfig:
        """Every decision is taken as usual, but none is refused: two reused steps after each computed one.

        With random weights any threshold is arbitrary.
        """
        return EasyCacheConfig(threshold=math.inf, warmup_steps=self.warmup_steps, max_consecutive_reuses=2)

    def run(self, *, on_progress: Tell = None) -> dict[str, Any]:
        """Measure, write speed.json and speed.md, and return the content of the former."""
        device = resolve_device(self.device)
        tell = on_progress or (lambda progress: None)
        total = 1 + 2 * self.repeats
        with _memory_errors(self, device):
            pipe = _pipeline(self, device)
            tell(BenchProgress(done=0, total=total, label="rehearsal"))
            reads = _rehearse(pipe, self, device=device)
            runs = []
            for index in range(2 * self.repeats):
                reuse = index % 2 == 1
                tell(BenchProgress(done=1 + index, total=total, label="with reuse" if reuse else "plain"))
                runs.append(_run(pipe, self, easycache=self.easycache if reuse else None, device=device))
        weights = sum(parameter.numel() * parameter.element_size() for parameter in pipe.transformer.parameters())
        settled = {"guidance_scale": self.guidance, **self.size, "easycache": easycache_settings(self.easycache)}
        result = {
            "protocol": self.protocol(settled),
            "environments": [describe_environment(device=device, weights="random", model=self.shape)],
            "summary": summarise_runs(runs) | {"reads_per_reused_step": reads, "weight_bytes": weights},
            "records": runs,
        }
        write_json(self.path("json"), result)
        self.write_table(speed_markdown(result))
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


def _rehearse(pipe: Any, config: SpeedBench, *, device: torch.device) -> float:
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


def _run(pipe: Any, config: SpeedBench, *, easycache: EasyCacheConfig | None, device: torch.device) -> dict[str, Any]:
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
def _memory_errors(config: SpeedBench, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = "{num_frames} frames of {width}x{height}".format(**config.size)
        raise UserError(
            f"Too little memory on {device} for {config.shape} with {size}; use fewer frames or a smaller size."
        ) from error


def _pipeline(config: SpeedBench, device: torch.device) -> Any:
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


def _call_arguments(config: SpeedBench, device: torch.device) -> dict[str, Any]:
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


def _peak_figures(plain: list[dict[str, Any]], reusing: list[dict[str, Any]]) -> dict[str, int | None]:
    if plain[0]["peak_bytes"] is None:
        return {"peak_bytes": None, "extra_peak_bytes": None}
    without, with_reuse = (max(run["peak_bytes"] for run in kind) for kind in (plain, reusing))
    return {"peak_bytes": without, "extra_peak_bytes": with_reuse - without}


def speed_markdown(content: Content) -> str:
    """The two statements of the speed benchmark with their figures."""
    summary, protocol = content["summary"], content["protocol"]
    verdict = "yes" if summary["time_follows_forwards_within_1_percent"] else "no"
    rows = [
        ["denoising time, plain", f"{summary['plain_seconds']:.3f} s, {summary['plain_forwards']} forwards"],
        ["denoising time, with reuse", f"{summary['reuse_seconds']:.3f} s, {summary['reuse_forwards']} forwards"],
        ["computed forwards / all forwards", f"{summary['forwards_ratio']:.4f}"],
        ["time with reuse / time without", f"{summary['time_ratio']:.4f}"],
        ["the two agree within 1 %", f"{verdict} ({100 * (summary['time_ratio_over_forwards_ratio'] - 1):+.2f} %)"],
        ["one forward, median", f"{summary['forward_ms']:.3f} ms"],
    ]
    if summary["reused_step_ms"] is not None:
        rows += [
            ["reused step, transformer calls, median (worst)", _pair(summary, "reused_step_ms")],
            ["reused step, with guidance and scheduler, median (worst)", _pair(summary, "reused_whole_step_ms")],
            ["a reused step costs under 1 ms", "yes" if summary["reused_step_under_1_ms"] else "no"],
        ]
    if summary["extra_peak_bytes"] is not None:
        rows += [
            ["peak memory without reuse", f"{summary['peak_bytes'] / 1e9:.2f} GB"],
            ["peak memory with reuse - without", f"{summary['extra_peak_bytes'] / 1e6:.1f} MB"],
        ]
    rows += [
        ["weights of the transformer", f"{summary['weight_bytes'] / 1e9:.2f} GB"],
        ["reads of the device's memory in a reused step", f"{summary['reads_per_reused_step']:g}"],
        ["all latents finite", "yes" if summary["finite"] else "no"],
    ]
    lines = [
        f"# Speed at the shape of {protocol['shape']}, random weights",
        "",
        captions(content),
        "",
        f"{protocol['num_frames']} frames of {protocol['width']}x{protocol['height']}, "
        f"{protocol['num_inference_steps']} steps, guidance {protocol['guidance_scale']:g}, attention "
        f"{protocol['attention']}, threshold {float(protocol['easycache']['threshold']):g} with at most "
        f"{protocol['easycache']['max_consecutive_reuses']} reuses in a row, repeats: {protocol['repeats']}. "
        "Random weights: which steps are reused is the setting's doing, and nothing here is about quality.",
        "",
        *markdown_table(["figure", "value"], rows),
    ]
    return "\n".join(lines) + "\n"


def _pair(summary: Content, name: str) -> str:
    return f"{summary[name]:.3f} ms ({summary[name + '_worst']:.3f} ms)"

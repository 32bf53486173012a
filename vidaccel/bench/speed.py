"""Speed at full size with random weights: is a reused step free, and does time follow the computed forwards?

The loop is diffusers' own `WanPipeline` with prompt embeddings and latents out, so text encoder and VAE take no part.
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
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from vidaccel.attention_backends import NATIVE, check_attention_backend, set_attention_backend
from vidaccel.bench.clock import LoopClock, LoopTimes
from vidaccel.bench.environment import describe_environment
from vidaccel.bench.progress import BenchProgress
from vidaccel.bench.records import easycache_settings, write_json, write_text
from vidaccel.bench.tables import speed_markdown
from vidaccel.easycache import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.hooks import apply_easycache, easycache_report, remove_easycache
from vidaccel.loading import resolve_device


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """The published shape of a Wan transformer; channels, patch and normalisation are those of Wan2.1."""

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    text_length: int
    freq_dim: int


_WARM_UP_STEPS = 5
SHAPES = {
    "wan2.1-1.3b": TransformerShape(
        num_attention_heads=12,
        attention_head_dim=128,
        num_layers=30,
        ffn_dim=8960,
        text_dim=4096,
        text_length=512,
        freq_dim=256,
    ),
    "toy": TransformerShape(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        ffn_dim=32,
        text_dim=16,
        text_length=8,
        freq_dim=32,
    ),
}


def _arbitrary_rule() -> EasyCacheConfig:
    """Every decision is taken as usual, but none is refused: two reused steps after each computed one."""
    return EasyCacheConfig(threshold=math.inf, warmup_steps=3, max_consecutive_reuses=2)


@dataclass(frozen=True, kw_only=True)
class SpeedBenchConfig:
    """One measurement: `repeats` pairs of a plain run and a run with reuse, after a warm-up of both.

    output: folder for speed.json and speed.md.
    easycache: with random weights any threshold is arbitrary; the default lets every third step be computed.
    """

    output: Path
    shape: str = "wan2.1-1.3b"
    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    num_frames: int = 81
    height: int = 480
    width: int = 832
    repeats: int = 2
    easycache: EasyCacheConfig = field(default_factory=_arbitrary_rule)
    device: str = "auto"
    attention: str = "native"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UserError(f"`shape` must be one of {', '.join(SHAPES)}; got {self.shape!r}.")
        if self.repeats < 1 or self.num_inference_steps < 3:
            raise UserError("`repeats` must be at least 1 and `num_inference_steps` at least 3.")
        if self.num_frames % 4 != 1 or self.height % 16 or self.width % 16:
            raise UserError("`num_frames` must be 4k + 1, `height` and `width` multiples of 16.")


def run_speed_bench(
    config: SpeedBenchConfig, *, on_progress: Callable[[BenchProgress], None] | None = None
) -> dict[str, Any]:
    """Measure, write speed.json and speed.md into `config.output`, and return the content of the former."""
    device = resolve_device(config.device)
    check_attention_backend(config.attention, device=device, dtype=_dtype(device))
    pipe = _random_pipeline(config, device)
    plan = [False, True] + [False, True] * config.repeats
    runs: list[dict[str, Any]] = []
    for index, reuse in enumerate(plan):
        warm_up = index < 2
        if on_progress is not None:
            label = ("warm-up " if warm_up else "") + ("with reuse" if reuse else "plain")
            on_progress(BenchProgress(done=index, total=len(plan), label=label))
        with _memory_errors(config, device):
            run = _run(pipe, config, easycache=config.easycache if reuse else None, device=device, warm_up=warm_up)
        if not warm_up:
            runs.append(run)
    environment = describe_environment(device=device, weights="random", model=config.shape)
    result = {
        "protocol": _protocol(config),
        "environments": [environment],
        "summary": summarise_runs(runs),
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
        "extra_peak_bytes": _extra_peak(plain, reusing),
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


def _run(
    pipe: Any,
    config: SpeedBenchConfig,
    *,
    easycache: EasyCacheConfig | None,
    device: torch.device,
    warm_up: bool,
) -> dict[str, Any]:
    arguments = _call_arguments(pipe, config, device)
    if warm_up:  # long enough for one reused step, so that its kernels are loaded too
        arguments["num_inference_steps"] = _WARM_UP_STEPS
        easycache = None if easycache is None else EasyCacheConfig(threshold=math.inf, warmup_steps=_WARM_UP_STEPS - 2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if easycache is not None:
        apply_easycache(pipe, easycache)
    clock = LoopClock(pipe.transformer, device)
    try:
        with clock.watch():
            pipe(**arguments, callback_on_step_end=clock.callback, callback_on_step_end_tensor_inputs=[])
            times = clock.times()
        report = easycache_report(pipe) if easycache is not None else None
    finally:
        if easycache is not None:
            remove_easycache(pipe)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    decisions = [True] * len(times.steps) if report is None else [step.computed for step in report.decisions]
    return _record(times, decisions, reuse=easycache is not None) | {"peak_bytes": peak}


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
        size = f"{config.num_frames} frames of {config.width}x{config.height}"
        raise UserError(f"Too little memory on {device} for {size}; use fewer frames or a smaller size.") from error


def _random_pipeline(config: SpeedBenchConfig, device: torch.device) -> Any:
    shape = SHAPES[config.shape]
    torch.manual_seed(0)
    with device:
        transformer: Any = WanTransformer3DModel(
            num_attention_heads=shape.num_attention_heads,
            attention_head_dim=shape.attention_head_dim,
            num_layers=shape.num_layers,
            ffn_dim=shape.ffn_dim,
            text_dim=shape.text_dim,
            freq_dim=shape.freq_dim,
        )
    _cast(transformer.eval().requires_grad_(False), _dtype(device))
    if config.attention != NATIVE:
        set_attention_backend(transformer, config.attention)
    if config.compile:
        transformer.compile_repeated_blocks(fullgraph=True)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe: Any = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _cast(transformer: Any, dtype: torch.dtype) -> None:
    """Parameters to `dtype`, but those that diffusers keeps in float32 when it loads a checkpoint."""
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _call_arguments(pipe: Any, config: SpeedBenchConfig, device: torch.device) -> dict[str, Any]:
    """Prompt embeddings and start latents from a fixed seed, the same for every run."""
    shape = SHAPES[config.shape]
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    text = (1, shape.text_length, shape.text_dim)
    num_latent_frames = (config.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    scale = pipe.vae_scale_factor_spatial
    channels = pipe.transformer.config.in_channels
    return {
        "prompt_embeds": noise(*text, dtype=_dtype(device)),
        "negative_prompt_embeds": noise(*text, dtype=_dtype(device)),
        "latents": noise(
            1, channels, num_latent_frames, config.height // scale, config.width // scale, dtype=torch.float32
        ),
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "num_frames": config.num_frames,
        "height": config.height,
        "width": config.width,
        "output_type": "latent",
    }


def _protocol(config: SpeedBenchConfig) -> dict[str, Any]:
    return {
        "benchmark": "speed",
        "shape": config.shape,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "num_frames": config.num_frames,
        "height": config.height,
        "width": config.width,
        "repeats": config.repeats,
        "easycache": easycache_settings(config.easycache),
        "attention": config.attention,
        "compile": config.compile,
    }


def _extra_peak(plain: list[dict[str, Any]], reusing: list[dict[str, Any]]) -> int | None:
    if plain[0]["peak_bytes"] is None:
        return None
    return max(run["peak_bytes"] for run in reusing) - max(run["peak_bytes"] for run in plain)

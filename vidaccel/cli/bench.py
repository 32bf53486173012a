"""`vidaccel bench easycache | caches | quality | speed | rollout | recall`: fixed protocols; JSON, tables, a plot."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vidaccel.bench.caches import CachesBenchConfig, run_caches_bench
from vidaccel.bench.easycache import EasyCacheBenchConfig, run_easycache_bench
from vidaccel.bench.progress import BenchProgress
from vidaccel.bench.quality import QualityBenchConfig, run_quality_bench
from vidaccel.bench.recall import RecallBenchConfig, run_recall_bench
from vidaccel.bench.rollout import RolloutBenchConfig, run_rollout_bench
from vidaccel.bench.speed import SpeedBenchConfig, run_speed_bench
from vidaccel.catalog.registry import EMBEDDED_MODEL, EMBEDDED_STUDENT
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.cli.console import messages, say
from vidaccel.cli.jobs import check_writable, read_prompts
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.video.metrics import METRICS

Value = TypeVar("Value", int, float, str)

app = typer.Typer(
    help="Measurements under a fixed protocol; an interrupted one goes on where it stopped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Output = Annotated[Path, typer.Option(help="Folder for the results.")]
Model = Annotated[str, typer.Option(help="A name of `vidaccel models`, a folder, or a Hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")]
Weights = Annotated[
    str | None, typer.Option(help="trained, toy, random, external: noted in the result. [default: the model's]")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. [default: the model's]")]
Guidance = Annotated[float | None, typer.Option(help="Weight of the prompt. [default: the model's]")]
Frames = Annotated[int | None, typer.Option(help="Frames, 4k + 1. [default: the model's]")]
Pixels = Annotated[int | None, typer.Option(help="Pixels. [default: the model's]")]

_PROTOCOL = EasyCacheBenchConfig(output=Path("results"))
_CACHES = CachesBenchConfig(output=Path("results"))
_SPEED = SpeedBenchConfig(output=Path("results"))
_ROLLOUT = RolloutBenchConfig(output=Path("results"))
_RECALL = RecallBenchConfig(output=Path("results"))


def _listed(values: tuple[Value, ...]) -> str:
    return ",".join(map(str, values))


@app.command()
def easycache(
    output: Output = Path("results/easycache"),
    model: Model = EMBEDDED_MODEL,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line. [default: the world's unseen prompts]")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="How many unseen prompts.")] = _PROTOCOL.num_prompts,
    seeds: Annotated[str, typer.Option(help="Each prompt is made once per seed.")] = _listed(_PROTOCOL.seeds),
    predictors: Annotated[str, typer.Option(help="What a reused step returns.")] = _listed(_PROTOCOL.predictors),
    thresholds: Annotated[str, typer.Option(help="Of EasyCache.")] = _listed(_PROTOCOL.thresholds),
    warmup_steps: Annotated[int, typer.Option(help="First steps that are always computed.")] = _PROTOCOL.warmup_steps,
    uniform_intervals: Annotated[str, typer.Option(help="Baseline that computes every k-th step.")] = _listed(
        _PROTOCOL.uniform_intervals
    ),
    fewer_steps: Annotated[str, typer.Option(help="Baseline with fewer steps.")] = _listed(_PROTOCOL.fewer_steps),
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    num_frames: Frames = None,
    height: Pixels = None,
    width: Pixels = None,
    metrics: Annotated[str, typer.Option(help="Which figures to take; psnr is always one.")] = _listed(METRICS),
    weights: Weights = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """EasyCache at several thresholds against fewer steps and uniform reuse: easycache.json, .md, .png."""
    config = EasyCacheBenchConfig(
        output=output,
        model=model,
        prompts=None if prompt_file is None else tuple(read_prompts([], prompt_file)),
        num_prompts=num_prompts,
        seeds=_values("seeds", seeds, int),
        predictors=_values("predictors", predictors, str),
        thresholds=_values("thresholds", thresholds, float),
        warmup_steps=warmup_steps,
        uniform_intervals=_values("uniform_intervals", uniform_intervals, int),
        fewer_steps=_values("fewer_steps", fewer_steps, int),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_frames=num_frames,
        height=height,
        width=width,
        metrics=_values("metrics", metrics, str),
        weights=weights,
        device=device,
        dtype=dtype,
    )
    check_writable(output)
    with _bar() as on_progress:
        run_easycache_bench(config, on_progress=on_progress)
    say(f"results: {output}")


@app.command()
def caches(
    output: Output = Path("results/caches"),
    model: Model = EMBEDDED_MODEL,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line. [default: the world's unseen prompts]")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="How many unseen prompts.")] = _CACHES.num_prompts,
    seeds: Annotated[str, typer.Option(help="Each prompt is made once per seed.")] = _listed(_CACHES.seeds),
    predictors: Annotated[str, typer.Option(help="What a reused step returns.")] = _listed(_CACHES.predictors),
    fixed_predictors: Annotated[str, typer.Option(help="The same of uniform and random reuse.")] = _listed(
        _CACHES.fixed_predictors
    ),
    thresholds: Annotated[str, typer.Option(help="Of EasyCache.")] = _listed(_CACHES.thresholds),
    warmup_steps: Annotated[int, typer.Option(help="First steps that are always computed.")] = _CACHES.warmup_steps,
    uniform_intervals: Annotated[str, typer.Option(help="Baseline that computes every k-th step.")] = _listed(
        _CACHES.uniform_intervals
    ),
    fewer_steps: Annotated[str, typer.Option(help="Baseline with fewer steps.")] = _listed(_CACHES.fewer_steps),
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    num_frames: Frames = None,
    height: Pixels = None,
    width: Pixels = None,
    metrics: Annotated[str, typer.Option(help="Which figures to take; psnr is always one.")] = _listed(_CACHES.metrics),
    methods: Annotated[str, typer.Option(help="Only methods whose names contain one of these texts.")] = "",
    shard: Annotated[str | None, typer.Option(help="i/n: this process makes every n-th video, untimed.")] = None,
    timing_prompts: Annotated[int, typer.Option(help="Prompts on which methods are timed.")] = _CACHES.timing_prompts,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which no further video begins; 0 only writes the tables.")
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """EasyCache against the caches of diffusers at equal executed work: caches.json, .md, .png."""
    config = CachesBenchConfig(
        output=output,
        model=model,
        prompts=None if prompt_file is None else tuple(read_prompts([], prompt_file)),
        num_prompts=num_prompts,
        seeds=_values("seeds", seeds, int),
        predictors=_values("predictors", predictors, str),
        fixed_predictors=_values("fixed_predictors", fixed_predictors, str),
        thresholds=_values("thresholds", thresholds, float),
        warmup_steps=warmup_steps,
        uniform_intervals=_values("uniform_intervals", uniform_intervals, int),
        fewer_steps=_values("fewer_steps", fewer_steps, int),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_frames=num_frames,
        height=height,
        width=width,
        metrics=_values("metrics", metrics, str),
        methods=_values("methods", methods, str),
        shard=None if shard is None else _shard(shard),
        timing_prompts=timing_prompts,
        time_limit=time_limit,
        weights=weights,
        device=device,
        dtype=dtype,
    )
    check_writable(output)
    with _bar() as on_progress:
        run_caches_bench(config, on_progress=on_progress)
    say(f"results: {output}")


@app.command()
def quality(
    output: Output = Path("results/quality"),
    model: Model = EMBEDDED_MODEL,
    num_prompts: Annotated[int, typer.Option(help="Unseen prompts of the world.")] = 64,
    num_clips: Annotated[int, typer.Option(help="Unseen clips the VAE reconstructs; 0 leaves it out.")] = 16,
    seed: Annotated[int, typer.Option(help="Draws the prompts and the noise.")] = 0,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    num_frames: Frames = None,
    threshold: Annotated[float | None, typer.Option(help="With EasyCache. [default: every step computed]")] = None,
    warmup_steps: Annotated[int, typer.Option(help="EasyCache: first steps always computed.")] = _PROTOCOL.warmup_steps,
    keep_videos: Annotated[bool, typer.Option("--keep-videos", help="Keep the videos beside the results.")] = False,
    weights: Weights = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """What a model of the storybook world can do, read by the oracle: quality.json, quality.md."""
    cache = None if threshold is None else EasyCacheConfig(threshold=threshold, warmup_steps=warmup_steps)
    config = QualityBenchConfig(
        output=output,
        model=model,
        num_prompts=num_prompts,
        seed=seed,
        num_clips=num_clips,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_frames=num_frames,
        easycache=cache,
        keep_videos=keep_videos,
        weights=weights,
        device=device,
        dtype=dtype,
    )
    check_writable(output)
    with _bar() as on_progress:
        run_quality_bench(config, on_progress=on_progress)
    say(f"results: {output}")


@app.command()
def speed(
    output: Output = Path("results/speed"),
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}; weights are random.")] = _SPEED.shape,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = _SPEED.num_inference_steps,
    guidance_scale: Annotated[float | None, typer.Option(help="Weight of the prompt. [default: the shape's]")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames. [default: the shape's]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: the shape's]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: the shape's]")] = None,
    repeats: Annotated[int, typer.Option(help="Pairs of a plain run and one with reuse.")] = _SPEED.repeats,
    rehearsal_steps: Annotated[
        int, typer.Option(help="Computed steps before the timing, at least 2.")
    ] = _SPEED.rehearsal_steps,
    warmup_steps: Annotated[
        int, typer.Option(help="EasyCache: first steps always computed.")
    ] = _SPEED.easycache.warmup_steps,
    attention: Annotated[str, typer.Option(help="Attention backend.")] = _SPEED.attention,
    compile_blocks: Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks.")] = False,
    device: Device = "auto",
) -> None:
    """Time of a full-size transformer with random weights, with and without reuse: speed.json, speed.md."""
    config = SpeedBenchConfig(
        output=output,
        shape=shape,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_frames=num_frames,
        height=height,
        width=width,
        repeats=repeats,
        rehearsal_steps=rehearsal_steps,
        easycache=replace(_SPEED.easycache, warmup_steps=warmup_steps),
        device=device,
        attention=attention,
        compile=compile_blocks,
    )
    check_writable(output)
    with _bar() as on_progress:
        run_speed_bench(config, on_progress=on_progress)
    say(f"results: {output}")


@app.command()
def rollout(
    output: Output = Path("results/rollout"),
    shape: Annotated[str, typer.Option(help="A text-to-video Wan of `bench speed`, or toy.")] = _ROLLOUT.shape,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: the shape's]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: the shape's]")] = None,
    num_inference_steps: Annotated[
        int, typer.Option(help="Denoising steps of a chunk.")
    ] = _ROLLOUT.num_inference_steps,
    memories: Annotated[str, typer.Option(help="What is remembered.")] = _listed(_ROLLOUT.memories),
    modes: Annotated[str, typer.Option(help="How passes are run; the main one first.")] = _listed(_ROLLOUT.modes),
    decoders: Annotated[str, typer.Option(help="none, tiny, full; the main one first.")] = _listed(_ROLLOUT.decoders),
    num_chunks: Annotated[str, typer.Option(help="Chunks of the long run of each memory.")] = _listed(
        _ROLLOUT.num_chunks
    ),
    num_filled_chunks: Annotated[int, typer.Option(help="Of all other runs.")] = _ROLLOUT.num_filled_chunks,
    attention: Annotated[
        str, typer.Option(help="auto (the fastest here), a backend of diffusers, or kernel/parts such as cudnn/2.")
    ] = _ROLLOUT.attention,
    fuse: Annotated[bool, typer.Option(help="Join layers, for inference.")] = _ROLLOUT.fuse,
    budget_seconds: Annotated[float | None, typer.Option(help="No chunk begins after it.")] = None,
    device: Device = "auto",
) -> None:
    """Frames per second and memory of a full-size causal student with random weights: rollout.json, .md, .png."""
    config = RolloutBenchConfig(
        output=output,
        shape=shape,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        memories=_values("memories", memories, str),
        modes=_values("modes", modes, str),  # type: ignore[arg-type]
        decoders=_values("decoders", decoders, str),  # type: ignore[arg-type]
        num_chunks=_values("num_chunks", num_chunks, int),
        num_filled_chunks=num_filled_chunks,
        attention=attention,
        fuse=fuse,
        budget_seconds=budget_seconds,
        device=device,
    )
    check_writable(output)
    with _bar() as on_progress:
        run_rollout_bench(config, on_progress=on_progress)
    say(f"results: {output}")


@app.command()
def recall(
    output: Output = Path("results/recall"),
    model: Model = EMBEDDED_STUDENT,
    num_prompts: Annotated[int, typer.Option(help="Unseen scenes of the world.")] = _RECALL.num_prompts,
    own_prompts: Annotated[int, typer.Option(help="Of these, for videos begun with nothing.")] = _RECALL.own_prompts,
    seed: Annotated[int, typer.Option(help="Draws the scenes and the noise.")] = _RECALL.seed,
    memories: Annotated[
        str, typer.Option(help="For videos that begin with a clip; /uniform behind: keyframes at equal distances.")
    ] = _listed(_RECALL.memories),
    own_memories: Annotated[str, typer.Option(help="Of these, for videos that begin with nothing.")] = _listed(
        _RECALL.own_memories
    ),
    settings: Annotated[str, typer.Option(help="steps@guidance of short rollouts.")] = _listed(_RECALL.settings),
    keep_pictures: Annotated[bool, typer.Option("--keep-pictures", help="Keep what was compared.")] = False,
    weights: Weights = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Is a place the same when the camera comes back, with each memory of a causal student: recall.json, .md, .png."""
    config = RecallBenchConfig(
        output=output,
        model=model,
        num_prompts=num_prompts,
        own_prompts=own_prompts,
        seed=seed,
        memories=_values("memories", memories, str),
        own_memories=_values("own_memories", own_memories, str),
        settings=_values("settings", settings, str),
        keep_pictures=keep_pictures,
        weights=weights,
        device=device,
        dtype=dtype,
    )
    check_writable(output)
    with _bar() as on_progress:
        run_recall_bench(config, on_progress=on_progress)
    say(f"results: {output}")


def _values(name: str, text: str, kind: Callable[[str], Value]) -> tuple[Value, ...]:
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"`{name}` must be values with commas between them, got {text!r}.") from error


def _shard(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal()):
        raise UserError(f"`shard` must be i/n, such as 1/8, got {text!r}.")
    return int(first), int(second)


@contextmanager
def _bar() -> Iterator[Callable[[BenchProgress], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task("loading", total=None)

        def advance(part: BenchProgress) -> None:
            progress.update(task, total=part.total, completed=part.done, description=part.label[:50])

        yield advance

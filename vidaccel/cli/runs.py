"""Carrying out `vidaccel generate`: plan the jobs, load the model once, make each video, write its files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidaccel.catalog.presets import Preset
from vidaccel.catalog.registry import model_index, pipeline_name, recorded_preset
from vidaccel.cli.compare import twin_table
from vidaccel.cli.console import console, messages, say
from vidaccel.cli.jobs import (
    Job,
    SharedSettings,
    check_writable,
    request_settings,
    unfinished,
    video_paths,
)
from vidaccel.cli.progress import step_bar
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.files.atomic import atomic_write
from vidaccel.files.digest import folder_digest
from vidaccel.files.text import plain_values, write_json
from vidaccel.generation.generate import Generation, check_request, generate, warm_up
from vidaccel.generation.loading import component_dtypes, load_pipeline, resolve_device
from vidaccel.generation.request import GenerationRequest
from vidaccel.machine.environment import describe_environment
from vidaccel.machine.private_names import execution_device
from vidaccel.video.files import write_video
from vidaccel.video.frames import side_by_side
from vidaccel.video.metrics import VideoComparison, compare_videos


def run_jobs(run: SharedSettings, requests: Sequence[GenerationRequest], *, output: Path, overwrite: bool) -> None:
    """Make the videos that are not finished yet, in order; what is finished is said and skipped."""
    paths = video_paths([request.prompt for request in requests], requests[0].seed, output)
    pipe, config, words = None, None, ""
    if run.easycache is not None:
        index = model_index(run.spec)
        if index is None:  # only the loaded model says what is published for it
            for folder in {path.parent for path in paths}:
                check_writable(folder)
            pipe = _load(run)
        preset = Preset.for_pipeline(pipe) if index is None else recorded_preset(index)
        config = replace(EasyCacheConfig.published(preset), **run.easycache)
        words = _in_words(config, run.easycache, preset)
    settings = _shared_settings(run, config)
    jobs = [
        Job(
            request=request,
            video=path,
            settings={"request": request_settings(request), **settings},
            compare=run.compare,
            report=run.report,
        )
        for request, path in zip(requests, paths, strict=True)
    ]
    waiting = unfinished(jobs, overwrite=overwrite)
    for job in jobs:
        if job not in waiting:
            say(f"{job.video}: finished before, skipped")
    if not waiting:
        return
    pipe = pipe or _load(run)
    for job in waiting:
        check_request(pipe, job.request)
    if words:
        say(f"EasyCache: {words}")
    for job in waiting:
        _make_video(pipe, run, job, config)


def _in_words(config: EasyCacheConfig, given: Mapping[str, Any], preset: Preset | None) -> str:
    """The settings, and where they come from."""
    source = "defaults: no preset is published" if preset is None else f"preset {preset.name}, {preset.source}"
    named = [name for name in ("threshold", "warmup_steps") if name in given]
    if named:
        source = "as asked for" if len(named) == 2 else f"{named[0]} as asked for, else {source}"
    words = f"threshold {config.threshold:g}, first {config.warmup_steps} steps computed ({source})"
    return f"{words}, predictor {config.predictor}" if "predictor" in given else words


def _shared_settings(run: SharedSettings, config: EasyCacheConfig | None) -> dict[str, Any]:
    """Everything beside the request that can change pixels, as the sidecar records it.

    config: what the flags and the model's preset come to, so that with another preset it is another video.
    """
    device = resolve_device(run.device)
    dtypes = component_dtypes(run.dtype, device, pipeline=pipeline_name(run.spec))
    folder = run.spec.folder
    reuse = None
    if config is not None:
        values = config.to_dict()
        reuse = {name: values[name] for name in ("threshold", "warmup_steps", "predictor")}
    loras = [file.to_dict() for file in run.loras]
    transformers = [file.to_dict() for file in run.transformer_files]
    return {
        "model": run.spec.name,
        "model_digest": None if folder is None else folder_digest(folder),
        "easycache": reuse,
        "device": device.type,
        "dtype": {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()},
        "attention": run.attention,
        "compile": run.compile_blocks,
        "fps": run.fps,
        **({"loras": loras} if loras else {}),
        **({"transformers": transformers} if transformers else {}),
    }


def _load(run: SharedSettings) -> Any:
    with messages.status("loading the model"):
        return load_pipeline(
            run.spec.name,
            device=run.device,
            dtype=run.dtype,
            offload=run.offload,
            attention=run.attention,
            compile=run.compile_blocks,
            loras=run.loras,
            transformer_files=run.transformer_files,
        )


def _make_video(pipe: Any, run: SharedSettings, job: Job, config: EasyCacheConfig | None) -> None:
    plain, comparison = None, None
    if run.compare:
        warm_up(pipe, job.request)
        with step_bar("without reuse") as on_step:
            plain = generate(pipe, job.request, on_step=on_step)
    with step_bar(job.video.stem[:40]) as on_step:
        result = generate(pipe, job.request, easycache=config, on_step=on_step)
    if plain is not None:
        comparison = compare_videos(plain.frames, result.frames, fps=run.fps, metrics=("psnr", "ssim"))
    job.write_sidecar(_sidecar(pipe, run, job, result=result, config=config, plain=plain, comparison=comparison))
    write_video(job.video, result.frames, fps=run.fps, sound=result.sound)
    if plain is not None:
        pair = side_by_side(plain.frames, result.frames, ("without reuse", "with EasyCache"))
        write_video(job.side_by_side, pair, fps=run.fps)
    if job.report and result.report is not None:
        write_json(job.report_json, plain_values(result.report.to_dict()))
        with atomic_write(job.report_picture) as unfinished:
            result.report.save_picture(unfinished)
    say(f"{job.video}: {_summary(job.request, result)}")
    if plain is not None and comparison is not None:
        console.print(twin_table(plain, result, comparison))
        say(f"side by side: {job.side_by_side}")
    if job.report:
        say(f"decisions: {job.report_json}, {job.report_picture}")


def _summary(request: GenerationRequest, result: Generation) -> str:
    frames, _, height, width = result.frames.shape
    steps = f"{request.num_inference_steps} steps"
    if (report := result.report) is not None:
        steps = f"{report.num_steps} steps ({report.num_computed} computed, {report.num_reused} reused)"
    return (
        f"{frames} frames of {width}x{height}, {steps}, {result.num_forwards} forwards, "
        f"{result.denoising_seconds:.1f} s denoising, {result.total_seconds:.1f} s in all"
    )


def _sidecar(
    pipe: Any,
    run: SharedSettings,
    job: Job,
    *,
    result: Generation,
    config: EasyCacheConfig | None,
    plain: Generation | None,
    comparison: VideoComparison | None,
) -> dict[str, Any]:
    return {
        "settings": job.settings,
        "easycache": None if config is None else config.to_dict(),
        "result": _figures(result),
        "without_reuse": None if plain is None else _figures(plain),
        "comparison": None if comparison is None else comparison.to_dict(),
        "environment": describe_environment(
            device=execution_device(pipe), weights=run.spec.weights, model=run.spec.name
        ),
    }


def _figures(result: Generation) -> dict[str, Any]:
    report = result.report
    return {
        "num_computed": None if report is None else report.num_computed,
        "num_reused": None if report is None else report.num_reused,
        "num_forwards": result.num_forwards,
        "denoising_seconds": result.denoising_seconds,
        "total_seconds": result.total_seconds,
    }

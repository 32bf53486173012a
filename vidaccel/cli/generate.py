"""`vidaccel generate "PROMPT"`: videos from prompts, with EasyCache unless told otherwise."""

# Annotations are evaluated when the command is loaded, so that the help names what the tables hold at that moment.
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vidaccel.catalog.models import EMBEDDED_MODEL
from vidaccel.catalog.registry import spec_of
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.cli.inputs import KeepFrames, check_files, read_arguments, read_inputs
from vidaccel.cli.jobs import SharedSettings, read_prompts, video_paths
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.predictors import PREDICTORS
from vidaccel.errors import UserError
from vidaccel.generation.expert_files import LoraFile, TransformerFile
from vidaccel.generation.request import request_for

_CLIP = "a video, a folder of images or a .safetensors file of frames"


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What the video shows; one video a prompt.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    model: Annotated[str, typer.Option(help="A name of `vidaccel models`, a folder, or a Hub id.")] = EMBEDDED_MODEL,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[high=|low=]FILE[:WEIGHT]",
            help="A LoRA (.safetensors) to load into the model, for two experts perhaps into one; may be repeated.",
        ),
    ] = None,
    transformer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[high=|low=]FILE",
            help="A .safetensors or .gguf file instead of the model's own transformer; one for each of two experts.",
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the video should not show. (default: the pipeline's)")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, or a reference picture.")] = None,
    last_image: Annotated[Path | None, typer.Option(help="Last frame, for first-and-last-frame models.")] = None,
    video: Annotated[Path | None, typer.Option(help=f"What is changed, followed or continued: {_CLIP}.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Where --video is made anew (white): frames, or one image.")] = None,
    pose_video: Annotated[Path | None, typer.Option(help="Poses to follow, for Animate.")] = None,
    face_video: Annotated[Path | None, typer.Option(help="Faces to follow, for Animate.")] = None,
    keep_frames: KeepFrames = False,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps. (default: the model's)")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Weight of the prompt; 1 switches guidance off. (default: the model's)")
    ] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Weight against the negative prompt, for models with distilled guidance.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same video.")] = 0,
    num_frames: Annotated[
        int | None, typer.Option(help="Frames, for most models 4k + 1. (default: the model's)")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the file. (default: the model's)")] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A further argument of the pipeline's call; may be repeated."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="EasyCache: tolerated accumulated change; 0 never reuses. (default: the model's preset)"),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(help="EasyCache: first steps that are always computed. (default: the model's preset)"),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(help=f"EasyCache: what a reused step returns: {', '.join(PREDICTORS)}. (default: transformation)"),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Without EasyCache: compute every step.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run without reuse too; print time, forwards, PSNR, SSIM.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write EasyCache's decisions as NAME.report.json and NAME.report.png.")
    ] = False,
    attention: Annotated[str, typer.Option(help="Attention backend: native, xformers, flash, sage, ...")] = "native",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    offload: Annotated[str, typer.Option(help="none, model, sequential, group: what waits in main memory.")] = "none",
    compile_blocks: Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks.")] = False,
    output: Annotated[Path, typer.Option(help="A folder, or for one prompt a .mp4, .mkv or .mov file.")] = Path(
        "outputs"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Make one video for each prompt. A finished video is skipped when the command is run again."""
    if no_cache and (compare or report):
        raise UserError("--compare and --report show what EasyCache does; leave out --no-cache.")
    files = {
        "image": image,
        "last_image": last_image,
        "video": video,
        "mask": mask,
        "pose_video": pose_video,
        "face_video": face_video,
    }
    flags = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
        "seed": seed,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "fps": fps,
        "arguments": read_arguments(argument or []),
    }
    texts = read_prompts(prompts or [], prompt_file)
    reuse = {"threshold": threshold, "warmup_steps": warmup_steps, "predictor": predictor}
    given: dict[str, Any] = {name: value for name, value in reuse.items() if value is not None}
    EasyCacheConfig(**given)
    for text in texts:  # what is wrong with a flag is said before anything large is loaded
        request_for(GenerationDefaults(), text, **flags)
    check_files(files)
    loras = tuple(LoraFile.parse(text) for text in lora or [])
    transformer_files = tuple(TransformerFile.parse(text) for text in transformer or [])
    spec = spec_of(model)
    run = SharedSettings(
        spec=spec,
        easycache=None if no_cache else given,
        device=device,
        dtype=dtype,
        attention=attention,
        offload=offload,
        compile_blocks=compile_blocks,
        loras=loras,
        transformer_files=transformer_files,
        fps=spec.defaults.fps if fps is None else fps,
        compare=compare,
        report=report,
    )
    video_paths(texts, seed, output)
    from vidaccel.cli.runs import run_jobs  # loads PyTorch

    inputs = read_inputs(fps=run.fps, keep_frames=keep_frames, **files)
    requests = [request_for(spec.defaults, text, inputs=inputs, **flags) for text in texts]
    run_jobs(run, requests, output=output, overwrite=overwrite)

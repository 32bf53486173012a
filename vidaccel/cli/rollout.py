"""`vidaccel rollout "PROMPT" --seconds 60`: minutes of video from a causal student, written while they are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.catalog.registry import spec_of
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.cli.console import console, say, say_warning
from vidaccel.cli.inputs import KeepFrames, check_files, read_inputs
from vidaccel.cli.jobs import video_paths
from vidaccel.errors import UserError
from vidaccel.generation.expert_files import LoraFile
from vidaccel.generation.options import check_options
from vidaccel.generation.request import request_for
from vidaccel.memory.policies import memory_forms
from vidaccel.rollout import PassMode
from vidaccel.rollout.grid import MOST_SECONDS
from vidaccel.rollout.session_request import SessionRequest
from vidaccel.rollout.timeline import PromptTimeline
from vidaccel.sessions import MAIN
from vidaccel.video.paths import PLAYER

if TYPE_CHECKING:
    from vidaccel.cli.rollout_request import RolloutRequest

_PASSES = get_args(PassMode)


def rollout(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the video shows; or give --timeline.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of the video, rounded up to whole chunks.")] = 10.0,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Prompts over time: lines such as `0:12.5 the ball rolls`, `1:05 | hard | night`, and for the camera "
            "`0:02-0:02.75 | camera | right 1`."
        ),
    ] = None,
    camera: Annotated[
        str | None,
        typer.Option(
            metavar="MOVES",
            help="How the camera moves, in seconds and widths of the picture: `2-2.75 right 1, 6-6.75 left 1`. For "
            "students that are told of it; --timeline has lines for it too. (default: it holds)",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A causal student: a name of `vidaccel models`, a folder, or a Hub id.")
    ] = EMBEDDED_STUDENT,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA (.safetensors) to load into the student; may be repeated."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show, with guidance.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame; scaled and cut to the size of the video.")] = None,
    video: Annotated[Path | None, typer.Option(help="A clip to continue; it is the start of the video.")] = None,
    keep_frames: KeepFrames = False,
    decode_start: Annotated[
        bool,
        typer.Option("--decode-start", help="Show --image or --video as the model decodes it, not as given."),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help=f"{memory_forms()}, in latent frames. (default: the student's)"),
    ] = None,
    keyframe_rule: Annotated[str | None, typer.Option(help="similarity, uniform or none.")] = None,
    similarity_threshold: Annotated[
        float | None, typer.Option(help="A chunk less similar than this to the one before is a keyframe.")
    ] = None,
    keyframe_interval: Annotated[
        int | None, typer.Option(help="Latent frames between keyframes of the rule uniform.")
    ] = None,
    prefill: Annotated[
        str | None, typer.Option(help="none, or linear: fill the slow part before it is needed.")
    ] = None,
    depth_every: Annotated[
        int | None,
        typer.Option(help="Keep the memory of every so many layers only, for students trained so. (default: all)"),
    ] = None,
    retrieve_by: Annotated[
        str | None,
        typer.Option(
            help="What comes back into the slow part: none, view (what the camera saw before and will see) or keys "
            "(what the present resembles)."
        ),
    ] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps a chunk. (default: the student's)")] = None,
    skip_steps: Annotated[
        str | None,
        typer.Option(metavar="STEPS", help="Steps of a chunk to leave out: 3, 2+3, or 3+4@0.15. (default: none)"),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Weight of the prompt; 1 switches guidance off. (default: the student's)")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same video, of any length.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. (default: the model's)")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of the video. (default: the model's)")] = None,
    attention: Annotated[str, typer.Option(help="Attention backend: native, flash, sage, ...")] = "native",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    passes: Annotated[
        str, typer.Option(help=f"How the transformer is run: {', '.join(_PASSES)} (CUDA graphs).")
    ] = "eager",
    decoder: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A small decoder instead of the model's own: taew2_1.safetensors (TAEHV)."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep every finished chunk there, to go on after an interrupt.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the session in --checkpoint.")] = False,
    branch: Annotated[str, typer.Option(help="The branch of the session to write.")] = MAIN,
    branch_from: Annotated[
        int | None, typer.Option(metavar="N", help="Make --branch of the first N chunks of another one, and go on.")
    ] = None,
    from_branch: Annotated[str, typer.Option(help="The branch that --branch-from takes chunks of.")] = MAIN,
    rewind: Annotated[
        int | None, typer.Option(metavar="N", help="With --resume: first give up all chunks of --branch but N.")
    ] = None,
    snapshot_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Chunks between exact states in the session; 0: none. Without one the rollout goes on as exactly, by "
            "a pass over every chunk before. (default: 1 for states below 64 MiB, else 20; --plan says their size)",
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say how much memory it would take.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write what was remembered when as NAME.report.json and .png.")
    ] = False,
    output: Annotated[
        str, typer.Option(help="A folder, a .mp4, .mkv or .mov file, or - for a player: `... --output - | ffplay -`.")
    ] = "outputs",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Make a video of any length in bounded memory, chunk after chunk. Finished chunks can be kept to go on from."""
    files = {"image": image, "video": video}
    flags = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "height": height,
        "width": width,
        "fps": fps,
    }
    prompts, spec = _timeline(prompt, timeline).with_camera(camera), spec_of(model)
    _check_flags(seconds, flags, files, decoder)
    _check_places(output, report=report, device=device, dtype=dtype)
    loras, mode = tuple(LoraFile.parse(text) for text in lora or []), _passes(passes)
    kept = SessionRequest.of(
        checkpoint,
        resume=resume,
        branch=branch,
        branch_from=branch_from,
        from_branch=from_branch,
        rewind=rewind,
        snapshot_every=snapshot_every,
    )
    from vidaccel.cli.rollout_request import RolloutRequest, StudentFolder, fitted_start, grid_of  # loads PyTorch
    from vidaccel.cli.rollout_run import run_rollout

    student = StudentFolder.of(spec)
    settings = student.request(prompts.spans[0].prompt, flags)
    keyframes = {"keyframe_rule": keyframe_rule, "keyframe_interval": keyframe_interval}
    more = {"similarity_threshold": similarity_threshold, "prefill": prefill, "retrieve_by": retrieve_by}
    sizes = student.memory(memory, **keyframes, **more, depth_every=depth_every)
    rate = spec.defaults.fps if fps is None else fps
    start = fitted_start(read_inputs(fps=rate, keep_frames=keep_frames, **files), (settings.height, settings.width))
    request = RolloutRequest(
        student=student,
        request=settings,
        timeline=prompts,
        memory=sizes,
        fps=rate,
        num_chunks=prompts.num_chunks(grid_of(student, sizes, rate, start), seconds),
        start=start,
        decode_start=decode_start,
        device=device,
        dtype=dtype,
        attention=attention,
        passes=mode,
        decoder=None if decoder is None else student.small_decoder(decoder),
        loras=loras,
        skip_steps=skip_steps,
    )
    if plan:
        return _show(request)
    file = None if output == PLAYER else video_paths([settings.prompt], seed, Path(output))[0]
    return run_rollout(request, output=file, asked=kept, report=report, overwrite=overwrite)


def _check_flags(
    seconds: float, flags: Mapping[str, Any], files: Mapping[str, Path | None], decoder: Path | None
) -> None:
    """Raise UserError for what is wrong whatever the model."""
    if None not in files.values():
        raise UserError("A video begins with an image or a clip; give --image or --video.")
    check_files({**files, "decoder": decoder})
    if not 0 < seconds <= MOST_SECONDS:
        raise UserError(f"`seconds` must be above 0 and at most {MOST_SECONDS:g}, got {seconds}.")
    request_for(GenerationDefaults(), "a prompt", **flags)


def _check_places(output: str, *, report: bool, device: str, dtype: str) -> None:
    """Raise UserError for a place to write to, or to run on, that cannot be."""
    if output == PLAYER and report:
        raise UserError("--report is written beside the video; give --output a file.")
    check_options(device=device, dtype=dtype)


def _timeline(prompt: str | None, file: Path | None) -> PromptTimeline:
    if prompt is not None and file is None:
        return PromptTimeline.single(prompt)
    if file is not None and prompt is None:
        return PromptTimeline.from_file(file)
    raise UserError("Say in quotes what the video shows, or give a file of prompts with --timeline; one of them.")


def _passes(name: str) -> PassMode:
    if name not in _PASSES:
        raise UserError(f"`passes` must be one of {', '.join(_PASSES)}; got {name!r}.")
    return cast(PassMode, name)


def _show(request: RolloutRequest) -> None:
    from vidaccel.cli.rollout_request import plan_table
    from vidaccel.machine.footprint import gigabytes

    for problem in request.timeline.problems(request.grid, num_chunks=request.num_chunks):
        say_warning(problem)
    plan = request.plan()
    console.print(plan_table(plan, request.grid))
    for words in request.camera_words():
        say(f"Camera: {words}.")
    if plan.fits:
        say("It fits.")
        return
    advice = plan.advice()
    say("Does not fit. Suggested changes (cumulative):" if advice else "Does not fit.")
    for one in advice:
        fits = ", fits" if one.fits else ""
        say(f"  {one.change}: {gigabytes(one.saved_bytes)} less, {gigabytes(one.total_bytes)} in all{fits}")

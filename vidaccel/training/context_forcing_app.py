"""`vidaccel train context-forcing`: distil a teacher-forced student into few steps with its long memory."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vidaccel.catalog.models import EMBEDDED_TEACHER
from vidaccel.errors import UserError, check_share
from vidaccel.training.console_app import (
    Checkpointing,
    Compile,
    Device,
    Layers,
    Output,
    Resume,
    Seconds,
    Seed,
    TeacherShare,
    Toy,
    check_folder,
    check_output,
    draw,
    failures,
    folder_bytes,
    layers_of,
    show_with_bank,
)

if TYPE_CHECKING:
    from vidaccel.training.causal_config import CausalTrainingConfig
    from vidaccel.training.context_forcing_config import ContextForcingConfig
    from vidaccel.training.self_rollout import StartShares

_SECONDS = 1200.0
_TOY_UPDATES = 3
_TOY_THRESHOLD = 0.99


def context_forcing(
    output: Output,
    init: Annotated[
        str, typer.Option(help="Teacher-forced student: a checkpoint, a name or a folder; or what it begins from.")
    ] = EMBEDDED_TEACHER,
    teacher_seconds: Annotated[
        float | None,
        typer.Option(help="First make the teacher from --init, for so long, in OUTPUT/teacher; beside --seconds."),
    ] = None,
    teacher_steps: Annotated[int | None, typer.Option(help="In steps, instead.")] = None,
    layers: Layers = None,
    stage: Annotated[
        Literal["1", "2", "both"],
        typer.Option(help="1: short rollouts from nothing; 2: contextual, with what is remembered; both in turn."),
    ] = "both",
    first_share: Annotated[float, typer.Option(help="Share of stage 1 in both.")] = 0.2,
    view: Annotated[
        Literal["long", "short"],
        typer.Option(help="What teacher and critic see in stage 2: all that is remembered, or the last chunk."),
    ] = "long",
    start: Annotated[
        Literal["as-is", "short", "ignore"],
        typer.Option(help="What the student begins as; short, ignore: made without recall from --base."),
    ] = "as-is",
    base: Annotated[str, typer.Option(help="Model that such a start is made from.")] = "wan-tiny",
    start_seconds: Annotated[float, typer.Option(help="Length of each part of such a start.")] = 25.0,
    start_steps: Annotated[int | None, typer.Option(help="In steps, instead.")] = None,
    seconds: Seconds = None,
    updates: Annotated[
        int | None, typer.Option(help="Length in updates of the student, instead; can be repeated bit by bit.")
    ] = None,
    resume: Resume = None,
    learning_rate: Annotated[float, typer.Option(help="Of the student.")] = 2e-4,
    critic_learning_rate: Annotated[float, typer.Option(help="Of the critic.")] = 5e-4,
    ratio: Annotated[int, typer.Option(help="Updates of the critic for one of the student.")] = 2,
    max_chunks: Annotated[int, typer.Option(help="Most chunks of a rollout.")] = 6,
    scored: Annotated[int, typer.Option(help="How many of them are judged, the last ones; 1 to 4.")] = 1,
    length: Annotated[
        Literal["linear", "exponential", "uniform", "fixed"], typer.Option(help="How rollouts grow to it.")
    ] = "linear",
    layouts: Annotated[
        Literal["drawn", "uniform", "every second", "keyframes"],
        typer.Option(help="What is remembered: any layout, or that of one rule."),
    ] = "drawn",
    shares: Annotated[
        str | None,
        typer.Option(
            help="What rollouts show, such as returns=0.4,arrivals=0.3,changes=0.15,anything=0.15,own=0.1; own: those "
            "that begin with nothing."
        ),
    ] = None,
    shift: Annotated[
        float, typer.Option(help="Of the noise levels of its four steps: a smaller one leaves less in the last.")
    ] = 3.0,
    guidance: Annotated[float, typer.Option(help="Of the teacher, cond + guidance (cond - uncond).")] = 0.0,
    levels: Annotated[int, typer.Option(help="Noise levels at which each chunk is judged.")] = 1,
    score_shift: Annotated[
        float, typer.Option(help="Of these levels; a smaller one has more with little noise.")
    ] = 3.0,
    flow_share: Annotated[
        float, typer.Option(help="Weight of flow matching beside it, on real returns and changes.")
    ] = 0.0,
    landmark_weight: Annotated[float, typer.Option(help="Extra weight of landmarks in both losses.")] = 0.0,
    error_share: Annotated[float, typer.Option(help="Samples that remember a chunk with a recycled error.")] = 0.25,
    error_slow: Annotated[bool, typer.Option("--error-slow", help="On older frames too.")] = False,
    batch_size: Annotated[int, typer.Option(help="Rollouts an iteration, on each card.")] = 64,
    lora: Annotated[
        int | None, typer.Option(help="Train adapters of this rank on the teacher's weights instead of all weights.")
    ] = None,
    checkpointing: Checkpointing = False,
    bank_clips: Annotated[int, typer.Option(help="Clips of 15 chunks to render and encode first.")] = 3000,
    bank_seconds: Annotated[float | None, typer.Option(help="Stop preparing them after this time.")] = None,
    validations: Annotated[int, typer.Option(help="How often recall is measured and a picture drawn.")] = 4,
    validation_trips: Annotated[int, typer.Option(help="Trips that recall is measured on.")] = 32,
    export: Annotated[Path | None, typer.Option(help="Folder to export the finished student to.")] = None,
    teacher_share: TeacherShare = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = False,
    toy: Toy = False,
) -> None:
    """Distil a student into few steps, with its own rollouts and a teacher that sees what it remembers."""
    _check_export(export, teacher_share, output=output)
    check_output(output, resume)
    teacher = _teacher(init, teacher_seconds, teacher_steps, layers, seed=seed, device=device, compile=compile, toy=toy)
    from vidaccel.training.context_forcing_config import ContextForcingConfig, MatchingRule, RolloutRule, UpdateRule
    from vidaccel.training.context_forcing_teacher import TEACHER_FOLDER
    from vidaccel.training.ranks import own_rank

    if seconds is None and updates is None:
        seconds, updates = (None, _TOY_UPDATES) if toy else (_SECONDS, None)
    config = ContextForcingConfig(
        init=init if teacher is None else str(output / TEACHER_FOLDER),
        seconds=seconds,
        updates=updates,
        stage=stage,
        first_share=first_share,
        start=start,
        base=base,
        start_seconds=start_seconds if start_steps is None else None,
        start_steps=start_steps,
        seed=seed,
        device=device,
        update=UpdateRule(learning_rate=learning_rate, critic_learning_rate=critic_learning_rate, ratio=ratio),
        rollout=RolloutRule(
            max_chunks=max_chunks,
            scored=scored,
            length=length,
            layouts=layouts,
            shares=_shares(shares),
            shift=shift,
        ),
        matching=MatchingRule(
            view=view,
            guidance=guidance,
            levels=levels,
            score_shift=score_shift,
            flow_share=flow_share,
            landmark_weight=landmark_weight,
            error_share=error_share,
            error_slow=error_slow,
        ),
        batch_size=batch_size,
        bank_clips=bank_clips,
        bank_seconds=bank_seconds,
        validations=validations,
        validation_trips=validation_trips,
        compile=compile,
        lora=lora,
        checkpointing=checkpointing,
    )
    if toy:
        config = config.rehearsal()
    if teacher is not None:
        resume = _taught(teacher, output, resume)
    _distilled(config, output, resume)
    if export is not None and own_rank() == 0:
        _export(output, export, teacher_share=teacher_share, toy=toy, device=device)


def _check_export(export: Path | None, teacher_share: float, *, output: Path) -> None:
    check_share("teacher-share", teacher_share)
    if export is None:
        if teacher_share > 0:
            raise UserError(
                f"--teacher-share {teacher_share:g} is of exported weights; give --export too, or leave it out."
            )
        return
    if export.exists():
        raise UserError(f"{export} is there already; give another --export.")
    places = export.resolve(), output.resolve()
    if any(one.is_relative_to(other) for one, other in (places, places[::-1])):
        raise UserError(f"--export must lie outside of --output, got {export} and {output}; give another --export.")
    check_folder("export", export)


def _teacher(
    init: str,
    seconds: float | None,
    steps: int | None,
    layers: str | None,
    *,
    seed: int,
    device: str,
    compile: bool,
    toy: bool,
) -> CausalTrainingConfig | None:
    """The settings of the teacher that is to be made first; None: it is there."""
    from vidaccel.training.context_forcing_teacher import teacher_config

    if seconds is None and steps is None:
        if layers is not None:
            raise UserError("`layers` is for a teacher that is made first; give --teacher-seconds too.")
        return None
    config = teacher_config(init, seconds=seconds, steps=steps, layers=layers_of(layers), seed=seed, device=device)
    config = replace(config, compile=compile)
    return config.rehearsal() if toy else config


def _taught(config: CausalTrainingConfig, output: Path, resume: Path | None) -> Path | None:
    """Make the teacher if it is not there; the checkpoint of the distillation to go on from, if there is one yet."""
    from vidaccel.training.checkpoint import STATE_FILE
    from vidaccel.training.context_forcing_teacher import TEACHER_FOLDER, has_teacher, train_teacher

    if resume is not None and resume.resolve() != output.resolve():
        raise UserError("A run that makes its teacher goes on in its own folder; give the same --output and --resume.")
    folder = output / TEACHER_FOLDER
    with failures():
        if not has_teacher(config, folder):
            show_with_bank(partial(train_teacher, config, folder), title="1 of 2: teacher")
            draw(folder, "training of the teacher")
    return resume if (output / STATE_FILE).is_file() else None


def _distilled(config: ContextForcingConfig, output: Path, resume: Path | None) -> None:
    from vidaccel.training.context_forcing_teacher import TEACHER_FOLDER
    from vidaccel.training.context_forcing_trainer import train_context_forcing
    from vidaccel.training.ranks import own_rank

    title = "2 of 2: distillation" if Path(config.init) == output / TEACHER_FOLDER else "distillation"
    start = partial(train_context_forcing, config, output, resume=resume)
    with failures():
        if own_rank() != 0:
            deque(start(), maxlen=0)  # the first one speaks
            return
        show_with_bank(start, title=title)
    draw(output, "distillation of the causal student")


def _shares(text: str | None) -> StartShares:
    from vidaccel.training.self_rollout import StartShares

    if text is None:
        return StartShares()
    names = ("returns", "arrivals", "changes", "anything", "own")
    parts = [part.partition("=") for part in text.split(",")]
    try:
        found = {name.strip(): float(value) for name, _, value in parts}
    except ValueError as error:
        raise UserError(
            f"`shares` must be names with numbers, such as returns=0.5,anything=0.5; got {text!r}."
        ) from error
    if unknown := sorted(set(found) - set(names)):
        raise UserError(f"`shares` may name {', '.join(names)}; got {unknown[0]!r}.")
    if len(found) < len(parts):
        raise UserError(f"`shares` must have each name once; got {text!r}.")
    return StartShares(**{**dict.fromkeys(names[:-1], 0.0), **found})


def _export(checkpoint: Path, folder: Path, *, teacher_share: float, toy: bool, device: str) -> None:
    from vidaccel.training.causal_export import export_student

    with failures():
        export_student(
            folder,
            causal=checkpoint,
            weights="toy" if toy else "trained",
            stochastic=True,
            teacher_share=teacher_share,
            threshold=_TOY_THRESHOLD if toy else None,
            device=device,
        )
    typer.echo(f"{folder}: {folder_bytes(folder) / 1e6:.1f} MB")

"""`vidaccel train offline`: distil a student onto targets that a teacher writes down once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vidaccel.catalog.models import EMBEDDED_TEACHER
from vidaccel.errors import check_amount
from vidaccel.training.console_app import (
    Compile,
    Device,
    Output,
    Resume,
    Seconds,
    Seed,
    Steps,
    Toy,
    check_output,
    draw,
    failures,
    length_of,
    show_with_bank,
)

if TYPE_CHECKING:
    from vidaccel.training.loop import Record

_TOY_STEPS = 2


def offline(
    output: Output,
    init: Annotated[
        str, typer.Option(help="Student to begin from: a checkpoint, a name or a folder.")
    ] = EMBEDDED_TEACHER,
    stage: Annotated[
        Literal["ode", "visited"],
        typer.Option(help="States on the teacher's ways from noise, or those that the student visits."),
    ] = "visited",
    teacher: Annotated[
        str | None, typer.Option(help="As --init; a later stage needs that of the first. (default: --init)")
    ] = None,
    teacher_steps: Annotated[int, typer.Option(help="Its Euler steps, a multiple of the student's.")] = 16,
    guidance: Annotated[float, typer.Option(help="Its weight of the prompt; 1 is none.")] = 1.0,
    history: Annotated[str, typer.Option(help="What it is shown: own, all that the student has, or last:N.")] = "own",
    states: Annotated[int, typer.Option(help="How many are collected.")] = 8192,
    states_per_rollout: Annotated[int, typer.Option(help="Kept of each rollout.")] = 2,
    own_chunks: Annotated[int, typer.Option(help="Chunks of a rollout after its real beginning.")] = 2,
    student_steps: Annotated[int, typer.Option(help="Steps of the student for a chunk.")] = 4,
    velocities: Annotated[bool, typer.Option("--velocities", help="Store the teacher's velocities too.")] = False,
    gigabytes: Annotated[float, typer.Option(help="Most that the targets may take on the disk.")] = 8.0,
    refresh_steps: Annotated[
        int | None, typer.Option(help="Collect anew so often, with the student as it is then. (default: once)")
    ] = None,
    seconds: Seconds = None,
    steps: Steps = None,
    resume: Resume = None,
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="States a step.")] = 64,
    bank_clips: Annotated[int, typer.Option(help="Clips to render and encode first.")] = 2000,
    validation_trips: Annotated[int, typer.Option(help="Trips that recall is measured on; 0 for none.")] = 64,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = False,
    toy: Toy = False,
) -> None:
    """Distil a student onto the ends of a teacher's ways, collected once and stored beside the checkpoint."""
    from vidaccel.training.loop import Schedule
    from vidaccel.training.offline.collect import CollectConfig
    from vidaccel.training.offline.distill import OfflineDistill
    from vidaccel.training.offline.trainer import OfflineTrainingConfig, train_offline

    check_amount("gigabytes", gigabytes)
    schedule = Schedule(
        **length_of(seconds, steps, toy, toy_steps=_TOY_STEPS),
        learning_rate=learning_rate,
        warmup_steps=50,
        ema_decay=0.99,
        num_validations=2,
    )
    config = OfflineTrainingConfig(
        init=init,
        collect=CollectConfig(
            kind=stage,
            num_states=states,
            states_per_rollout=states_per_rollout,
            own_chunks=own_chunks,
            student_steps=student_steps,
            keep_velocities=velocities,
            max_bytes=int(gigabytes * 1e9),
            seed=seed,
        ),
        distill=OfflineDistill(schedule=schedule, batch_size=batch_size, compile=compile),
        teacher=teacher,
        teacher_steps=teacher_steps,
        guidance_scale=guidance,
        history=history,
        refresh_steps=refresh_steps,
        bank_clips=bank_clips,
        validation_trips=validation_trips,
        device=device,
    )
    if toy:
        config = config.rehearsal()
    check_output(output, resume)

    def begun(on_bank: Callable[[int, int], None]) -> Iterator[Record]:
        return train_offline(config, output, resume=resume, on_bank=on_bank, on_targets=on_bank)

    with failures():
        show_with_bank(begun, title="offline distillation")
    draw(output, "offline distillation")

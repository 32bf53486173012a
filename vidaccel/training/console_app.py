"""What the commands of `vidaccel train` share: their common options, and how a training is shown."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vidaccel.errors import UserError

if TYPE_CHECKING:
    from vidaccel.training.loop import Record

Output = Annotated[Path, typer.Option(help="Folder to write.")]
Seconds = Annotated[float | None, typer.Option(help="Length by the clock, preparation and validation included.")]
Steps = Annotated[int | None, typer.Option(help="Length in steps, instead; such a run can be repeated bit by bit.")]
Resume = Annotated[Path | None, typer.Option(help="Checkpoint to go on from; a finished one gets a further round.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, data and noise.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
TeacherShare = Annotated[
    float, typer.Option(help="How much of the exported weights is the teacher's: it remembers better, and blurs.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the blocks first; pays in long runs on a GPU.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Compute inside blocks again for gradients: less memory, more time.")
]
Toy = Annotated[
    bool, typer.Option("--toy", help="Rehearse on a CPU: tiny batches, useless weights; short if no length is given.")
]
Layers = Annotated[str | None, typer.Option(help="Layers of its transformer to keep, such as 0,1,4,5.")]
_SHORT = ("loss", "critic_loss", "train_psnr", "frames_per_second")
_KEPT = ("as_seen",)  # of the latest validation


def length_of(seconds: float | None, steps: int | None, toy: bool, *, toy_steps: int = 4) -> dict[str, Any]:
    """The length of a round as `Schedule` takes it; a rehearsal that was given none has `toy_steps`."""
    rehearses = toy and seconds is None and steps is None
    return {"seconds": seconds, "steps": toy_steps if rehearses else steps}


def layers_of(text: str | None) -> tuple[int, ...] | None:
    """The numbers of `--layers`. Raises `UserError` for another text."""
    try:
        return None if text is None else tuple(int(layer) for layer in text.split(","))
    except ValueError as error:
        raise UserError(f"`layers` must be numbers with commas between them, such as 0,1,4,5; got {text!r}.") from error


def check_output(output: Path, resume: Path | None) -> None:
    """Raise `UserError` where a training would overwrite a checkpoint that it does not go on from, or cannot write."""
    from vidaccel.training.checkpoint import STATE_FILE

    if (output / STATE_FILE).exists() and (resume is None or resume.resolve() != output.resolve()):
        raise UserError(f"{output} holds a checkpoint; go on from it with --resume {output} or give another --output.")
    check_folder("output", output)


def check_folder(name: str, folder: Path) -> None:
    """Raise `UserError` where the option `name` cannot be a folder, because it, or what it is to lie in, is a file."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"`{name}` must be a folder, {place} is a file.")


@contextmanager
def failures() -> Iterator[None]:
    """A training that diverges and a full disk are the user's to solve."""
    try:
        yield
    except (FloatingPointError, OSError) as error:
        raise UserError(str(error)) from error


def show(records: Iterator[Record], *, title: str, first: Record | None = None) -> None:
    """A bar with the latest numbers; validations, and without a terminal every record, also as lines.

    A Ctrl-C or SIGTERM that comes meanwhile is raised in the training, which saves its last step.
    """
    is_terminal = Console(stderr=True).is_terminal
    kept: Record = {}
    shown = _chained(first, records)  # has a name, so that an interrupt does not close it
    with _bar(title, "") as (progress, task), _passing_interrupts_to(records):
        for record in shown:
            text = ", ".join(f"{name} {value:.4g}" for name, value in record.items())
            kept |= {name: record[name] for name in _KEPT if name in record}
            if is_progress := any(name in record for name in _SHORT):
                progress.update(task, total=1.0, completed=record["fraction"], text=_short(record | kept))
            if not is_progress or not is_terminal:
                progress.console.print(text, highlight=False, soft_wrap=True)


def show_with_bank(start: Callable[..., Iterator[Record]], *, title: str) -> None:
    """A bar while the bank is built, which happens before the first record, then the training."""
    with _bar("clips", "") as (progress, task):
        records = start(on_bank=lambda finished, total: progress.update(task, completed=finished, total=total))
        first = next(records)
        progress.remove_task(task)
        show(records, title=title, first=first)


def draw(output: Path, title: str) -> None:
    """The curves of the training in `output` as a picture beside its records."""
    from vidaccel.training.curves import draw_curves, read_records
    from vidaccel.training.loop import METRICS_FILE

    draw_curves(read_records(output / METRICS_FILE), output / "curves.png", title=title)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def _bar(title: str, text: str) -> Iterator[tuple[Progress, TaskID]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:.0f} % {task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(title, total=None, text=text)


@contextmanager
def _passing_interrupts_to(records: Iterator[Record]) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(records, Generator):
            records.throw(stop)  # one that is over raises it at once
        raise


def _chained(first: Record | None, records: Iterator[Record]) -> Iterator[Record]:
    if first is not None:
        yield first
    yield from records


def _short(record: Record) -> str:
    return ", ".join(f"{name} {record[name]:.4g}" for name in (*_SHORT, *_KEPT) if name in record)

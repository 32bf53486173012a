"""`vidaccel session show | branch | rewind | clean`: the saved session of a rollout, without its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from vidaccel.cli.console import console, say
from vidaccel.sessions import MAIN
from vidaccel.video.paths import existing_path

if TYPE_CHECKING:
    from vidaccel.sessions.branch import Branch
    from vidaccel.sessions.session import Session

app = typer.Typer(
    help="Look at the saved session of a rollout, branch it, rewind it, clean it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the session.")]


@app.command()
def show(folder: Folder) -> None:
    """List the branches: chunks, seconds of video, exact states, and bytes of their own and shared with others."""
    with _open(folder, read_only=True) as session:
        table = Table("branch", "from", "chunks", "seconds", "exact states after", "own", "shared")
        sizes = session.sizes()
        for name in session.branches:
            branch = session.branch(name)
            parent = "" if branch.parent is None else f"{branch.parent.branch} at {branch.parent.num_chunks}"
            states = ", ".join(map(str, branch.snapshots)) or "none"
            counts = (str(branch.num_chunks), _seconds(branch, session.settings.get("fps")), states)
            table.add_row(name, parent, *counts, decimal(sizes[name].own_bytes), decimal(sizes[name].shared_bytes))
        console.print(table)
        unused = session.unused_bytes()
    if unused:
        say(f"{decimal(unused)} belong to no branch; `vidaccel session clean {folder}` frees them")


@app.command()
def branch(
    folder: Folder,
    name: Annotated[str, typer.Option(help="Name of the new branch.")],
    from_branch: Annotated[str, typer.Option("--from", help="The branch it begins with.")] = MAIN,
    at: Annotated[int | None, typer.Option(help="How many chunks of it. (default: all)")] = None,
) -> None:
    """Make a branch that begins with the first chunks of another; they are shared, not copied."""
    with _open(folder) as session:
        made = session.new_branch(name, from_branch, at)
        say(f"{folder}: branch {name} has the first {made.num_chunks} chunks of {from_branch}; {_start(made)}")


@app.command()
def rewind(
    folder: Folder,
    to: Annotated[int, typer.Option(help="How many chunks are kept.")],
    branch: Annotated[str, typer.Option(help="The branch to rewind.")] = MAIN,
) -> None:
    """Give up all chunks of a branch but the first ones. Their files stay until `clean`."""
    with _open(folder) as session:
        before = session.branch(branch).num_chunks
        kept = session.rewind(branch, to)
        say(f"{folder}: branch {branch} has {kept.num_chunks} of its {before} chunks; {_start(kept)}")


@app.command()
def clean(folder: Folder) -> None:
    """Remove what no branch refers to: chunks given up, and what killed processes left."""
    with _open(folder) as session:
        say(f"{folder}: {decimal(session.collect())} freed")


def _open(folder: Path, *, read_only: bool = False) -> Session:
    """The session in a folder; loads PyTorch, so that a page of help does not wait for it."""
    existing_path(folder)
    from vidaccel.sessions.session import Session

    return Session.open(folder, read_only=read_only)


def _seconds(branch: Branch, fps: object) -> str:
    """Seconds of video of a branch, as far as its chunks and the session say."""
    frames = [values.get("num_pixel_frames") for values in branch.chunks()]
    known = [number for number in frames if isinstance(number, int)]
    if not isinstance(fps, int | float) or fps <= 0 or len(known) < len(frames):
        return "not noted"
    return f"{sum(known) / fps:.2f}"


def _start(branch: Branch) -> str:
    """From what the next chunk will be made."""
    last = max(branch.snapshots, default=None)
    if last == branch.num_chunks:
        return "it goes on from an exact state"
    return f"the last exact state is after {last} chunks" if last else "it has no exact state"

"""`vidaccel bench NAME`: a command for every row of `vidaccel.bench.table`, made of the benchmark's own fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.main import get_command

from vidaccel.bench import table
from vidaccel.cli.app import LazyCommand, LazyGroup
from vidaccel.cli.console import messages, say
from vidaccel.cli.jobs import check_writable
from vidaccel.errors import UserError

if TYPE_CHECKING:
    from vidaccel.bench.shared.benchmark import Benchmark, BenchProgress


class _BenchCommand(LazyCommand):
    def load(self) -> Any:
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(self.name, help=self.help)(_command(table.benchmark_class(str(self.name))))
        return get_command(alone)


class _Group(LazyGroup):
    kind = _BenchCommand

    def rows(self) -> Mapping[str, tuple[str, str]]:
        return table.BENCHMARKS


app = typer.Typer(
    cls=_Group,
    help="Measurements under a fixed protocol; an interrupted one goes on where it stopped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """A group also where nothing is registered."""


def _command(kind: type[Benchmark]) -> Callable[..., None]:
    """The command that runs a benchmark, with an option for every field."""
    types = get_type_hints(kind)
    options = {one.name: one for one in fields(kind)}

    def command(**given: Any) -> None:
        benchmark = kind(**{name: _read(options[name], types[name], value) for name, value in given.items()})
        check_writable(benchmark.output)
        with _bar() as on_progress:
            benchmark.run(on_progress=on_progress)
        say(f"results: {benchmark.output}")

    parameters = [_parameter(one, types[one.name], kind) for one in options.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _parameter(one: Field[Any], kind: Any, owner: type[Benchmark]) -> inspect.Parameter:
    """The option of a field. Values of a tuple, and those with a reader, are one text."""
    default: Any = one.default
    if default is MISSING:
        default = Path("results") / owner.name if one.name == "output" else inspect.Parameter.empty
    flag = one.metadata["flag"] or f"--{one.name.replace('_', '-')}"
    flags = () if default is True else (flag,)  # a switch that is on gets --no- from typer
    optional = default is None
    if one.metadata["read"] is not None or _item_of(kind) is not None:
        kind = str | None if optional else str
        default = None if optional else ",".join(map(str, default))
    annotation = Annotated[kind, typer.Option(*flags, help=one.metadata["help"])]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _read(one: Field[Any], kind: Any, value: Any) -> Any:
    """The field's value of what typer took from the command line."""
    if not isinstance(value, str):
        return value
    if one.metadata["read"] is not None:
        return one.metadata["read"](value)
    item = _item_of(kind)
    if item is None:
        return value
    try:
        found = tuple(item(part.strip()) for part in value.split(",") if part.strip())
        if value and not found:
            raise ValueError("no value")
    except ValueError as error:
        raise UserError(f"`{one.name}` must be values with commas between them, got {value!r}.") from error
    return found


def _item_of(kind: Any) -> type | None:
    """What the values of a tuple are: numbers, or texts also where only some are allowed; None for another type."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is not tuple:
        return None
    item = get_args(kind)[0]
    return item if item in (int, float) else str


@contextmanager
def _bar() -> Iterator[Callable[[BenchProgress], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task("loading", total=None)

        def advance(part: BenchProgress) -> None:
            progress.update(task, total=part.total, completed=part.done, description=part.label[:50])

        yield advance

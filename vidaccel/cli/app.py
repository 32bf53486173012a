"""The commands of `vidaccel` in one typer application."""

from typing import cast

import typer

from vidaccel.cli import bench
from vidaccel.cli.compare import compare
from vidaccel.cli.generate import generate
from vidaccel.cli.models import models
from vidaccel.training import app as training

# The errors typer raises for a wrong command line; the class above them has no public name in every version.
USAGE_ERRORS = cast(
    "tuple[type[typer.BadParameter], ...]",
    tuple(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"),
)

app = typer.Typer(
    help="Faster video diffusion: generate videos with EasyCache, compare and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(compare)
app.command()(models)
app.add_typer(bench.app, name="bench", no_args_is_help=True)
app.add_typer(training.app, name="train", no_args_is_help=True)

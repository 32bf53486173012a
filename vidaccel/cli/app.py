"""The commands of `vidaccel` in one typer application.

A command is imported when it is called: its libraries take seconds to load, and `vidaccel --help` should not.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, ClassVar, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

# The errors typer raises for a wrong command line; the class above them has no public name in every version.
USAGE_ERRORS = cast(
    "tuple[type[typer.BadParameter], ...]",
    tuple(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"),
)

COMMANDS = {
    "generate": ("vidaccel.cli.generate", "Make one video for each prompt."),
    "rollout": ("vidaccel.cli.rollout", "Make a video of any length in bounded memory, chunk after chunk."),
    "session": ("vidaccel.cli.sessions", "Look at the saved session of a rollout, branch it, rewind it, clean it."),
    "compare": (
        "vidaccel.cli.compare",
        "Compare two videos, or two sets of saved frames, of the same size and length.",
    ),
    "convert": ("vidaccel.cli.convert", "Turn published weights into a folder that the pipelines load."),
    "models": ("vidaccel.cli.models", "List the models that have a name; any other local folder or Hub id works too."),
    "bench": (
        "vidaccel.cli.bench",
        "Measurements under a fixed protocol; an interrupted one goes on where it stopped.",
    ),
    "train": (
        "vidaccel.training.app",
        "Train the embedded models: `vae`, `transformer`, `export`; then `causal`, `context-forcing` or `offline`, "
        "`export-causal`.",
    ),
}


class LazyCommand(TyperCommand):
    """A name with its line of help; the command of that name in `module` takes over when it is called.

    The module holds a typer application `app`, or a function with the command's name.
    """

    def __init__(self, name: str, *, module: str, help: str) -> None:
        super().__init__(name, help=help)
        self.module = module

    def load(self) -> Any:
        """Import the command itself."""
        module = import_module(self.module)
        if hasattr(module, "app"):
            return get_command(module.app)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(self.name)(getattr(module, str(self.name)))
        return get_command(alone)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.load().make_context(info_name, args, parent=parent, **extra)


class LazyGroup(TyperGroup):
    """The commands of a table, each one a `kind`.

    They are made at once and load nothing, so that typer lists them and finds the one near to a wrong name.
    """

    kind: ClassVar[type[LazyCommand]] = LazyCommand

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (module, line) in self.rows().items():
            self.add_command(self.kind(name, module=module, help=line))

    def rows(self) -> Mapping[str, tuple[str, str]]:
        """By name, the module and the line of help."""
        return COMMANDS


app = typer.Typer(
    cls=LazyGroup,
    help="Make videos faster with EasyCache and longer with rollouts, compare and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(version("vidaccel"))
    except PackageNotFoundError:
        typer.echo("not installed, runs from a checkout")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of all commands; having some makes the application a group."""

"""What the command line says and where: results on stdout, everything else on stderr, one line each."""

import logging
import os
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.markup import escape

console = Console(highlight=False, soft_wrap=True)
messages = Console(stderr=True, highlight=False, soft_wrap=True)


def say_error(text: str) -> None:
    """One line: what was wrong."""
    messages.print(f"[bold red]vidaccel:[/] {escape(_one_line(text))}")


def say_warning(text: str) -> None:
    """One line: what the user should know."""
    messages.print(f"[yellow]warning:[/] {escape(_one_line(text))}")


def say(text: str) -> None:
    """One line of result."""
    console.print(escape(text))


def set_up_messages() -> None:
    """Show vidaccel's own warnings as lines."""
    logger = logging.getLogger("vidaccel")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_LineHandler()]
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.showwarning = _show_warning


def quieten_libraries() -> None:
    """Keep the libraries below vidaccel quiet, those that are loaded and those that will be; loads none itself."""
    for name in ("diffusers", "transformers"):
        os.environ.setdefault(f"{name.upper()}_VERBOSITY", "error")
        if name in sys.modules:
            sys.modules[name].utils.logging.set_verbosity_error()


class _LineHandler(logging.Handler):
    """Prints a record as one line, and each text once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() in self._said:
            return
        self._said.add(record.getMessage())
        show = say_warning if record.levelno >= logging.WARNING else messages.print
        show(record.getMessage())


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        say_warning(str(message))


def _one_line(text: str) -> str:
    return " ".join(text.split())

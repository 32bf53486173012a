"""The frame of a benchmark's picture: what it was measured on stands above it; it is written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vidaccel.files.atomic import atomic_write
from vidaccel.machine.environment import hardware_line


@contextmanager
def saved_figure(
    path: Path, size: tuple[float, float], environments: Sequence[dict[str, Any]], **style: Any
) -> Iterator[Any]:
    """A matplotlib figure of `size` in inches to draw on; it is written to `path` afterwards.

    style: of the text that names the hardware of `environments`, such as its `fontsize`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(map(hardware_line, environments)), **{"fontsize": 8, **style})
    yield figure
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=150)

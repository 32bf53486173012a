"""The curves of a training as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vidaccel.errors import UserError
from vidaccel.training.loop import Record

_LOSSES = (
    "loss",
    "critic_loss",
    "flow_loss",
    "return_loss",
    "held_out_returns",
    "held_out_arrivals",
    "held_out_changes",
)


def read_records(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`. Raises `UserError` if it is missing or broken."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as training metrics ({error}).") from error


def draw_curves(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Losses above, validation below, over training seconds; a PNG."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name in _LOSSES:
        _line(upper, records, name)
    upper.set_yscale("log")
    upper.set_ylabel("loss")
    upper.set_title(title)
    for name in _validation_names(records):
        _line(lower, records, name)
    lower.set_ylabel("PSNR in dB" if "psnr" in _validation_names(records) else "share found by the oracle")
    lower.set_xlabel("training time in seconds")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _validation_names(records: Sequence[Record]) -> list[str]:
    common = ("step", "round", "updates", "seconds", "fraction", *_LOSSES)
    validations = [record for record in records if "loss" not in record and "critic_loss" not in record]
    return list(dict.fromkeys(name for record in validations for name in record if name not in common))


def _line(axes: Axes, records: Sequence[Record], name: str) -> None:
    points = [(record["seconds"], record[name]) for record in records if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "")

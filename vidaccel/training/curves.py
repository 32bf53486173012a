"""The curves of a training as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vidaccel.errors import UserError
from vidaccel.training.loop import Record

_COLOURS, _STYLES = 10, (("-", "."), ("--", "x"), (":", "+"))
_OTHER = ("step", "round", "updates", "seconds", "fraction")  # of every record


def read_records(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`. Raises `UserError` if it is missing or broken."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as training metrics ({error}).") from error


def draw_curves(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Losses above, validation below, and how clear landmarks are where that is known; over training seconds, a PNG."""
    losses, validations, likelihoods = panels(records)
    rows = {"loss": losses, "PSNR in dB" if "psnr" in validations else "share found by the oracle": validations}
    if likelihoods:
        rows["log-likelihood\nratio a pixel"] = likelihoods
    figure = Figure(figsize=(8.5, 2.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(rows), 1, sharex=True)
    for axes, (what, names) in zip(all_axes, rows.items(), strict=True):
        for number, name in enumerate(names):
            _line(axes, records, name, number)
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # covers no line
    all_axes[0].set_yscale("log")
    all_axes[0].set_title(title)
    all_axes[-1].set_xlabel("training time in seconds")
    figure.savefig(path, dpi=120)


def panels(records: Sequence[Record]) -> tuple[list[str], list[str], list[str]]:
    """Names of the losses, held-out ones included, of the other results of validations, and of likelihoods among these;
    in the order of the records."""
    validations = [record for record in records if "loss" not in record and "critic_loss" not in record]
    losses = dict.fromkeys(name for record in records for name in record if _is_loss(name))
    found = dict.fromkeys(name for record in validations for name in record if name not in (*_OTHER, *losses))
    likelihoods = [name for name in found if name.endswith("likelihood")]
    return list(losses), [name for name in found if name not in likelihoods], likelihoods


def _is_loss(name: str) -> bool:
    return name.endswith("loss") or name.startswith(("held_out_", "trained_"))


def _line(axes: Axes, records: Sequence[Record], name: str, number: int) -> None:
    """One line; where the ten colours begin again it is dashed, so that no two look alike."""
    style, marker = _STYLES[number // _COLOURS % len(_STYLES)]
    points = [(record["seconds"], record[name]) for record in records if name in record]
    if points:
        marker = marker if len(points) < 40 else ""
        axes.plot(*zip(*points, strict=True), style, color=f"C{number % _COLOURS}", label=name, marker=marker)

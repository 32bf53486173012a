"""Table and plot of the skipping benchmark, made from its summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.figure import saved_figure
from vidaccel.bench.shared.labels import Label, place_labels
from vidaccel.bench.shared.markdown import captions, markdown_table
from vidaccel.bench.skipping.summary import LEAST_SAVED, LEAST_SHARPNESS, MOST_LOSS, SHARES

Row = Mapping[str, Any]
_HEADER = {
    "as_seen": "return as seen",
    "valid": "return valid",
    "own_as_seen": "own return as seen",
    "first_valid": "own first visit valid",
    "subject": "subject right",
}


def skipping_markdown(content: Mapping[str, Any]) -> str:
    """How it was measured, and a line for every sampler."""
    protocol, rows = content["protocol"], content["summary"]["samplers"]
    lines = [
        "# Which steps can a chunk do without?",
        "",
        captions(content),
        "",
        f"The student takes {protocol['num_inference_steps']} steps a chunk and one clean pass, guidance "
        f"{protocol['guidance_scale']:g}, memory {protocol['memory']}. `skip:3` leaves out the pass of step 3 and "
        "goes on with the clean estimate of the step before (before the first step: with the chunk before); behind @ "
        "stands the relative change of that estimate between the first two steps below which it is done. `steps:3` "
        "has three noise levels of its own, `other-noise` is the student with other seeds. Everything is paired: the "
        "same prompts, trips and noise.",
        "",
        f"{protocol['num_prompts']} unseen prompts for {protocol['num_chunks']} chunks while the camera holds, "
        f"{protocol['num_trips']} trips whose prefix is the world's (return) and as many of the student's own. Saved: "
        "of all passes, clean ones included. Loss: flow-matching loss of the last 24 latent frames of held videos "
        "under `wan-tiny`, the many-step model, as a ratio to the plain student's, the mean over prompts; sharpness: "
        "variance of the Laplacian, likewise. Difference: of the latents, relative. Clearness: log-likelihood ratio of "
        "landmarks at own first visits, of the plain student's. Shares are read by the oracles, "
        "in brackets the difference to the plain student in points with its 95 % interval (bootstrap).",
        "",
        f"A rule passes that saves at least {LEAST_SAVED:.0%}, with the whole interval of the loss at most "
        f"{MOST_LOSS:g} and of the sharpness at least {LEAST_SHARPNESS:g}, and no share whose interval lies below 0. "
        "Open: an interval reaches over a bound.",
        "",
        *_table(rows),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    header = ["sampler", "saved", "held / return / own", "loss", "sharpness", "difference", "clearness"]
    header += [_HEADER[name] for name in SHARES] + ["verdict"]
    body = []
    for row in rows:
        parts = " / ".join(f"{found['mean']:.0%}" for found in row["saved_by_part"].values())
        cells = [f"`{row['sampler']}`", f"{row['saved']['mean']:.0%}", parts, _interval(row["loss"])]
        cells += [_interval(row["sharpness"]), f"{row['difference']['mean']:.2f}"]
        cells += ["-" if row["clearness"] is None else _interval(row["clearness"])]
        cells += [_share(row[name]) for name in SHARES] + [row["verdict"]]
        body.append(cells)
    return markdown_table(header, body)


def _interval(found: Row) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _share(found: Row | None) -> str:
    if found is None:
        return "-"
    share, difference = found["share"], found["difference"]
    points = ", ".join(f"{100 * difference[name]:+.0f}" for name in ("low", "high"))
    return f"{share['correct']} of {share['count']} ({100 * difference['mean']:+.0f} [{points}])"


def save_skipping_plot(path: Path, content: Mapping[str, Any]) -> Path:
    """Loss over what is saved, a point with its interval for every sampler; the dotted lines are the rule's."""
    with saved_figure(path, (8, 5), content["environments"]) as figure:
        axes = figure.subplots()
        labels = []
        for row in content["summary"]["samplers"]:
            saved, loss = 100 * row["saved"]["mean"], row["loss"]
            colour = {"passes": "#1a8a5a", "open": "#b58900", "-": "#4d4d4d"}.get(row["verdict"], "#d1410c")
            axes.vlines(saved, loss["low"], loss["high"], color=colour, alpha=0.4, linewidth=2.5)
            axes.plot([saved], [loss["mean"]], "o", color=colour, markersize=5)
            labels.append(Label(x=saved, y=loss["mean"], text=row["sampler"], colour=colour, size=8.5))
        axes.axhline(MOST_LOSS, color="#8c8c8c", linestyle=":", linewidth=1)
        axes.axvline(100 * LEAST_SAVED, color="#8c8c8c", linestyle=":", linewidth=1)
        axes.set_xlabel("passes saved (%), clean passes included")
        axes.set_ylabel("late flow-matching loss, of the plain student's")
        axes.spines[["top", "right"]].set_visible(False)
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.15 * (right - left))  # room for the names
        place_labels(axes, labels)
    return path

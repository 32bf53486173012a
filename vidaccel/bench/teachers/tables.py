"""The comparison of teachers for people: verdicts, a row an arm, and recall over updates as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.figure import saved_figure
from vidaccel.bench.shared.markdown import captions, markdown_table, share_text
from vidaccel.bench.shared.statistics import share_interval
from vidaccel.bench.teachers.keeps import LEAST_UPDATES

Content = Mapping[str, Any]
Record = Mapping[str, Any]
_COLUMNS = (
    ("as_seen", "memory", "as_seen"),
    ("blank", "blank", "as_seen"),
    ("window", "window", "as_seen"),
    ("swapped one", "swap", "swapped"),
    ("valid on return", "memory", "valid"),
    ("valid on first visit", "first visit", "valid"),
)
_LEAST_WIDTH = 8  # inches, for the line about the hardware
_COLOURS = {"long": "#0072b2", "short": "#d1410c"}


def teachers_markdown(content: Content) -> str:
    """The results as a page."""
    protocol = content["protocol"]
    lines = [
        "# Long against short teachers",
        "",
        f"Students are distilled for {protocol['updates']} updates of the generator by the same teacher, which sees "
        "all that the student remembers (long) or the last chunk only (short); so does the critic. They begin as the "
        "teacher (*as-is*), or as students that cannot recall. "
        f"{protocol['num_trips']} held-out trips, 4 steps, averaged last weights. as_seen: at the return, kind, colour "
        "and place of the landmark are those of the first visit; blank: frames of that place are not remembered; "
        "window: only the last frames are; swapped one: they show another landmark, and that one is shown. "
        "Intervals: Wilson, 95 %.",
        "",
        captions(content),
        "",
    ]
    claims = content["summary"].get("claims", [])
    lines += ["## The claims", ""] if claims else []
    for claim in claims:
        missing = f" ({claim['missing']})" if claim["missing"] else ""
        lines += [f"Start *{claim['start']}*: **{claim['verdict']}**{missing}.", ""]
        lines += markdown_table(("check", "value", "asked", "met"), [_check_row(check) for check in claim["checks"]])
        lines.append("")
    if found := content["summary"].get("keeping"):
        lines += ["## Does it keep what it recalls?", "", _keeping_text(found), ""]
    header = ("arm", "seed", "updates", "s", *(title for title, _, _ in _COLUMNS))
    lines += ["## The arms", "", *markdown_table(header, [_row(record) for record in content["records"]])]
    return "\n".join(lines) + "\n"


def _keeping_text(found: Record) -> str:
    updates = " and ".join(map(str, found["updates"]))
    long, short = (
        f"{one['share']:.1%} [{one['low']:.1%}, {one['high']:.1%}]"
        for one in (found["as_seen"][view] for view in ("long", "short"))
    )
    gap = found["difference"]
    early = "" if min(found["updates"]) >= LEAST_UPDATES else f" It is asked from {LEAST_UPDATES} updates on."
    return (
        f"Students that begin as the teacher, after {updates} updates, seeds {', '.join(map(str, found['seeds']))}: "
        f"as_seen {long} with the long view, {short} with the short one, a difference of {100 * gap['mean']:.1f} "
        f"points [{100 * gap['low']:.1f}, {100 * gap['high']:.1f}].{early}"
    )


def _check_row(check: Record) -> tuple[str, ...]:
    interval = f" [{check['low']:.1%}, {check['high']:.1%}]" if "low" in check else ""
    return check["check"], f"{check['value']:.1%}{interval}", check["asked"], "yes" if check["holds"] else "no"


def _row(record: Record) -> tuple[str, ...]:
    arm = {"teacher": "the teacher", "start": f"{record.get('start')}, before"}.get(
        record["kind"], f"{record.get('start')}, {record.get('view')}"
    )
    cells = [share_text(record["cells"][cell][name]) for _, cell, name in _COLUMNS]
    seconds = f"{record['seconds']:.0f}" if "seconds" in record else ""
    return arm, str(record.get("seed", "")), str(record.get("updates", "")), seconds, *cells


def save_teachers_plot(path: Path, content: Content) -> Path:
    """Recall over updates, a panel a start, a line an arm; the last points are of all trips, with their intervals."""
    arms = [record for record in content["records"] if record["kind"] == "arm"]
    starts = list(dict.fromkeys(arm["start"] for arm in arms)) or ["no arm"]
    with saved_figure(path, (max(5 * len(starts), _LEAST_WIDTH), 4), content["environments"], fontsize=7) as figure:
        for axes, start in zip(figure.subplots(1, len(starts), squeeze=False)[0], starts, strict=True):
            for arm in arms:
                if arm["start"] == start:
                    _draw_arm(axes, arm)
            axes.set_title(f"start: {start}", fontsize=9)
            axes.set_xlabel("updates of the generator")
            axes.set_ylim(-0.03, 1.03)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            handles, names = axes.get_legend_handles_labels()
            if handles:
                shown = dict(zip(names, handles, strict=True))
                axes.legend(shown.values(), shown.keys(), fontsize=8)
        figure.axes[0].set_ylabel("as seen at the first visit")
    return path


def _draw_arm(axes: Any, arm: Record) -> None:
    values = arm["cells"]["memory"]["as_seen"]
    share, (low, high) = sum(values) / len(values), share_interval(sum(values), len(values))
    before = [point for point in arm["curve"] if point["updates"] < arm["updates"]]
    points = [*((point["updates"], point["as_seen"]) for point in before), (arm["updates"], share)]
    colour = _COLOURS[arm["view"]]
    axes.plot(*zip(*points, strict=True), "-o", markersize=3, color=colour, label=f"{arm['view']} teacher")
    axes.vlines([arm["updates"]], [low], [high], color=colour, linewidth=2, alpha=0.5)

"""From the tries of the student benchmark to shares with Wilson's intervals, and means with bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vidaccel.bench.shared.statistics import entropy_of, share_of, summarise
from vidaccel.bench.student.changes import KEPT, WAITS, is_obeyed, kept_of
from vidaccel.bench.student.readings import SUBJECT, SeenLandmark, Shown
from vidaccel.bench.student.visits import TRUTH, landmark_of

Record = Mapping[str, Any]
LAST_WAIT = str(WAITS[-1])
IN_VIEW = ("colour", "shape", "background")
ONE_COLOUR = 0.5  # a purity; the world's own are above it, after the autoencoder too


def summarise_student(records: Sequence[Record]) -> dict[str, Any]:
    """`changes`, `visits`, `subjects`, `scenes`, `given`: rows for what was measured, empty lists for what was not.

    `ghosts`: of all holds of changes and first visits how many have no valid landmark, where the world has one.
    `colours`: whether valid landmarks are of one colour.
    """
    cells = {
        part: [one for one in records if one["part"] == part]
        for part in ("changes", "visits", "subjects", "scenes", "given")
    }
    truth = next((one for one in cells["visits"] if one["of"] == TRUTH), None)
    return {
        "changes": [_change_row(cell) for cell in cells["changes"]],
        "given": [_change_row(cell) for cell in cells["given"]],
        "visits": [_visit_row(cell, truth) for cell in cells["visits"]],
        "subjects": [row for cell in cells["subjects"] for row in _subject_rows(cell)],
        "scenes": [_scene_row(cell) for cell in cells["scenes"]],
        "ghosts": [row for part in ("changes", "visits") for row in _ghost_rows(part, cells[part])],
        "colours": _colour_rows(cells["changes"], cells["visits"]),
    }


def _change_row(cell: Record) -> dict[str, Any]:
    attribute, tries = cell["of"], cell["tries"]
    shown = [{name: Shown.from_dict(one) for name, one in each["shown"].items()} for each in tries]
    world = [{name: Shown.from_dict(one) for name, one in each["world"].items()} for each in tries]
    asked = [each["asked"] for each in tries]
    kept = _kept_shares(shown, asked)
    return {
        "attribute": attribute,
        "before": share_of(
            is_obeyed(one["before"], want[0], attribute) for one, want in zip(shown, asked, strict=True)
        ),
        "obeyed": {str(wait): _obeyed(shown, asked, attribute, str(wait)) for wait in WAITS},
        "within": share_of(
            any(is_obeyed(one[str(wait)], want[1], attribute) for wait in WAITS)
            for one, want in zip(shown, asked, strict=True)
        ),
        "kept": kept,
        "world": {
            "obeyed": _obeyed(world, asked, attribute, LAST_WAIT),
            "all": _kept_shares(world, asked)["all"],
        },
    }


def _obeyed(shown: Sequence[Mapping[str, Shown]], asked: Sequence[Any], attribute: str, when: str) -> Any:
    span = 0 if when == "before" else 1
    return share_of(is_obeyed(one[when], want[span], attribute) for one, want in zip(shown, asked, strict=True))


def _kept_shares(shown: Sequence[Mapping[str, Shown]], asked: Sequence[Any]) -> dict[str, Any]:
    """By what is kept, and "all": everything at once that could be read before."""
    kept = [kept_of(one["before"], one[LAST_WAIT], want) for one, want in zip(shown, asked, strict=True)]
    found = {name: share_of(one[name] for one in kept if name in one) for name in KEPT}
    return found | {"all": share_of(all(one.values()) for one in kept if one)}


def _visit_row(cell: Record, truth: Record | None) -> dict[str, Any]:
    marks = [landmark_of(one) for one in cell["tries"]]
    valid = [mark.kind for mark in marks if mark.is_valid]
    mean = summarise([[mark.likelihood] for mark in marks]).to_dict()
    row = {"of": cell["of"], "sampler": cell["sampler"], "likelihood": mean, "of_truth": None}
    if truth is not None:
        best = [landmark_of(one).likelihood for one in truth["tries"]]
        row["of_truth"] = float(mean["mean"]) / (sum(best) / len(best))
    return row | {
        "valid": share_of(mark.is_valid for mark in marks),
        "entropy": entropy_of(valid),
        "kinds": dict(Counter(valid).most_common()),
    }


def _subject_rows(cell: Record) -> list[dict[str, Any]]:
    tries = cell["tries"]
    rows = []
    for window in range(len(tries[0]["shown"])):
        pairs = [(Shown.from_dict(one["shown"][window]), one["asked"]) for one in tries]
        row: dict[str, Any] = {"until": (window + 1) * cell["window_seconds"]}
        for name in (*SUBJECT, "background"):
            row[name] = share_of(getattr(shown, name) == asked[name] for shown, asked in pairs)
        row["all"] = share_of(all(getattr(shown, name) == asked[name] for name in IN_VIEW) for shown, asked in pairs)
        first = [Shown.from_dict(one["shown"][0]).sharpness for one in tries]
        ratios = [[shown.sharpness / one] for (shown, _), one in zip(pairs, first, strict=True) if one > 0]
        rows.append(row | {"sharpness": summarise(ratios).to_dict() if ratios else None})
    return rows


def _scene_row(cell: Record) -> dict[str, Any]:
    pairs = [(Shown.from_dict(one["shown"]), one["asked"]) for one in cell["tries"]]
    places = [(shown, asked) for shown, asked in pairs if asked["background"] is not None]
    named = [(shown.landmark, asked["landmark"]) for shown, asked in pairs if asked["landmark"] is not None]
    return {
        "setting": cell["of"],
        "subject": share_of(all(getattr(shown, name) == asked[name] for name in SUBJECT[:2]) for shown, asked in pairs),
        "motion": share_of(shown.motion == asked["motion"] for shown, asked in pairs),
        "clear": share_of(shown.is_clear for shown, _ in pairs),
        "background": share_of(shown.background == asked["background"] for shown, asked in places),
        "valid": share_of(shown.landmark.is_valid for shown, _ in pairs),
        "named": share_of(mark.is_valid and mark.kind == kind for mark, kind in named),
    }


def _colour_rows(changes: Sequence[Record], visits: Sequence[Record]) -> list[dict[str, Any]]:
    """Purities of the colours of valid landmarks: that a video begins with, after their change, at first visits."""
    marks = {
        "before changes": _marks_of_changes(changes, "before"),
        "after changes of the landmark": _marks_of_changes(
            [cell for cell in changes if cell["of"] == "landmark"], LAST_WAIT
        ),
    }
    for cell in visits:
        name = "the world after the autoencoder" if cell["of"] == TRUTH else f"first visits, begun with {cell['of']}"
        sampler = "" if cell["of"] == TRUTH or cell["sampler"] == "student" else f", {cell['sampler']}"
        marks[name + sampler] = [landmark_of(one) for one in cell["tries"]]
    rows = []
    for name, found in marks.items():
        purities = [mark.purity for mark in found if mark.is_valid and mark.purity is not None]
        if purities:
            one = share_of(purity >= ONE_COLOUR for purity in purities)
            rows.append({"of": name, "purity": summarise([[purity] for purity in purities]).to_dict(), "one": one})
    return rows


def _marks_of_changes(cells: Sequence[Record], when: str) -> list[SeenLandmark]:
    return [Shown.from_dict(one["shown"][when]).landmark for cell in cells for one in cell["tries"]]


def _ghost_rows(part: str, cells: Sequence[Record]) -> list[dict[str, Any]]:
    tries = [(cell, one) for cell in cells for one in cell["tries"]]
    if part == "changes":
        shown = [one["shown"][when] for _, one in tries for when in ("before", LAST_WAIT)]
        holds = [Shown.from_dict(one).landmark for one in shown]
    else:
        holds = [landmark_of(one) for cell, one in tries if cell["of"] != TRUTH]
    found = share_of(not mark.is_valid for mark in holds)
    return [] if found is None else [{"part": part, "share": found}]

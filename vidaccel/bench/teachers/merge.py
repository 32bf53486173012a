"""Runs of one comparison that were made side by side, each with some of the arms, put together as one result."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.records import ResultFile, read_results
from vidaccel.errors import UserError

_KEY = ("kind", "seed", "start", "view")  # of a record; teacher and starts have some of them
_MOST_OTHER_READINGS = 0.05  # of trips, between two measurements of the same weights


def merged_results(path: Path, parts: Sequence[Path]) -> ResultFile:
    """The records of the result files `parts` as one that will be written to `path`; environments are kept.

    What several of them measured, which is the teacher and perhaps a start, is kept once, as the first has it.
    Raises UserError for a file that holds no such results, for another protocol, an arm that is there twice, or a
    teacher or start that others measured otherwise, and where `path` exists.
    """
    if path.exists():
        raise UserError(f"{path} holds results already; choose another output folder for what is merged.")
    contents = {part: read_results(part) for part in parts}
    if len(contents) < len(parts):
        raise UserError(f"`merge` names a folder twice: {', '.join(str(part.parent) for part in parts)}.")
    (first, known), *others = contents.items()
    if known["protocol"].get("benchmark") != path.stem:
        raise UserError(f"{first} holds no results of `vidaccel bench {path.stem}`.")
    for part, content in others:
        _check_protocol(first, known["protocol"], part, content["protocol"])
    _check_records(contents)
    results = ResultFile(path, protocol=known["protocol"], environment={})
    for part in parts:
        results.take(part, key=_KEY)
    results.records.sort(key=_place)
    return results


def copy_pictures(folders: Sequence[Path], target: Path) -> None:
    """Copy the pictures of the arms of all folders to `target`."""
    for folder in folders:
        for picture in sorted((folder / "pictures").glob("*.png")):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, target / picture.name)


def _check_protocol(first: Path, ours: Mapping[str, Any], part: Path, theirs: Mapping[str, Any]) -> None:
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if names:
        told = ", ".join(f"{name} {ours.get(name)} and {theirs.get(name)}" for name in names)
        raise UserError(f"{first} and {part} have other protocols and cannot be merged: {told}.")


def _check_records(contents: Mapping[Path, Mapping[str, Any]]) -> None:
    found: dict[tuple[Any, ...], tuple[Path, Mapping[str, Any]]] = {}
    for part, content in contents.items():
        for record in content["records"]:
            key = tuple(record.get(name) for name in _KEY)
            if key not in found:
                found[key] = (part, record)
                continue
            other, known = found[key]
            name = ", ".join(str(value) for value in key if value is not None)
            if record["kind"] == "arm":
                raise UserError(f"{other} and {part} hold the same record ({name}); every arm counts once.")
            if not _is_same(known, record):
                raise UserError(f"{other} and {part} measured another student as the same record ({name}).")


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two measurements may be of the same weights: a GPU does not round the same way twice."""
    for cell, values in one["cells"].items():
        pairs = list(zip(values["as_seen"], other["cells"][cell]["as_seen"], strict=True))
        if sum(ours != theirs for ours, theirs in pairs) > _MOST_OTHER_READINGS * len(pairs):
            return False
    return True


def _place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """In the order of one run: the teacher, then seed after seed the starts and their arms."""
    kinds = ("teacher", "start", "arm")
    return record.get("seed", -1), kinds.index(record["kind"]), record.get("start", ""), record.get("view", "")

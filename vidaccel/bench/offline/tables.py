"""The result of the offline benchmark for people: one row an arm, and what follows for the question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidaccel.bench.offline.arms import ARMS
from vidaccel.bench.offline.measures import DRIFT_CHUNKS
from vidaccel.bench.shared.markdown import Content, captions, markdown_table
from vidaccel.bench.shared.statistics import share_interval

_NAMES: dict[str, str] = {
    "teacher": "the teacher itself",
    "start": "its weights as the student, not trained",
    "begun": "begun on ways from noise",
    **{str(arm): f"{arm}: {text}" for arm, text in ARMS.items()},
}
_PAIRS = (("b", "a"), ("c", "b"), ("d", "b"))
_MEASURES = ("own_end_distance", "common_end_distance", "as_seen", "own_recall", "first_visit_likelihood")


def summarise_offline(records: Sequence[Mapping[str, Any]], *, trips: int) -> dict[str, Any]:
    """By pair of arms how much the first is above the second, and by arm the interval of as_seen over the trips.

    The intervals are Wilson's, of the held-out trips; one training seed an arm says nothing of other seeds.
    """
    found = {record["arm"]: record for record in records}
    pairs = {
        f"{first} - {second}": {
            name: round(found[first][name] - found[second][name], 5) for name in (*_MEASURES, "last_chunk_drift")
        }
        for first, second in _PAIRS
        if {first, second} <= found.keys()
    }
    intervals = {name: list(share_interval(round(record["as_seen"] * trips), trips)) for name, record in found.items()}
    return {"differences": pairs, "as_seen": intervals}


def offline_markdown(content: Content) -> str:
    """The results as a page."""
    protocol, summary = content["protocol"], content["summary"]
    lines = [
        "# Offline distillation on the storybook world",
        "",
        f"Teacher: {protocol['teacher_steps']} Euler steps; student: the same weights with {protocol['student_steps']} "
        "steps, each to clean latents and back with fresh noise. All arms go on from one student that was begun on the "
        f"teacher's ways from noise, for as many updates of {protocol['batch_size']} states, and are asked about "
        f"{protocol['num_states']} states; arm c in {protocol['refreshes']} parts, arm d of a teacher that is shown "
        f"{protocol['other_history']}. One training seed an arm; {protocol['trips']} held-out trips, 95 % intervals.",
        "",
        captions(content),
        "",
        *markdown_table(_COSTS, [_costs_row(record) for record in content["records"] if "updates" in record]),
        "",
        "Passes are over one chunk of one sample; costs are those of the arm alone, the beginning comes on top.",
        "",
        *markdown_table(_RESULTS, [_results_row(record, summary["as_seen"]) for record in content["records"]]),
        "",
        *_WHAT_IS_MEASURED,
        "",
        *_differences(summary["differences"]),
    ]
    return "\n".join(lines) + "\n"


_WHAT_IS_MEASURED = (
    "End distance: root mean square between the student's one-step ends and the teacher's, in units of the latents, at",
    "states that the student itself visits on held-out trips, and at those that the untrained one visits. As seen: the",
    "landmark of the second visit is that of the first; blank: its frames are not remembered; own: as seen in rollouts",
    "from nothing. Clearness: log-likelihood ratio a pixel of landmarks at first visits in these. Drift: how far the",
    f"statistics of the last of {DRIFT_CHUNKS} own chunks, and of the first, are from those of the truth.",
)
_COSTS = ("student", "updates", "loss at the end", "teacher passes", "student passes", "s collecting", "s training")
_RESULTS = (
    *("student", "end distance, own states", "at common states", "as seen", "blank", "own", "clearness"),
    *("share of truth's", "drift", "of the first chunk"),
)


def _costs_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _NAMES[record["arm"]],
        str(record["updates"]),
        f"{record['loss']:.4f}",
        str(record["teacher_forwards"]),
        str(record["student_forwards"]),
        f"{record['collect_seconds']:.1f}",
        f"{record['train_seconds']:.1f}",
    )


def _results_row(record: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    low, high = intervals[record["arm"]]
    clear, true = record["first_visit_likelihood"], record["true_likelihood"]
    return (
        _NAMES[record["arm"]],
        f"{record['own_end_distance']:.4f}",
        f"{record['common_end_distance']:.4f}",
        f"{record['as_seen']:.1%} [{low:.0%}, {high:.0%}]",
        f"{record['blank']:.1%}",
        f"{record['own_recall']:.1%}",
        f"{clear:.4f}",
        f"{clear / true:.0%}" if true > 0 else "",
        f"{record['last_chunk_drift']:.4f}",
        f"{record['first_chunk_drift']:.4f}",
    )


def _differences(differences: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not differences:
        return []
    names = list(next(iter(differences.values())))
    rows = [(pair, *(f"{values[name]:+.4f}" for name in names)) for pair, values in differences.items()]
    return markdown_table(("arms", *(name.replace("_", " ") for name in names)), rows)

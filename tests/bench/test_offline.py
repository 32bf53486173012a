"""The offline benchmark: arms that differ in their states alone, measures that say what they claim, a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.offline_world import save_tiny_student
from tests.support.tiny_donor import noise_bank, save_tiny_donor
from vidaccel.bench.offline import measures, offline
from vidaccel.bench.offline.measures import statistics_distance
from vidaccel.bench.offline.offline import OfflineBench
from vidaccel.bench.offline.tables import offline_markdown, summarise_offline
from vidaccel.errors import UserError
from vidaccel.training.trip_bank import TripBank

RECALL = {
    "as_seen": 0.5,
    "blank": 0.0,
    "own_recall": 0.25,
    "first_visit_likelihood": 0.1,
    "true_likelihood": 0.2,
}


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    donor = save_tiny_donor(tmp_path_factory.mktemp("donor"))
    return save_tiny_student(donor, tmp_path_factory.mktemp("student"))


@pytest.fixture(autouse=True)
def _clips_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips are not rendered and pictures are not read, which have tests of their own and take long."""

    def clips(vae: Any, tokenizer: Any, *, trips: Any, seconds: float) -> TripBank:
        return noise_bank(num_clips=len(trips), num_chunks=5)

    monkeypatch.setattr(offline, "build_trip_bank", clips)
    visits = SimpleNamespace(bank=noise_bank(num_clips=2, num_chunks=13))
    monkeypatch.setattr(offline, "ReturnVisits", lambda donor, seeds: visits)
    monkeypatch.setattr(measures, "recall_score", lambda student, visits, *, sampler: RECALL)


def bench(student: str, output: Path, **changes: Any) -> OfflineBench:
    sizes = {"updates": 2, "num_states": 8, "refreshes": 2, "bank_clips": 3, "trips": 2, "batch_size": 2}
    options = {"weights": "random", "device": "cpu", "teacher_steps": 4, "learning_rate": 0.1, **sizes}
    return OfflineBench(output=output, model=student, **{**options, **changes})


def content(output: Path) -> dict[str, Any]:
    return json.loads((output / "offline.json").read_text())


def test_every_arm_gets_as_many_updates_and_states_and_is_paid_for_once(student_folder: str, tmp_path: Path) -> None:
    summary = bench(student_folder, tmp_path).run()
    records = {record["arm"]: record for record in content(tmp_path)["records"]}
    assert list(records) == ["teacher", "start", "begun", "a", "b", "c", "d"]
    assert {records[arm]["updates"] for arm in ("begun", "a", "b", "c", "d")} == {2}
    passes = {arm: records[arm]["teacher_forwards"] for arm in ("begun", "a", "b", "c", "d")}
    assert passes["begun"] == 2 * 4, "two ways of four steps give eight states"
    assert passes["a"] == 0
    assert passes["b"] == passes["d"] > 0
    assert records["b"]["student_forwards"] == records["c"]["student_forwards"] == 4 * 2 * 4
    start = records["start"]
    assert start["own_end_distance"] == pytest.approx(start["common_end_distance"], abs=1e-4), "it is the common one"
    assert records["b"]["own_end_distance"] != records["d"]["own_end_distance"]
    assert {"b - a", "c - b", "d - b"} == set(summary["differences"])
    page = (tmp_path / "offline.md").read_text()
    assert all(words in page for words in ("d: as b, with another teacher", "50.0% [", "| b - a |"))
    assert not (tmp_path / "work").exists(), "targets and students are not results"


def test_fresh_states_are_as_many_as_stored_ones_also_when_updates_do_not_divide(
    student_folder: str, tmp_path: Path
) -> None:
    bench(student_folder, tmp_path, arms=("b", "c"), updates=5, num_states=16, refreshes=2).run()
    records = {record["arm"]: record for record in content(tmp_path)["records"]}
    assert records["c"]["student_forwards"] == records["b"]["student_forwards"] == 8 * 2 * 4


def test_it_goes_on_where_the_time_was_up_to_the_same_records(student_folder: str, tmp_path: Path) -> None:
    bench(student_folder, tmp_path / "whole").run()
    part = bench(student_folder, tmp_path / "parts", budget_seconds=1e-9)
    labels = []
    part.run(on_progress=lambda progress: labels.append(progress.label))
    assert labels == []
    clock = iter([0.0, 0.0, 0.0, 0.0, 9.0, 9.0, 9.0, 9.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OfflineBench, "_is_over", lambda self, began: next(clock) > 5)
        part.run()
    assert [record["arm"] for record in content(tmp_path / "parts")["records"]] == ["teacher", "start", "begun", "a"]
    assert (tmp_path / "parts" / "work").exists()
    replace(part, budget_seconds=None).run()
    whole, parts = (content(tmp_path / name)["records"] for name in ("whole", "parts"))
    for first, second in zip(whole, parts, strict=True):
        assert {name: value for name, value in first.items() if "seconds" not in name} == {
            name: value for name, value in second.items() if "seconds" not in name
        }


def test_the_distance_of_statistics_is_that_of_means_and_deviations() -> None:
    true = torch.randn(4, 3, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    assert statistics_distance(true, true) == 0
    assert statistics_distance(true + 0.5, true) == pytest.approx(0.5, abs=1e-5)
    mean = true.mean((0, 1, 3, 4), keepdim=True)
    doubled = statistics_distance(mean + 2 * (true - mean), true)
    assert doubled == pytest.approx(float(true.std((0, 1, 3, 4)).square().mean().sqrt()), abs=1e-4)


def test_the_page_says_which_way_it_went() -> None:
    values = {**RECALL, "own_end_distance": 0.3, "common_end_distance": 0.4, "last_chunk_drift": 0.1}
    costs = {"updates": 7, "loss": 0.1, "teacher_forwards": 5, "student_forwards": 6}
    seconds = {"collect_seconds": 1.0, "train_seconds": 2.0, "first_chunk_drift": 0.05, "environment": 0}
    records = [
        {"arm": "a", **values, **costs, **seconds},
        {"arm": "b", **values, **costs, **seconds, "as_seen": 0.75, "own_end_distance": 0.2},
    ]
    summary = summarise_offline(records, trips=64)
    assert summary["differences"]["b - a"]["as_seen"] == 0.25
    assert summary["differences"]["b - a"]["own_end_distance"] == -0.1
    assert summary["as_seen"]["b"][0] < 0.75 < summary["as_seen"]["b"][1]
    protocol = {"teacher_steps": 16, "student_steps": 4, "batch_size": 64, "num_states": 9, "refreshes": 8}
    page = offline_markdown(
        {
            "protocol": {**protocol, "other_history": "last:3", "trips": 64},
            "environments": [],
            "summary": summary,
            "records": records,
        }
    )
    assert "| b - a | -0.1000 | +0.0000 | +0.2500 |" in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ("a", "e")}, "`arms` must be some of a, b, c, d"),
        ({"arms": ()}, "got none"),
        ({"other_history": "own"}, "must differ"),
        ({"updates": 0}, "`updates`"),
        ({"train_seconds": 0.0}, "above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        bench("wan-tiny-causal", tmp_path, **changes)

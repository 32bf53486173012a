"""The comparison of teachers: its rule on made-up arms, and a tiny run that stops and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_donor import save_tiny_donor
from tests.support.tiny_student import ARCHITECTURE, save_forced
from vidaccel.bench.shared.records import ResultFile
from vidaccel.bench.teachers import teachers
from vidaccel.bench.teachers.keeps import keeping
from vidaccel.bench.teachers.rule import decide
from vidaccel.bench.teachers.teachers import TeachersBench
from vidaccel.errors import UserError
from vidaccel.models.causal_wan import CausalWanTransformer3DModel

TRIPS = 260


def cell(share: float, *, valid: float = 1.0, swapped: float = 0.0) -> dict[str, list[bool]]:
    def some(part: float) -> list[bool]:
        return [index < round(part * TRIPS) for index in range(TRIPS)]

    return {"as_seen": some(share), "valid": some(valid), "swapped": some(swapped)}


def arm(view: str, seed: int, *, seen: float, **changes: Any) -> dict[str, Any]:
    valid = changes.pop("valid", 1.0)
    cells = {
        "memory": cell(seen, valid=valid),
        "blank": cell(changes.pop("blank", 0.02)),
        "window": cell(changes.pop("window", 0.02)),
        "swap": cell(0.0, swapped=changes.pop("swapped", 0.95)),
        "first visit": cell(0.0, valid=changes.pop("first_valid", 1.0)),
    }
    return {"start": "ignore", "seed": seed, "view": view, "updates": 250, "cells": cells, **changes}


def arms(long: dict[str, Any], short: dict[str, Any], *, seeds: int = 3) -> list[dict[str, Any]]:
    return [
        arm(view, seed, **dict(values)) for seed in range(seeds) for view, values in (("long", long), ("short", short))
    ]


def failed(records: list[dict[str, Any]]) -> list[str]:
    return [check["check"] for check in decide(records, start="ignore")["checks"] if not check["holds"]]


def test_the_claim_holds_where_the_long_arm_recalls_and_all_controls_say_so():
    found = decide(arms({"seen": 0.97}, {"seen": 0.02}), start="ignore")
    assert found["verdict"] == "holds"
    assert len(found["checks"]) == 3 + 1 + 3 + 2
    assert found["missing"] == ""
    assert found["seeds"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("long", "short", "words"),
    [
        ({"seen": 0.97, "blank": 0.15}, {"seen": 0.02}, ["as_seen of the long arm, blank"]),
        ({"seen": 0.97, "window": 0.15}, {"seen": 0.02}, ["as_seen of the long arm, window"]),
        ({"seen": 0.97, "swapped": 0.7}, {"seen": 0.02}, ["swapped of the long arm, swap"]),
        ({"seen": 0.97, "valid": 0.9}, {"seen": 0.02}, ["validity on returns, long - short"]),
        ({"seen": 0.97, "first_valid": 0.9}, {"seen": 0.02}, ["validity on first visits, long - short"]),
        ({"seen": 0.22}, {"seen": 0.02}, ["lower bound of the pooled gain"]),
    ],
)
def test_every_condition_can_fail_the_claim_alone(long: dict[str, Any], short: dict[str, Any], words: list[str]):
    records = arms(long, short)
    assert failed(records) == words
    assert decide(records, start="ignore")["verdict"] == "fails"


def test_a_long_arm_that_is_clearer_than_the_short_one_is_no_failure():
    assert failed(arms({"seen": 0.97}, {"seen": 0.02, "valid": 0.5, "first_valid": 0.5})) == []


def test_one_seed_without_the_gain_is_enough_to_fail():
    records = arms({"seen": 0.97}, {"seen": 0.02})
    records[2] = arm("long", 1, seen=0.15)
    assert failed(records) == ["gain of as_seen, seed 1"]


def test_bounds_belong_to_the_success_but_the_lower_bound_must_be_above():
    records = arms({"seen": 0.5, "blank": 0.1, "swapped": 0.8}, {"seen": 0.3})
    checks = {check["check"]: check for check in decide(records, start="ignore")["checks"]}
    assert checks["gain of as_seen, seed 0"]["holds"]
    assert not checks["lower bound of the pooled gain"]["holds"]


def test_too_few_seeds_trips_or_unequal_updates_decide_nothing():
    good = ({"seen": 0.97}, {"seen": 0.02})
    assert decide(arms(*good, seeds=2), start="ignore")["verdict"] == "not decided"
    assert decide(arms(*good), start="short")["verdict"] == "not decided"
    unequal = arms(*good)
    unequal[0] |= {"updates": 251}
    found = decide(unequal, start="ignore")
    assert (found["verdict"], found["seeds"]) == ("not decided", [1, 2])
    few = arms(*good)
    for record in few:
        record["cells"] = {
            name: {key: values[:100] for key, values in one.items()} for name, one in record["cells"].items()
        }
    assert decide(few, start="ignore")["missing"] == "100 of 256 trips"


def test_what_students_keep_is_pooled_over_the_seeds_that_have_both_views() -> None:
    records = [*arms({"seen": 0.9}, {"seen": 0.4}), arm("long", 3, seen=0.0)]
    records += [arm("long", 4, seen=0.0), arm("short", 4, seen=0.0) | {"updates": 251}]
    assert keeping(records) is None, "these began without recall"
    found = keeping([one | {"start": "as-is"} for one in records])
    assert found is not None
    assert (found["seeds"], found["updates"]) == ([0, 1, 2], [250])
    assert found["as_seen"]["long"]["share"] == pytest.approx(0.9)
    assert found["as_seen"]["short"]["share"] == pytest.approx(0.4)
    assert found["as_seen"]["long"]["low"] > found["as_seen"]["short"]["high"]
    assert found["difference"]["mean"] == pytest.approx(0.5)
    assert 0.4 < found["difference"]["low"] < 0.5 < found["difference"]["high"] < 0.6


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student to be the teacher, untrained; the model it shares networks with lies beside it."""
    folder = tmp_path_factory.mktemp("teacher")
    donor = save_tiny_donor(folder / "donor")
    torch.manual_seed(0)
    return save_forced(CausalWanTransformer3DModel(**ARCHITECTURE), folder / "student", init=donor)


def bench(init: str, output: Path, **changes: Any) -> TeachersBench:
    values: dict[str, Any] = {
        "init": init,
        "base": str(Path(init).parent / "donor"),
        "output": output,
        "device": "cpu",
        "starts": ("ignore",),
        "seeds": (0,),
        "updates": 2,
        "start_steps": 1,
        "num_trips": 2,
        "away_chunks": 1,
        "bank_clips": 2,
        "batch_size": 2,
        "num_chunks": 4,
        "curve_updates": 1,
    }
    return TeachersBench(**{**values, **changes})


@pytest.mark.slow
def test_a_run_without_time_begins_no_arm_and_the_next_ones_finish_it_without_repeating_anything(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench(init, tmp_path, budget_seconds=1e-9).run()
    assert first["claims"] == []
    content = json.loads((tmp_path / "teachers.json").read_text())
    assert [record["kind"] for record in content["records"]] == ["teacher"]
    second = bench(init, tmp_path).run()
    (claim,) = second["claims"]
    assert (claim["start"], claim["verdict"]) == ("ignore", "not decided")
    records = json.loads((tmp_path / "teachers.json").read_text())["records"]
    assert [record["kind"] for record in records] == ["teacher", "start", "arm", "arm"]
    long, short = records[2:]
    assert (long["view"], short["view"]) == ("long", "short")
    assert long["updates"] == short["updates"] == 2
    assert long["iterations"] == short["iterations"]
    assert [point["updates"] for point in long["curve"]] == [1, 2]
    assert len(long["cells"]["swap"]["swapped"]) == 2
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"ignore-long-0.png", "ignore-short-0.png"}
    assert "Start *ignore*: **not decided** (1 of 3 seeds" in (tmp_path / "teachers.md").read_text()
    monkeypatch.setattr(teachers, "load_beginning", lambda init: pytest.fail("there is nothing left to run"))
    assert bench(init, tmp_path).run() == second


@pytest.mark.slow
def test_what_begins_as_the_teacher_is_distilled_too_and_reported_without_a_verdict(init: str, tmp_path: Path) -> None:
    summary = bench(init, tmp_path, starts=("as-is",), base="there is none").run()
    assert summary["claims"] == []
    assert summary["keeping"]["seeds"] == [0]
    records = json.loads((tmp_path / "teachers.json").read_text())["records"]
    assert [record["kind"] for record in records] == ["teacher", "arm", "arm"]
    assert records[1]["cells"]["memory"] != {}
    page = (tmp_path / "teachers.md").read_text()
    assert "Students that begin as the teacher, after 2 updates, seeds 0: as_seen" in page
    assert "It is asked from 1000 updates on." in page
    assert "| the teacher |" in page


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for changes, words in (
        ({"starts": ("recall",)}, "`starts`"),
        ({"seeds": ()}, "must not be empty"),
        ({"updates": 0}, "`updates`"),
    ):
        with pytest.raises(UserError, match=words):
            bench("student", tmp_path, **changes)


def test_the_arms_of_a_pair_differ_in_the_view_alone(tmp_path: Path) -> None:
    made = bench("student", tmp_path, seeds=(3, 4), starts=("ignore", "short"))
    assert len(made.arms) == 8
    assert [arm["view"] for arm in made.arms] == ["long", "short"] * 4
    long, short = (made.config(3, view).recipe for view in ("long", "short"))
    assert {name for name in long if long[name] != short[name]} == {"view"}
    assert long["error_share"] == long["flow_share"] == long["guidance"] == 0


def finished(folder: Path, records: list[dict[str, Any]], *, commit: str = "a", **protocol: Any) -> Path:
    """A result file as a run leaves it, with a picture an arm."""
    settings = bench("student", folder, num_trips=TRIPS, updates=250, **protocol)
    settled = {"init": "student", "base": "donor"}
    environment = {
        "hardware": {"name": "a card"},
        "versions": {"torch": "2", "diffusers": "0"},
        "commit": commit,
        "weights": "trained",
        "date": "2026-11-29",
        "command": "vidaccel bench teachers",
    }
    results = ResultFile(settings.path("json"), protocol=settings.protocol(settled), environment=environment)
    cells = {name: cell(0.9) for name in ("memory", "blank", "window", "swap", "first visit")}
    results.add({"kind": "teacher", "cells": cells})
    for record in records:
        results.add({"kind": "arm", "seconds": 1.0, "curve": [], **record})
        picture = folder / "pictures" / f"ignore-{record['view']}-{record['seed']}.png"
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(b"picture")
    results.finish({})
    return folder


def test_runs_side_by_side_are_decided_as_one_run(tmp_path: Path) -> None:
    records = arms({"seen": 0.97}, {"seen": 0.02})
    whole = finished(tmp_path / "whole", records)
    parts = [
        finished(tmp_path / f"part{seed}", [one for one in records if one["seed"] == seed], commit="ab"[seed > 1])
        for seed in (2, 0, 1)
    ]
    alone, together = (
        bench("student", tmp_path / name, merge=tuple(map(str, folders))).run()
        for name, folders in (("alone", [whole]), ("together", parts))
    )
    assert together == alone
    assert together["claims"][0]["verdict"] == "holds"
    content = json.loads((tmp_path / "together" / "teachers.json").read_text())
    assert [record["kind"] for record in content["records"]] == ["teacher", *["arm"] * 6]
    assert [record.get("seed") for record in content["records"]] == [None, 0, 0, 1, 1, 2, 2]
    commits = [content["environments"][record["environment"]]["commit"] for record in content["records"]]
    assert commits == ["b", "a", "a", "a", "a", "b", "b"], "every record keeps where it was measured"
    assert len(list((tmp_path / "together" / "pictures").iterdir())) == 6
    assert (tmp_path / "together" / "teachers.png").exists()
    assert "Start *ignore*: **holds**" in (tmp_path / "together" / "teachers.md").read_text()


def test_what_does_not_belong_together_is_not_merged(tmp_path: Path) -> None:
    pair = arms({"seen": 0.97}, {"seen": 0.02}, seeds=1)
    first, again = (str(finished(tmp_path / name, pair)) for name in ("first", "again"))
    other = str(finished(tmp_path / "other", [], away_chunks=9))
    strange = finished(tmp_path / "strange", [])
    content = json.loads((strange / "teachers.json").read_text())
    content["records"][0]["cells"]["memory"] = cell(0.2)
    (strange / "teachers.json").write_text(json.dumps(content))
    (tmp_path / "empty").mkdir()
    for folders, words in (
        ((first, again), r"the same record \(arm, 0, ignore, long\)"),
        ((first, first), "names a folder twice"),
        ((first, other), "cannot be merged: away_chunks 1 and 9"),
        ((first, str(strange)), r"another student as the same record \(teacher\)"),
        ((first, str(tmp_path / "empty")), "holds no results"),
    ):
        with pytest.raises(UserError, match=words):
            bench("student", tmp_path / "merged", merge=folders).run()
        assert not (tmp_path / "merged" / "teachers.json").exists()
    with pytest.raises(UserError, match="holds results already"):
        bench("student", Path(first), merge=(again,)).run()

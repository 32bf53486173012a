"""A benchmark is one class in one file: a row of the table gives it a command, options, a protocol and results."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from vidaccel.bench import table
from vidaccel.bench.table import BENCHMARKS, benchmark_class
from vidaccel.cli import run

ROW = ("tests.support.colour_bench:ColourBench", "How often a prompt names a colour.")


@pytest.fixture(autouse=True)
def _colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BENCHMARKS", {**BENCHMARKS, "colours": ROW})


def bench(output: Path, *flags: str) -> int:
    return run(["bench", "colours", "--output", str(output), *flags])


def content(output: Path) -> dict[str, Any]:
    return json.loads((output / "colours.json").read_text())


def test_it_is_listed_with_its_line_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--help"]) == 0
    assert ROW[1] in capsys.readouterr().out
    assert run(["bench", "colours", "--help"]) == 0
    shown = capsys.readouterr().out
    for words in ("--colours", "Which colours.", "red,blue", "--num-prompts", "results/colours", "--as-share"):
        assert words in shown


def test_options_of_every_type_reach_it_and_its_protocol_has_the_recorded_ones(tmp_path: Path) -> None:
    assert bench(tmp_path, "--colours", "green, red", "--num-prompts", "5", "--as-share") == 0
    protocol = content(tmp_path)["protocol"]
    assert len(protocol.pop("texts")) == 5
    assert protocol == {"benchmark": "colours", "colours": ["green", "red"], "num_prompts": 5}
    assert all(0 <= share <= 1 for share in content(tmp_path)["summary"].values())
    assert "| green |" in (tmp_path / "colours.md").read_text()


def test_it_goes_on_where_it_stopped_and_refuses_another_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path) == 0
    stored = content(tmp_path)
    (tmp_path / "colours.json").write_text(json.dumps(stored | {"records": stored["records"][:1]}))
    assert bench(tmp_path, "--as-share") == 0
    assert content(tmp_path)["records"] == stored["records"]
    assert bench(tmp_path, "--num-prompts", "3") == 2
    assert "another protocol (num_prompts, texts)" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "words"), [(("--num-prompts", "0"), "`num_prompts`"), (("--sizes", "3"), "--sizes")])
def test_a_wrong_option_is_one_line(
    flags: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path / "out", *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*BENCHMARKS, "colours"])
def test_every_option_of_every_benchmark_has_its_help_and_its_name_is_that_of_its_row(name: str) -> None:
    kind = benchmark_class(name)
    assert kind.name == name
    assert all(one.metadata["help"] for one in fields(kind))


TIMED = [name for name in BENCHMARKS if "budget_seconds" in {one.name for one in fields(benchmark_class(name))}]


@pytest.mark.parametrize("name", TIMED)
def test_a_budget_that_is_none_is_refused_before_anything_is_loaded(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(TIMED) > 4
    asked = ["--folder", str(tmp_path)] if name == "commands" else []
    assert run(["bench", name, "--output", str(tmp_path / "out"), "--budget-seconds", "-1", *asked]) == 2
    assert "`budget_seconds` must be a finite number above 0, got -1.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

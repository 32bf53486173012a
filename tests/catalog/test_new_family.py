"""A family added to the one table at run time has all that the others have: a random model, videos, EasyCache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.catalog import test_family_matrix as matrix
from tests.support.family_runs import EVERY_THIRD, FamilyRuns
from tests.support.foreign_family import catalog_with_storm
from vidaccel import easycache_report
from vidaccel.catalog import pipelines, table
from vidaccel.cli import run
from vidaccel.generation.calls import fewest_steps
from vidaccel.video.files import read_video

WITHOUT_STORM = table.CATALOG
CHECKS = {
    mark.args[0]: check
    for check in vars(matrix).values()
    for mark in getattr(check, "pytestmark", [])
    if mark.name == "check" and list(inspect.signature(check).parameters) == ["family"]
}


@pytest.fixture(scope="module")
def _storm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CATALOG", catalog_with_storm())
        yield


@pytest.fixture(scope="module")
def runs(_storm: None) -> FamilyRuns:
    return FamilyRuns.with_usual_runs("storm")


@pytest.fixture
def family(runs: FamilyRuns) -> Iterator[FamilyRuns]:
    yield runs
    runs.take_off()


@pytest.mark.parametrize("check", CHECKS)
def test_a_new_family_passes_the_checks_of_all_families(check: str, family: FamilyRuns) -> None:
    CHECKS[check](family)


def test_its_rows_are_what_easycache_goes_by(family: FamilyRuns) -> None:
    assert family.fresh.report.decisions[-1].section == 1
    with family.easycached(EVERY_THIRD) as pipe:
        family.run(guidance_scale=3.0)
        assert easycache_report(pipe).num_reused > 0


@pytest.fixture
def folder(_storm: None, tmp_path: Path) -> Path:
    assert run(["models", "--make-random", "storm", str(tmp_path / "storm")]) == 0
    return tmp_path / "storm"


def test_a_new_family_is_listed_and_makes_a_video_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["models", "--families"]) == 0
    assert "storm" in capsys.readouterr().out
    video = tmp_path / "video.mp4"
    command = ["generate", "rain", "--model", str(folder), "--output", str(video), "--device", "cpu"]
    assert run([*command, "--num-frames", "8", "--warmup-steps", "3"]) == 0
    assert read_video(video)[0].shape == (8, 3, 32, 32)
    assert run([*command, "--num-frames", "9", "--overwrite"]) == 2
    assert "a multiple of 4" in capsys.readouterr().err


def test_without_its_rows_the_same_class_is_taken_for_the_one_it_derives_from(folder: Path, runs: Any) -> None:
    assert fewest_steps(runs.pipe) == 3
    assert pipelines.pipeline_class("StormPipeline") is type(runs.pipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CATALOG", WITHOUT_STORM)
        assert fewest_steps(runs.pipe) == 1
        assert pipelines.pipeline_class("StormPipeline") is None

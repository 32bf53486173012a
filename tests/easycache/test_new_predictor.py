"""A predictor is one row of one table: settings, command line and help know it from there, at run time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from tests.support.tiny_models import save_tiny_wan
from vidaccel import EasyCacheConfig
from vidaccel.bench.caching.easycache import EasyCacheBench
from vidaccel.cli import run
from vidaccel.easycache.predictors import PREDICTORS, Evaluation

FLAGS = ("--num-frames", "9", "--height", "32", "--width", "32", "--num-inference-steps", "12", "--warmup-steps", "3")


def test_a_row_is_all_that_a_new_predictor_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def halved(latents: Tensor, last: Evaluation, earlier: Evaluation | None) -> Tensor:
        seen.append(last.step_index)
        return last.output / 2

    folder = str(save_tiny_wan(tmp_path / "model"))
    video, threshold = str(tmp_path / "video.mp4"), ("--threshold", "inf")
    command = ("generate", "a red circle", "--model", folder, "--output", video, *FLAGS, *threshold, "--report")
    assert run([*command, "--predictor", "halved"]) == 2
    assert "`predictor` must be one of transformation, output, extrapolation or a function; got 'halved'." in (
        " ".join(capsys.readouterr().err.split())
    )
    monkeypatch.setitem(PREDICTORS, "halved", halved)
    assert run(["generate", "--help"]) == 0
    assert "halved" in capsys.readouterr().out
    assert EasyCacheConfig(predictor="halved").to_dict()["predictor"] == "halved"
    assert EasyCacheBench(output=tmp_path, predictors=("halved",)).predictors == ("halved",)
    assert run([*command, "--predictor", "halved"]) == 0
    assert seen
    assert set(seen) == {2}
    sidecar = json.loads((tmp_path / "video.json").read_text())
    assert sidecar["settings"]["easycache"] == {"threshold": "inf", "warmup_steps": 3, "predictor": "halved"}
    assert sidecar["result"]["num_reused"] == 8

"""The parts of the benchmarks: statistics, results that survive an interrupt, environment, tables and pictures."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.bench.caching.methods import easycache_methods, fewer_steps_methods, uniform_methods
from vidaccel.bench.caching.summary import equal_compute, summarise_methods
from vidaccel.bench.caching.tables import easycache_markdown
from vidaccel.bench.shared import records
from vidaccel.bench.shared.plots import save_pareto
from vidaccel.bench.shared.records import ResultFile
from vidaccel.bench.shared.statistics import (
    entropy_of,
    percentile,
    share_interval,
    share_of,
    summarise,
    value_at,
)
from vidaccel.easycache.rule import EasyCacheRule
from vidaccel.machine import environment
from vidaccel.machine.environment import command_line, describe_environment, package_commit


def test_a_summary_gives_mean_median_tail_and_an_interval_around_the_mean() -> None:
    summary = summarise([[30.0 + index] for index in range(21)])
    assert summary.count == 21
    assert summary.mean == summary.median == 40.0
    assert summary.percentile_5 == 31.0
    assert summary.minimum == 30.0
    spread = 1.96 * math.sqrt(sum((x - 40) ** 2 for x in range(30, 51)) / 21) / math.sqrt(21)
    assert summary.low == pytest.approx(40 - spread, abs=0.4)
    assert summary.high == pytest.approx(40 + spread, abs=0.4)
    assert summarise([[30.0 + index] for index in range(21)]) == summary


def test_the_interval_draws_prompts_and_not_videos() -> None:
    values = [20.0, 30.0, 40.0, 50.0]
    alone = summarise([[value] for value in values])
    repeated = summarise([[value] * 50 for value in values])
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.02)
    assert repeated.count == 200


def test_identical_videos_make_the_mean_infinite_and_leave_median_and_tail_readable() -> None:
    summary = summarise([[40.0], [41.0], [42.0], [math.inf]])
    assert summary.mean == math.inf
    assert summary.median == 41.5
    assert summary.percentile_5 == pytest.approx(40.15)
    assert json.loads(json.dumps(summary.to_dict(), allow_nan=False))["mean"] == "inf"
    assert percentile([1.0, math.inf], 50) == 1.0


def test_nothing_cannot_be_summarised() -> None:
    with pytest.raises(ValueError, match="nothing"):
        summarise([[], []])


def test_the_share_interval_is_wilsons() -> None:
    low, high = share_interval(90, 100)
    assert low == pytest.approx(0.8256, abs=1e-4)
    assert high == pytest.approx(0.9448, abs=1e-4)
    assert share_interval(64, 64)[1] == 1.0
    assert 0.93 < share_interval(64, 64)[0] < 0.95
    with pytest.raises(ValueError, match="count"):
        share_interval(0, 0)


def test_a_share_has_its_interval_and_none_of_nothing() -> None:
    low, high = share_interval(3, 4)
    assert share_of([True, False, True, True]) == {"correct": 3, "count": 4, "share": 0.75, "low": low, "high": high}
    assert share_of(iter([])) is None


def test_entropy_is_in_bits_of_how_often_each_name_comes() -> None:
    assert entropy_of(["a"] * 5) == 0
    assert entropy_of(["a", "b"] * 4) == 1
    assert entropy_of(["a", "a", "b", "c"]) == 1.5
    assert entropy_of([]) is None


def test_a_curve_is_read_between_its_points_and_nowhere_else() -> None:
    curve = [(0.5, 40.0), (0.25, 30.0), (1.0, math.inf)]
    assert value_at(curve, 0.4) == pytest.approx(36.0)
    assert value_at(curve, 0.5) == 40.0
    assert value_at(curve, 0.6) is None
    assert value_at([], 0.5) is None


def test_results_are_continued_by_the_same_protocol_and_refused_to_another(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.json"
    results = ResultFile(path, protocol={"steps": 50}, environment={"commit": "a", "date": "1"})
    results.add({"prompt": "p", "seed": 0, "psnr": "inf"})
    again = ResultFile(path, protocol={"steps": 50}, environment={"commit": "a", "date": "2"})
    assert again.find(prompt="p", seed=0) == {"prompt": "p", "seed": 0, "psnr": "inf", "environment": 0}
    assert again.find(prompt="q", seed=0) is None
    assert len(again.environments) == 1
    other_commit = ResultFile(path, protocol={"steps": 50}, environment={"commit": "b", "date": "2"})
    other_commit.add({"prompt": "q", "seed": 0})
    assert [record["environment"] for record in other_commit.records] == [0, 1]
    with pytest.raises(ValueError, match=r"another protocol \(steps\)"):
        ResultFile(path, protocol={"steps": 30}, environment={})


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"records": []}',
        "",
        '{"protocol": [], "environments": [], "records": []}',
        '{"protocol": {}, "environments": 3, "records": []}',
    ],
)
def test_a_file_of_something_else_is_neither_read_nor_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no results"):
        ResultFile(path, protocol={}, environment={})
    assert path.read_text() == text


def test_an_interrupted_write_keeps_the_records_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    results = ResultFile(path, protocol={}, environment={})
    results.add({"prompt": "p"})
    before = path.read_text()

    def interrupted(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(records.json, "dumps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            results.add({"prompt": "q"})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_json_cannot_hold_is_an_error_and_not_written(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "results.json", protocol={}, environment={})
    with pytest.raises(ValueError, match="JSON"):
        results.add({"psnr": math.inf})
    assert not any(tmp_path.iterdir())


def test_the_environment_names_hardware_versions_commit_command_and_weights() -> None:
    described = describe_environment(device=torch.device("cpu"), weights="toy", model="/somewhere/private/model")
    assert described["weights"] == "toy"
    assert described["model"] == "model"
    assert described["versions"]["torch"] == torch.__version__
    assert described["versions"]["diffusers"]
    assert described["hardware"]["cpu"] in described["hardware"]["name"]
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    with pytest.raises(ValueError, match="trained, toy, random"):
        describe_environment(device=torch.device("cpu"), weights="good", model="m")


def test_the_command_is_published_without_the_folders_of_the_machine() -> None:
    arguments = ["/home/me/bin/vidaccel", "bench", "speed", "--output=/home/me/out", "--prompt", "a b", "/data/model"]
    assert command_line(arguments) == "vidaccel bench speed --output=out --prompt 'a b' model"
    assert command_line(["vidaccel", "bench", "--models", "/a/plain,/b/routed,tiny"]) == (
        "vidaccel bench --models plain,routed,tiny"
    )
    assert command_line(["/lib/vidaccel/__main__.py", "bench"]) == "python -m vidaccel bench"


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(environment.COMMIT_VARIABLE, raising=False)
    package = tmp_path / "vidaccel"
    (package / "bench").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(environment, "__file__", str(package / "machine" / "environment.py"))
    monkeypatch.setattr(environment, "_installed_commit", lambda: None)
    assert package_commit() == "unknown"
    identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
    for command in (["init", "-q"], ["add", "vidaccel/__init__.py"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert package_commit() == head.stdout.strip()
    (package / "__init__.py").write_text("changed = True")
    assert package_commit() == head.stdout.strip() + "+changes"
    monkeypatch.setenv(environment.COMMIT_VARIABLE, "abc")
    assert package_commit() == "abc"


def test_an_installed_copy_inside_a_foreign_repository_does_not_take_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(environment.COMMIT_VARIABLE, raising=False)
    package = tmp_path / "venv" / "vidaccel"
    (package / "bench").mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "other.py").touch()
    identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
    for command in (["init", "-q"], ["add", "other.py"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(environment, "__file__", str(package / "machine" / "environment.py"))
    monkeypatch.setattr(environment, "_installed_commit", lambda: None)
    assert package_commit() == "unknown"


@pytest.mark.parametrize("predictor", ["transformation", "output"])
def test_the_uniform_baseline_computes_every_kth_step_after_the_warm_up(predictor: str) -> None:
    for method in uniform_methods(predictor, (2, 4), warmup_steps=5):
        assert method.easycache is not None
        rule = EasyCacheRule(method.easycache)
        pattern = ""
        for step in range(20):
            latents = torch.full((1, 4), float(step) ** 2)
            decision = rule.decide([latents], step_index=step, num_steps=20)
            pattern += "C" if decision.computed else "."
            if decision.computed:
                rule.record("cond", [latents], [2 * latents + torch.randn(1, 4)])
            else:
                rule.predict("cond", [latents])
        interval = int(method.parameter)
        asked = "".join("C" if step < 5 or step == 19 or (step - 4) % interval == 0 else "." for step in range(20))
        assert pattern == asked


def test_methods_of_one_family_differ_in_their_parameter_only() -> None:
    first, second = easycache_methods("output", (0.05, 0.1), warmup_steps=7)
    assert first.family == second.family
    assert (first.parameter, second.parameter) == (0.05, 0.1)
    assert first.easycache is not None
    assert first.easycache.to_dict() | {"threshold": 0.1} == second.easycache.to_dict()  # type: ignore[union-attr]
    assert [method.num_inference_steps for method in fewer_steps_methods((30, 20))] == [30, 20]


def made_up_records() -> list[dict[str, Any]]:
    """Two prompts; a family whose PSNR falls by 10 dB from 50 to 20 forwards, and one with a single setting."""
    shared = {"ssim": 0.9, "ms_ssim": None, "temporal_difference_error": 0.01, "vmaf": 80.0, "decisions": "C."}
    shared |= {"unavailable": {"ms_ssim": "Frames are too small."}}
    videos = []
    for index, prompt in enumerate(("a red ball", "a blue | box")):
        videos.append({"prompt": prompt, "seed": index, "method": "plain", "family": "plain", "num_forwards": 100})
        for name, family, parameter, forwards, psnr in (
            ("A 0.1", "A", 0.1, 50, 40.0 + index),
            ("A 0.2", "A", 0.2, 20, 30.0 + index),
            ("again", "repeat", 0, 100, "inf"),
        ):
            figures = {"num_forwards": forwards, "forwards_share": forwards / 100, "fewer_forwards": 100 / forwards}
            video = {"prompt": prompt, "seed": index, "method": name, "family": family, "parameter": parameter}
            videos.append(video | figures | shared | {"time_ratio": 2.0, "psnr": psnr, "psnr_mean": psnr})
    return videos


def test_methods_are_summarised_and_compared_at_equal_compute() -> None:
    summary = summarise_methods(made_up_records())
    assert [method["method"] for method in summary["methods"]] == ["A 0.1", "A 0.2", "again"]
    first = summary["methods"][0]
    assert first["psnr"]["mean"] == 40.5
    assert first["num_forwards"]["mean"] == 50
    assert first["ms_ssim"] is None
    assert summary["methods"][2]["psnr"]["mean"] == "inf"
    (row,) = summary["equal_compute"]
    assert row["family"] == "A"
    assert row["psnr"]["2x"] == pytest.approx(40.5)
    assert row["psnr"]["2.5x"] == pytest.approx(30.5 + 10 * (40 - 20) / 30)
    assert row["psnr"]["1.5x"] is None
    assert equal_compute([]) == []


def test_the_table_holds_every_method_and_the_videos_asked_for() -> None:
    environment_ = describe_environment(device=torch.device("cpu"), weights="toy", model="m")
    protocol = {"num_prompts": 2, "seeds": [0], "num_frames": 9, "width": 32, "height": 16}
    protocol |= {"num_inference_steps": 50, "guidance_scale": 5.0}
    videos = made_up_records()
    content = {"protocol": protocol, "environments": [environment_], "summary": summarise_methods(videos)}
    text = easycache_markdown(content | {"records": videos}, detailed=["A 0.2"])
    assert "weights: toy" in text
    assert "| A 0.1 | 50.0 | 2.00x | 2.00x | 40.50 [40.00, 41.00] | 40.50 | 40.05 | 0.9000 | - |" in text
    assert "| again | 100.0 | 1.00x | 2.00x | inf [inf, inf] |" in text
    assert text.count("| a red ball |") == 1
    assert "Not available: ms_ssim. Frames are too small." in text
    assert "a blue \\| box" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_the_pareto_picture_is_drawn_without_points_at_infinity(tmp_path: Path) -> None:
    from PIL import Image

    methods = summarise_methods(made_up_records())["methods"]
    path = save_pareto(tmp_path / "new" / "pareto.png", methods, caption="made up")
    assert Image.open(path).size == (1500, 960)
    assert list(path.parent.iterdir()) == [path]
    save_pareto(tmp_path / "empty.png", [], caption="nothing")

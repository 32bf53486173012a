"""The benchmarks end to end at toy size: what they write, that they continue, and that their figures are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.bench.caching import easycache as easycache_bench
from vidaccel.bench.caching.easycache import EasyCacheBench
from vidaccel.bench.quality import (
    GENERATED,
    RECONSTRUCTED,
    RENDERED,
    QualityBench,
    reconstruct,
    summarise_quality,
)
from vidaccel.bench.shared.benchmark import BenchProgress
from vidaccel.generation.loading import load_pipeline

PROMPTS = ("a red circle moves right", "the blue square moves left")


@pytest.fixture(scope="module")
def pipe(tiny_wan_folder: Path) -> Any:
    return load_pipeline(str(tiny_wan_folder), device="cpu", dtype="float32")


def small_bench(output: Path, model: Path, **changes: Any) -> EasyCacheBench:
    settings: dict[str, Any] = {
        "prompts": PROMPTS,
        "predictors": ("transformation",),
        "thresholds": (0.0, 0.4),
        "uniform_intervals": (2,),
        "fewer_steps": (4,),
        "warmup_steps": 3,
        "num_inference_steps": 8,
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "metrics": ("psnr", "ssim"),
        "weights": "random",
        "device": "cpu",
        "dtype": "float32",
    }
    return EasyCacheBench(output=output, model=str(model), **(settings | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_wan_folder: Path, pipe: Any) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("bench")
    told: list[BenchProgress] = []
    small_bench(output, tiny_wan_folder).run(pipe=pipe, on_progress=told.append)
    return {"output": output, "told": told, "content": json.loads((output / "easycache.json").read_text())}


def records_of(content: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [record for record in content["records"] if part in record["method"]]


def test_the_easycache_bench_writes_json_table_and_picture(finished: dict[str, Any]) -> None:
    output, content = finished["output"], finished["content"]
    assert sorted(path.name for path in output.iterdir()) == ["easycache.json", "easycache.md", "easycache.png"]
    assert content["environments"][0]["weights"] == "random"
    assert content["protocol"]["prompts"] == list(PROMPTS)
    assert len(content["records"]) == 2 * 5 + 1
    assert [record["method"] for record in content["records"]].count("plain, second run") == 1
    text = (output / "easycache.md").read_text()
    assert all(method["method"] in text for method in content["summary"]["methods"])


def test_forwards_are_those_that_ran_and_agree_with_the_decisions(finished: dict[str, Any]) -> None:
    content = finished["content"]
    assert {record["num_forwards"] for record in records_of(content, "fewer steps, 4")} == {8}
    assert all(
        record["num_forwards"] == 16 for record in records_of(content, "threshold 0") if record["parameter"] == 0
    )
    uniform = records_of(content, "every k-th step")
    assert {record["decisions"] for record in uniform} == {"CCC.C.CC"}
    for record in [*uniform, *records_of(content, "threshold 0.4")]:
        assert record["num_forwards"] == 2 * record["decisions"].count("C")
        assert record["forwards_share"] == record["num_forwards"] / 16
    assert all("." in record["decisions"] for record in records_of(content, "threshold 0.4"))


def test_what_must_equal_the_plain_run_is_infinite_and_what_cannot_is_not(finished: dict[str, Any]) -> None:
    content = finished["content"]
    assert records_of(content, "second run")[0]["psnr"] == "inf"
    assert {record["psnr"] for record in content["records"] if record.get("decisions") == "C" * 8} == {"inf"}
    for part in ("fewer steps", "every k-th", "threshold 0.4"):
        assert all(5 < float(record["psnr"]) < 100 for record in records_of(content, part))


def test_time_is_compared_with_the_plain_run_of_the_same_prompt(finished: dict[str, Any]) -> None:
    plain = {
        record["prompt"]: record for record in records_of(finished["content"], "plain") if record["family"] == "plain"
    }
    for record in records_of(finished["content"], "every k-th"):
        beside = plain[record["prompt"]]["denoising_seconds"]
        assert record["plain_denoising_seconds"] == beside
        assert record["time_ratio"] == pytest.approx(beside / record["denoising_seconds"])


def test_progress_counts_up_to_all_videos_in_order(finished: dict[str, Any]) -> None:
    told = finished["told"]
    assert [progress.done for progress in told] == list(range(11))
    assert {progress.total for progress in told} == {11}
    assert told[0].label == f"plain: {PROMPTS[0]}"


def test_an_interrupted_bench_continues_with_what_is_missing(
    tmp_path: Path, tiny_wan_folder: Path, pipe: Any, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_bench(tmp_path, tiny_wan_folder)
    compared = 0

    def interrupt_at_the_third(*arguments: Any, **options: Any) -> Any:
        nonlocal compared
        compared += 1
        if compared == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    original = easycache_bench.compare_videos
    monkeypatch.setattr(easycache_bench, "compare_videos", interrupt_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        config.run(pipe=pipe)
    kept = json.loads((tmp_path / "easycache.json").read_text())["records"]
    assert len(kept) == 3
    summary = config.run(pipe=pipe)
    content = json.loads((tmp_path / "easycache.json").read_text())
    assert content["records"][:3] == kept
    assert content["summary"] == summary
    figures = ("method", "prompt", "seed", "num_forwards", "psnr", "ssim")
    continued, whole = (
        [{name: record.get(name) for name in figures} for record in part["records"]]
        for part in (content, finished["content"])
    )
    assert continued == whole
    monkeypatch.setattr(easycache_bench, "generate", None)
    assert config.run(pipe=pipe) == summary


def test_another_protocol_in_the_same_folder_is_refused(
    tiny_wan_folder: Path, pipe: Any, finished: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"another protocol \(num_inference_steps\)"):
        small_bench(finished["output"], tiny_wan_folder, num_inference_steps=9).run(pipe=pipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "`prompts`"),
        ({"num_prompts": 0}, "`num_prompts`"),
        ({"seeds": ()}, "`seeds`"),
        ({"predictors": ("taylor",)}, "taylor"),
        ({"uniform_intervals": (1,)}, "`uniform_intervals`"),
        ({"fewer_steps": (0,)}, "`fewer_steps`"),
        ({"metrics": ("ssim",)}, "psnr"),
        ({"thresholds": (-1.0,)}, "`threshold`"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_bench(tmp_path, tmp_path, **changes)


def test_prompts_default_to_the_worlds_unseen_ones_with_a_noise_seed_each(
    tmp_path: Path, tiny_wan_folder: Path
) -> None:
    config = small_bench(tmp_path, tiny_wan_folder, prompts=None, num_prompts=3, seeds=(0, 2))
    requests = config.requests(config.seeds)
    assert [request.seed for request in requests] == [0, 2000, 1, 2001, 2, 2002]
    assert len({request.prompt for request in requests}) == 3
    assert all(request.num_inference_steps == 8 for request in requests)


def test_the_quality_bench_reads_videos_clips_and_reconstructions_and_continues(
    tmp_path: Path, tiny_wan_folder: Path, pipe: Any
) -> None:
    config = QualityBench(
        output=tmp_path,
        model=str(tiny_wan_folder),
        num_prompts=2,
        num_clips=1,
        num_inference_steps=4,
        num_frames=5,
        threshold=math.inf,
        warmup_steps=2,
        keep_videos=True,
        weights="random",
        device="cpu",
    )
    summary = config.run(pipe=pipe)
    content = json.loads((tmp_path / "quality.json").read_text())
    assert content["summary"] == summary
    assert set(summary["accuracy"]) == {GENERATED, RENDERED, RECONSTRUCTED}
    assert summary["accuracy"][GENERATED]["colour"]["count"] == 2
    assert summary["accuracy"][RENDERED]["background"]["share"] == 1.0
    assert 0 < summary["vae_psnr"]["mean"] < 30
    assert [record["num_forwards"] for record in content["records"][:2]] == [6, 6]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["000.mp4", "001.mp4"]
    assert "95 % interval" in (tmp_path / "quality.md").read_text()
    assert config.run(pipe=pipe) == summary
    assert len(json.loads((tmp_path / "quality.json").read_text())["records"]) == 3


def test_shares_count_attributes_read_as_asked() -> None:
    asked = {"colour": "red", "shape": "ball", "motion": "left", "background": "night"}
    right, wrong = (
        {"asked": asked, "readings": {GENERATED: asked}},
        {"asked": asked, "readings": {GENERATED: asked | {"colour": None}}},
    )
    shares = summarise_quality([right, right, wrong])["accuracy"][GENERATED]
    assert (shares["colour"]["correct"], shares["colour"]["count"]) == (2, 3)
    assert shares["shape"]["share"] == 1.0
    assert shares["colour"]["low"] < 2 / 3 < shares["colour"]["high"]


def test_a_reconstruction_has_the_clips_shape_and_range(pipe: Any) -> None:
    video = torch.rand(5, 3, 32, 32)
    decoded = reconstruct(pipe, video)
    assert decoded.shape == video.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert torch.equal(decoded, reconstruct(pipe, video))

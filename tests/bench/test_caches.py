"""The cache benchmark at toy size: executed work, the caches of diffusers, shards, limits, figures at equal work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny_models import call_arguments, tiny_wan_t2v
from vidaccel.bench.caching import builtin_caches, passes
from vidaccel.bench.caching.builtin_caches import NoHookRegistered, Setting, calibrate_mag_cache, enabled_cache
from vidaccel.bench.caching.cache_summary import common_videos, paired_differences, per_prompt, summarise_caches
from vidaccel.bench.caching.caches import CachesBench
from vidaccel.bench.caching.methods import BUILTIN_NOTES, builtin_methods
from vidaccel.bench.caching.passes import MethodRunner, TimingPass
from vidaccel.bench.caching.schedules import random_schedule, scheduled_reuse
from vidaccel.bench.caching.work import BlockWork
from vidaccel.bench.shared.benchmark import BenchProgress
from vidaccel.bench.shared.records import ResultFile
from vidaccel.bench.shared.statistics import value_at
from vidaccel.cli import run
from vidaccel.easycache.apply import apply_easycache, remove_easycache
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline
from vidaccel.generation.request import GenerationRequest

PROMPTS = ("a red circle moves right", "the blue square moves left")
STEPS = 8


@pytest.fixture(scope="module")
def pipe(tiny_wan_folder: Path) -> Any:
    return load_pipeline(str(tiny_wan_folder), device="cpu", dtype="float32")


def small_bench(output: Path, model: Path, **changes: Any) -> CachesBench:
    settings: dict[str, Any] = {
        "prompts": PROMPTS,
        "seeds": (0,),
        "predictors": ("transformation",),
        "thresholds": (0.4, 10.0),
        "uniform_intervals": (2,),
        "fewer_steps": (4,),
        "warmup_steps": 3,
        "num_inference_steps": STEPS,
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "metrics": ("psnr", "ssim"),
        "timing_prompts": 1,
        "weights": "random",
        "device": "cpu",
        "dtype": "float32",
    }
    return CachesBench(output=output, model=str(model), **(settings | changes))


def content_of(folder: Path, name: str = "caches.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_wan_folder: Path, pipe: Any) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("caches")
    told: list[BenchProgress] = []
    small_bench(output, tiny_wan_folder).run(pipe=pipe, on_progress=told.append)
    return {"output": output, "told": told, "content": content_of(output)}


def videos(content: dict[str, Any], part: str = "") -> list[dict[str, Any]]:
    return [one for one in content["records"] if one["kind"] == "video" and part in one["method"]]


def test_the_bench_writes_json_table_and_picture_with_a_row_for_every_cache(finished: dict[str, Any]) -> None:
    output, content = finished["output"], finished["content"]
    assert sorted(path.name for path in output.iterdir()) == ["caches.json", "caches.md", "caches.png"]
    text = (output / "caches.md").read_text()
    assert all(method["method"] in text for method in content["summary"]["methods"])
    assert all(f"| {family} |" in text for family in BUILTIN_NOTES)
    assert "random" in text
    assert content["environments"][0]["hardware"]["name"] in text


def test_a_cache_that_raises_and_one_without_effect_have_their_reason(finished: dict[str, Any]) -> None:
    failures = {one["family"]: one["why"] for one in finished["content"]["summary"]["failures"]}
    assert set(failures) == {"FasterCache", "TaylorSeer, default patterns"}
    assert failures["FasterCache"].startswith("IndexError")
    assert "no hook was registered" in failures["TaylorSeer, default patterns"]
    text = (finished["output"] / "caches.md").read_text()
    assert text.count("**Not measured:") == 2


def test_work_is_counted_where_it_runs(finished: dict[str, Any]) -> None:
    content = finished["content"]
    for record in [*videos(content, "EasyCache"), *videos(content, "k-th"), *videos(content, "fewer")]:
        assert record["num_forwards"] == record["num_calls"]
        assert record["forwards_share"] == record["num_calls"] / (2 * STEPS)
    (taylor,) = {record["num_forwards"] for record in videos(content, "lite mode, interval 3")}
    assert taylor == 2 * 5  # steps 0 to 2, then 4 and 7
    assert all(record["num_calls"] == 2 * STEPS for record in videos(content, "SeaCache"))
    assert all(0 < record["forwards_share"] < 1 for record in videos(content, "MagCache, longer"))
    assert all(0.3 < record["forwards_share"] < 1 for record in videos(content, "Pyramid"))


def test_a_random_choice_computes_as_many_steps_as_the_easycache_it_stands_beside(finished: dict[str, Any]) -> None:
    content = finished["content"]
    for threshold in ("0.4", "10"):
        ours = videos(content, f"EasyCache, transformation reused, threshold {threshold}")
        others = videos(content, f"as many as at threshold {threshold}")
        assert len(ours) == len(others) == 2
        assert [one["num_forwards"] for one in ours] == [one["num_forwards"] for one in others]
        assert any("." in one["decisions"] for one in ours)


def test_what_equals_the_plain_run_is_infinite_and_the_rest_is_not(finished: dict[str, Any]) -> None:
    content = finished["content"]
    assert [record["psnr"] for record in videos(content, "second run")] == ["inf"]
    for part in ("fewer", "k-th", "random", "lite mode", "SeaCache, threshold 0.3"):
        assert all(5 < float(record["psnr"]) < 150 for record in videos(content, part))


def test_times_stand_apart_and_only_on_the_prompts_that_were_timed(finished: dict[str, Any]) -> None:
    records = finished["content"]["records"]
    timed = [record for record in records if record["kind"] == "time"]
    assert {record["prompt"] for record in timed} == {PROMPTS[0]}
    measured = {record["method"] for record in videos(finished["content"])} - {"plain, second run"}
    assert {record["method"] for record in timed} == measured
    for record in timed:
        assert record["time_ratio"] == pytest.approx(record["plain_seconds"] / record["denoising_seconds"])
    assert not any("seconds" in name for record in videos(finished["content"]) for name in record)


def test_progress_counts_videos(finished: dict[str, Any]) -> None:
    done = [progress.done for progress in finished["told"] if not progress.label.startswith("time of")]
    assert done == sorted(done)
    assert done[0] == 0


def test_shards_together_are_the_whole(
    tmp_path: Path, tiny_wan_folder: Path, pipe: Any, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"methods": ("random", "MagCache, threshold 0.1", "FasterCache")}
    for number in (1, 2):
        small_bench(tmp_path, tiny_wan_folder, shard=(number, 2), **few).run(pipe=pipe)
        kinds = {record["kind"] for record in content_of(tmp_path, f"caches-{number}-of-2.json")["records"]}
        assert kinds == {"plain", "video", "failure", "calibration"}
    monkeypatch.setattr(passes, "generate", None)  # nothing is left to make
    small_bench(tmp_path, tiny_wan_folder, timing_prompts=0, **few).run(pipe=pipe)
    figures = ("prompt", "method", "num_forwards", "psnr", "ssim", "decisions")
    together, whole = (
        sorted(
            [str(record[name]) for name in figures] for record in videos(content) if "second" not in record["method"]
        )
        for content in (content_of(tmp_path), finished["content"])
    )
    assert len(together) == 2 * 5  # EasyCache is what the random choice has to match
    assert all(record in whole for record in together)
    content = content_of(tmp_path)
    names = {record["method"] for record in videos(content)}
    rows = [row for row in finished["content"]["summary"]["methods"] if row["method"] in names]
    fields = ("method", "num_forwards", "psnr", "ssim")
    assert [[row[name] for name in fields] for row in content["summary"]["methods"]] == [
        [row[name] for name in fields] for row in rows
    ]


def test_a_shard_makes_nothing_that_is_in_the_result_already(
    tmp_path: Path, tiny_wan_folder: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"methods": ("fewer",), "timing_prompts": 0}
    small_bench(tmp_path, tiny_wan_folder, **few).run(pipe=pipe)
    monkeypatch.setattr(passes, "generate", None)
    small_bench(tmp_path, tiny_wan_folder, shard=(1, 2), **few).run(pipe=pipe)
    assert content_of(tmp_path, "caches-1-of-2.json")["records"] == content_of(tmp_path)["records"]


def test_a_limit_stops_between_videos_and_the_next_run_goes_on(
    tmp_path: Path, tiny_wan_folder: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = small_bench(tmp_path, tiny_wan_folder, methods=("fewer", "k-th"), time_limit=100.0)
    clock = iter([0.0, *[1.0] * 6, *[1000.0] * 1000])
    monkeypatch.setattr("vidaccel.bench.caching.caches.time.monotonic", lambda: next(clock))
    limited.run(pipe=pipe)
    kept = videos(content_of(tmp_path))
    assert 0 < len(kept) < 4
    assert "of 2 prompts" in (tmp_path / "caches.md").read_text()
    monkeypatch.undo()
    small_bench(tmp_path, tiny_wan_folder, methods=("fewer", "k-th"), timing_prompts=0).run(pipe=pipe)
    assert videos(content_of(tmp_path))[: len(kept)] == kept
    assert len(videos(content_of(tmp_path))) == 4


def test_no_time_at_all_still_writes_the_tables(tmp_path: Path, tiny_wan_folder: Path, pipe: Any) -> None:
    summary = small_bench(tmp_path, tiny_wan_folder, time_limit=0).run(pipe=pipe)
    assert summary["methods"] == []
    assert "No prompt is measured yet" in (tmp_path / "caches.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "`prompts`"),
        ({"shard": (3, 2)}, "`shard`"),
        ({"predictors": ("taylor",)}, "taylor"),
        ({"fixed_predictors": ("output",)}, "`fixed_predictors`"),
        ({"thresholds": (0.1, 0.1)}, "`thresholds`"),
        ({"thresholds": (-1.0,)}, "`threshold`"),
        ({"metrics": ("ssim",)}, "psnr"),
        ({"time_limit": -1.0}, "`time_limit`"),
        ({"methods": ("nothing like it",)}, "`methods`"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_bench(tmp_path, tmp_path, **changes)


def test_a_shard_that_is_none_is_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert run(["bench", "caches", "--shard", "two", "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "`shard` must be i/n" in line


def test_the_work_of_a_plain_forward_is_that_of_its_formula() -> None:
    pipe = tiny_wan_t2v()
    arguments = call_arguments(pipe, num_inference_steps=2)
    with BlockWork([pipe.transformer]).watch() as work:
        pipe(**arguments)
    width, feed_forward, tokens, words = 24, 32, 3 * 2 * 2, arguments["prompt_embeds"].shape[1]
    self_attention = 8 * tokens * width**2 + 4 * tokens**2 * width
    cross_attention = 4 * tokens * width**2 + 4 * words * width**2 + 4 * tokens * words * width
    block = self_attention + cross_attention + 4 * tokens * width * feed_forward
    assert work.operations == 2 * 2 * 2 * block  # steps, branches, blocks
    counted = work.operations
    pipe(**arguments)
    assert work.operations == counted  # nothing is watched after the block


@pytest.mark.parametrize("method", builtin_methods(warmup_steps=3), ids=lambda method: method.name)
def test_a_cache_leaves_no_trace(method: Any) -> None:
    pipe = tiny_wan_t2v()
    setting = Setting(num_inference_steps=2, mag_ratios=(1.0, 1.0))
    assert method.cache is not None
    try:
        with enabled_cache(pipe, method.cache, setting) as num_hooks:
            assert num_hooks > 0
    except NoHookRegistered:
        assert method.family == "TaylorSeer, default patterns"
    assert not pipe.transformer.is_cache_enabled
    assert builtin_caches._hooks(pipe.transformer) == set()
    apply_easycache(pipe)  # which refuses the hooks of other caches
    remove_easycache(pipe)


def test_an_enabling_that_fails_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_wan_t2v()
    monkeypatch.setattr(
        "diffusers.hooks.first_block_cache._apply_fbc_block_hook",
        lambda *_, **__: (_ for _ in ()).throw(ValueError("not registered")),
    )
    with (
        pytest.raises(ValueError, match="not registered"),
        enabled_cache(pipe, builtin_caches.first_block(0.1), Setting(num_inference_steps=2)),
    ):
        raise AssertionError
    assert builtin_caches._hooks(pipe.transformer) == set()


def test_calibration_is_the_mean_over_both_branches_and_starts_at_one(pipe: Any, tiny_wan_folder: Path) -> None:
    request = GenerationRequest(PROMPTS[0], num_inference_steps=4, num_frames=5, height=32, width=32)
    ratios = calibrate_mag_cache(pipe, request)
    assert len(ratios) == 4
    assert ratios[0] == 1.0
    assert all(0.2 < ratio < 5 for ratio in ratios)
    assert ratios == calibrate_mag_cache(pipe, request)


def test_a_schedule_computes_its_steps_and_equals_easycache_on_the_same_steps() -> None:
    pipe = tiny_wan_t2v()
    arguments = {"num_inference_steps": 12}
    every_third = EasyCacheConfig(threshold=math.inf, warmup_steps=4, max_consecutive_reuses=2, predictor="output")
    run_ = apply_easycache(pipe, every_third)
    expected = pipe(**call_arguments(pipe, **arguments)).frames
    assert run_.report is not None
    steps = [decision.step_index for decision in run_.report.decisions if decision.computed]
    remove_easycache(pipe)
    with scheduled_reuse(pipe, steps, predictor="output"):
        assert torch.equal(pipe(**call_arguments(pipe, **arguments)).frames, expected)
    other = (0, 1, 2, 7, 11)
    with BlockWork([pipe.transformer]).watch() as work:
        pipe(**call_arguments(pipe, **arguments))
        whole = work.operations
    with scheduled_reuse(pipe, other, predictor="output"), BlockWork([pipe.transformer]).watch() as work:
        pipe(**call_arguments(pipe, **arguments))
    assert work.operations * 12 == whole * len(other)


def test_a_random_schedule_keeps_warm_up_and_end_and_is_the_same_for_the_same_seed() -> None:
    steps = random_schedule(50, 20, warmup_steps=10, seed="3 a")
    assert len(steps) == 20
    assert steps[:10] == tuple(range(10))
    assert steps[-1] == 49
    assert steps == random_schedule(50, 20, warmup_steps=10, seed="3 a")
    assert steps != random_schedule(50, 20, warmup_steps=10, seed="4 a")
    assert random_schedule(50, 5, warmup_steps=10, seed="") == (*range(10), 49)
    assert random_schedule(6, 60, warmup_steps=10, seed="") == tuple(range(6))
    drawn = [step for seed in range(200) for step in random_schedule(50, 20, warmup_steps=10, seed=str(seed))[10:-1]]
    counts = np.bincount(drawn, minlength=50)[10:49]
    assert counts.min() > 20  # each of 39 steps is drawn in 9 of 39 schedules, 46 of 200


def line(family: str, slope: float, *, noise: float = 0.0) -> list[dict[str, Any]]:
    """Videos of a family whose PSNR is `slope` x share + a prompt's own height, with `noise` that alternates."""
    return [
        {
            "kind": "video",
            "family": family,
            "method": f"{family} {share}",
            "prompt": f"p{prompt}",
            "seed": 0,
            "forwards_share": share,
            "psnr": slope * share + 10 * prompt + noise * (-1) ** prompt,
        }
        for share in (0.3, 0.45, 0.6)
        for prompt in range(8)
    ]


def test_paired_differences_see_through_what_the_prompts_share() -> None:
    (row,) = paired_differences([*line("EasyCache, a", 20), *line("SeaCache", 10)])
    assert (row["family"], row["other"], row["num_prompts"]) == ("EasyCache, a", "SeaCache", 8)
    for speed in (2.0, 2.5, 3.0):
        figures = row[f"{speed:g}x"]
        assert all(figures[name] == pytest.approx(10 / speed) for name in ("mean", "low", "high"))
    assert row["1.5x"] is None  # beyond both curves
    (noisy,) = paired_differences([*line("EasyCache, a", 20, noise=2), *line("SeaCache", 10)])
    assert noisy["2x"]["low"] < 5 < noisy["2x"]["high"]
    assert noisy["2x"]["mean"] == pytest.approx(5)


def test_a_difference_is_taken_over_prompts_that_all_settings_have() -> None:
    records = [*line("EasyCache, a", 20), *line("SeaCache", 10)]
    del records[-1]
    (row,) = paired_differences(records)
    assert row["num_prompts"] == 7
    assert row["2x"]["mean"] == pytest.approx(5)
    infinite = [{**one, "psnr": "inf"} if one["forwards_share"] == 0.6 else one for one in line("EasyCache, a", 20)]
    assert paired_differences([*infinite, *line("SeaCache", 10)])[0]["2x"] is None


def test_every_prompt_is_read_off_its_own_curve() -> None:
    rows = per_prompt(line("SeaCache", 10))
    assert [row["prompt"] for row in rows] == [f"p{number}" for number in range(8)]
    assert [row["psnr"]["SeaCache"] for row in rows] == pytest.approx([5 + 10 * number for number in range(8)])


def test_a_family_that_never_saves_is_named() -> None:
    records = [
        {**one, "parameter": 1, "num_forwards": 16.0, "fewer_forwards": 1.0, "forwards_share": 1.0, "ssim": None}
        for one in line("SeaCache", 10)
    ]
    records = [
        {**one, "psnr_mean": 1.0, "ms_ssim": 1.0, "temporal_difference_error": 0.0, "vmaf": 1.0} for one in records
    ]
    assert summarise_caches(records)["no_effect"] == ["SeaCache"]


def test_a_shard_file_of_another_protocol_is_refused(tmp_path: Path) -> None:
    ResultFile(tmp_path / "one.json", protocol={"steps": 1}, environment={}).write()
    with pytest.raises(UserError, match=r"another protocol \(steps\)"):
        ResultFile(tmp_path / "two.json", protocol={"steps": 2}, environment={}).take(tmp_path / "one.json")


def test_records_that_are_taken_in_keep_their_environment_and_come_once(tmp_path: Path) -> None:
    first = ResultFile(tmp_path / "one.json", protocol={}, environment={"hardware": "a"})
    first.add({"method": "x"})
    second = ResultFile(tmp_path / "two.json", protocol={}, environment={"hardware": "b"})
    second.add({"method": "y"})
    second.take(tmp_path / "one.json", key=("method",))
    second.take(tmp_path / "one.json", key=("method",))
    assert [(one["method"], second.environments[one["environment"]]["hardware"]) for one in second.records] == [
        ("y", "b"),
        ("x", "a"),
    ]


def test_a_timing_pass_times_only_what_was_measured(tmp_path: Path, pipe: Any) -> None:
    results = ResultFile(tmp_path / "r.json", protocol={}, environment={})
    runner = MethodRunner(pipe=pipe, results=results, calibrate=lambda: (1.0,) * 4, warmup_steps=1)
    request = GenerationRequest(PROMPTS[0], num_inference_steps=4, num_frames=5, height=32, width=32)
    methods = builtin_methods(warmup_steps=1)[:1]
    TimingPass(runner=runner, methods=methods, requests=[request]).run(deadline=None, on_progress=None)
    assert results.records == []


def test_tables_are_over_the_videos_that_every_method_has() -> None:
    def record(method: str, prompt: str, family: str = "one") -> dict[str, Any]:
        return {"kind": "video", "method": method, "family": family, "prompt": prompt, "seed": 0}

    records = [record("a", "x"), record("a", "y"), record("b", "y"), record("again", "x", "repeat")]
    kept, count = common_videos(records)
    assert [(one["method"], one["prompt"]) for one in kept] == [("a", "y"), ("b", "y")]
    assert count == 1
    assert common_videos([record("a", "x"), record("b", "y")])[1] == 0


def test_a_curve_is_read_at_its_very_end_whatever_the_rounding() -> None:
    share = sum([0.4] * 3) / 3 + 1e-16
    assert share > 0.4
    assert value_at([(share, 36.0), (0.5, 40.0)], 0.4) == pytest.approx(36.0)
    assert value_at([(0.41, 36.0), (0.5, 40.0)], 0.4) is None

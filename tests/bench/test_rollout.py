"""The rollout benchmark: at toy size from end to end, continued, cut short, and its statements from made-up times."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.bench.rollout.attention import time_attention, use_attention
from vidaccel.bench.rollout.cell import Cell, chunks_to_fill, measure_cell, memory_config, random_student
from vidaccel.bench.rollout.rollout import RolloutBench
from vidaccel.bench.rollout.tables import rollout_markdown, steady_chunks, summarise_cells
from vidaccel.cli import run
from vidaccel.errors import UserError
from vidaccel.memory.config import MemoryConfig
from vidaccel.models.split_attention import KeySplit

CPU = torch.device("cpu")
FLAGS = ("--shape", "toy", "--device", "cpu", "--num-inference-steps", "2", "--num-filled-chunks", "2")
SMALL = ("--memories", "slow-fast:3+3+6,window:6", "--num-chunks", "34,5", "--modes", "captured,eager")


def test_it_measures_every_cell_writes_its_files_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["bench", "rollout", "--output", str(tmp_path), *FLAGS, *SMALL]
    readings = itertools.count()  # of the clock, one a millisecond: a busy machine makes no difference
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: next(readings) / 1000)
        assert run(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rollout.json", "rollout.md", "rollout.png"}
    result = json.loads((tmp_path / "rollout.json").read_text())
    cells = [record for record in result["records"] if record["kind"] == "cell"]
    keys = [(cell["memory"], cell["mode"], cell["decoder"], cell["from_start"]) for cell in cells]
    assert keys == [
        ("slow-fast:3+3+6", "eager", "tiny", True),
        ("slow-fast:3+3+6", "eager", "full", False),
        ("window:6", "eager", "tiny", True),
        ("window:6", "eager", "full", False),
    ]
    long = cells[0]
    assert long["chunks"]["attended_frames"][:11] == [3, 6, 9, 9, 10, 10, 11, 11, 12, 12, 12]
    assert cells[1]["chunks"]["attended_frames"] == [12, 12]
    assert all(len(times) == 3 for cell in cells for times in cell["chunks"]["passes_ms"])
    for cell in cells:
        assert cell["finite"]
        parts = zip(
            *(cell["chunks"][f"{name}_ms"] for name in ("denoising", "commit", "decoding", "transfer")), strict=True
        )
        for total, phases in zip(cell["chunks"]["total_ms"], parts, strict=True):
            assert total == pytest.approx(sum(phases) + 2), "but for its own begin and end"
    assert result["summary"]["not_run"] == ["captured"]
    assert result["summary"]["attention"].keys() == {"slow-fast:3+3+6", "window:6"}
    text = (tmp_path / "rollout.md").read_text()
    assert "| 12 | eager | with the tiny decoder |" in text
    assert "Not run, because it needs CUDA: captured." in text

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("vidaccel.bench.rollout.rollout.measure_cell", never)
    assert run(arguments) == 0
    again = json.loads((tmp_path / "rollout.json").read_text())
    assert again["records"] == result["records"]


def test_a_budget_ends_it_in_time_with_what_there_is(tmp_path: Path) -> None:
    assert run(["bench", "rollout", "--output", str(tmp_path), *FLAGS, *SMALL, "--budget-seconds", "0.001"]) == 0
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert [record["kind"] for record in result["records"]] == ["attention", "attention"]
    assert result["summary"]["cells"] == []


def made_up(times: list[float], **changes: Any) -> dict[str, Any]:
    count = len(times)
    cell = {
        "kind": "cell",
        "memory": "slow-fast",
        "mode": "captured",
        "decoder": "tiny",
        "attended_frames": 21,
        "from_start": True,
        "first_chunk": 0,
        "finite": True,
        "pixel_frames_per_chunk": 12,
        "memory_bytes": {"reserved": 9_000_000_000},
        "chunks": {
            "total_ms": times,
            "denoising_ms": [0.7 * time for time in times],
            "commit_ms": [0.2 * time for time in times],
            "decoding_ms": [0.1 * time for time in times],
            "transfer_ms": [0.0] * count,
            "before_passes_ms": [1.0] * count,
            "passes_ms": [[10.0, 20.0]] * count,
            "attended_frames": [21] * count,
            "allocated_bytes": [10**9] * count,
            "peak_bytes": [2 * 10**9] * count,
        },
    }
    return cell | changes


def test_its_lines_are_sums_of_phases_over_the_chunks_that_count() -> None:
    times = [5000.0] * 30 + [300.0] * 270 + [303.0] * 10
    (cell,) = summarise_cells([made_up(times)])["cells"]
    assert cell["steady_chunks"] == 280
    lines = cell["lines"]
    assert lines["transformer"]["p50_ms"] == pytest.approx(210)
    assert lines["with the clean pass"]["p50_ms"] == pytest.approx(270)
    assert lines["with the decoder"]["p50_ms"] == 300
    assert lines["with the decoder"]["p99_ms"] == 303
    mean = (270 * 300 + 10 * 303) / 280
    assert lines["with the decoder"]["frames_per_second"] == pytest.approx(12_000 / mean)
    assert cell["flatness"]["time_ratio"] == pytest.approx(1.01)
    assert cell["flatness"]["memory_ratio"] == 1
    assert cell["median_ms"]["passes_ms"] == [10, 20]
    content = {"protocol": {"shape": "x", "width": 1, "height": 1, "num_inference_steps": 4, "chunk_frames": 3}}
    content |= {"environments": [], "records": [made_up(times)], "summary": {"cells": [cell], "not_run": []}}
    assert "(medians of 10 from there on; +1.00 %); memory +0.00 %" in rollout_markdown(content)


def test_chunks_of_a_memory_that_is_not_full_do_not_count() -> None:
    filled = made_up([1.0] * 4, from_start=False, first_chunk=29)
    assert steady_chunks(filled) == [0, 1, 2, 3]
    filled["chunks"]["attended_frames"] = [20, 21, 21, 20]
    assert steady_chunks(filled) == [1, 2]
    short = made_up([1.0] * 12)
    assert steady_chunks(short) == []
    assert summarise_cells([short])["cells"][0]["lines"] == {}
    assert summarise_cells([filled])["cells"][0]["flatness"] is None


def test_memories_fill_as_the_index_says() -> None:
    assert chunks_to_fill(memory_config("slow-fast:3+12+6")) == 26
    assert chunks_to_fill(memory_config("slow-fast:3+3+6")) == 8
    assert chunks_to_fill(memory_config("window:21")) == 6
    with pytest.raises(UserError, match="not full after"):
        chunks_to_fill(MemoryConfig(keyframe_rule="none"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": "wan9"}, "`shape` must be one of"),
        ({"modes": ("fast",)}, "`modes` must be of eager, compiled, captured; got fast"),
        ({"decoders": ()}, "`decoders` must be of none, tiny, full; got nothing"),
        ({"num_chunks": (3,)}, "a number for each of 2 memories"),
        ({"num_filled_chunks": 0}, "must be at least 1"),
        ({"memories": ("huge", "window:9")}, "A memory must be"),
        ({"height": 100}, "multiples of 16; got 100 x 832"),
        ({"budget_seconds": -1.0}, "`budget_seconds` must be a finite number above 0, got -1.0"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RolloutBench(output=tmp_path, **changes)


def test_a_shape_that_is_not_wans_is_refused(tmp_path: Path) -> None:
    config = RolloutBench(output=tmp_path, shape="toy-ltx", device="cpu")
    with pytest.raises(UserError, match="must be a text-to-video Wan; got 'toy-ltx'"):
        config.run()


def test_too_little_memory_is_said_in_a_sentence_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("vidaccel.bench.rollout.rollout.measure_cell", full)
    config = RolloutBench(output=tmp_path, shape="toy", device="cpu", modes=("eager",))
    with pytest.raises(UserError, match="Too little memory on cpu for toy"):
        config.run()
    assert json.loads((tmp_path / "rollout.json").read_text())["records"]


def test_attention_that_is_wrong_or_fails_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_student("toy", height=32, width=32, num_inference_steps=2, device=CPU, dtype=torch.float32)
    shape = model.student.transformer.memory_shape(4, 4)

    def forwarded(rows: Any) -> list[str]:
        return [row["attention"] for row in rows]

    arguments = {"chunk_frames": 3, "attended_frames": 12, "device": CPU, "dtype": torch.float32}
    assert set(forwarded(time_attention(shape, **arguments))) == {"native", "cpu/1", "cpu/2"}
    monkeypatch.setattr("vidaccel.bench.rollout.attention.merge_parts", lambda attended, log_sums: attended[:1])
    monkeypatch.setattr("vidaccel.bench.rollout.attention._candidates", lambda *_: ["cpu/2", "cudnn/1", "native"])
    rows = time_attention(shape, **arguments)
    assert rows[0]["attention"] == "native"
    wrong, broken = sorted(rows[1:], key=lambda row: row["attention"])
    assert wrong["ms"] is None
    assert wrong["relative_error"] > 0.1
    assert broken["ms"] is None
    assert broken["error"]


def test_attention_is_chosen_by_name() -> None:
    model = random_student("toy", height=32, width=32, num_inference_steps=2, device=CPU, dtype=torch.float32)
    transformer = model.student.transformer
    use_attention(transformer, "cpu/3")
    assert {block.attn1.processor.split for block in transformer.blocks} == {KeySplit(kernel="cpu", num_parts=3)}
    for name in ("cpu/0", "cpu/x", "sage/2"):
        with pytest.raises(UserError, match="written kernel/parts"):
            use_attention(transformer, name)
    with pytest.raises(UserError, match="`attention` must be one of"):
        use_attention(transformer, "magic")


def test_a_cell_counts_its_chunks_after_those_that_warm_up() -> None:
    model = random_student("toy", height=32, width=32, num_inference_steps=2, device=CPU, dtype=torch.float32)
    cell = Cell(memory="window:6", mode="eager", decoder="none", num_chunks=2)
    seen: list[int] = []
    record = measure_cell(cell, model, deadline=float("inf"), on_chunk=seen.append)
    assert record is not None
    assert (record["first_chunk"], len(record["chunks"]["total_ms"])) == (4, 2)
    assert seen == [0, 0, 0, 1, 2]
    assert record["pixel_frames_per_chunk"] == 12
    assert measure_cell(cell, model, deadline=0.0, on_chunk=seen.append) is None

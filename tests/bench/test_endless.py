"""The benchmark of rollouts without end: its camera, its figures from made-up records, and all of it at toy size."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import save_student, tiny_student
from vidaccel.bench.endless.endless import FIRST_VISIT, EndlessBench, path_of, way_of
from vidaccel.bench.endless.tables import endless_markdown, summarise_endless
from vidaccel.cli import run
from vidaccel.errors import UserError
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.world import FRAME_SIZE

GRID = ChunkGrid(chunk_frames=3, fps=16)


@pytest.mark.parametrize("seconds", [15, 60, 600])
def test_the_camera_sees_a_place_goes_to_the_other_side_and_back_and_sees_it_again(seconds: float) -> None:
    bench = EndlessBench(output=Path("x"), seconds=seconds)
    assert seconds - 5 < bench.num_chunks * 12 / 16 <= seconds
    way = [0, 0, 1, 1, 1, 0, 0, 0, -1, -1, -1, 0, 0, 0, 1, 1, 1]
    assert way_of(1) == way
    path = path_of(way)
    for chunk, (before, here) in enumerate(pairwise(way), 1):
        places = path.positions(chunk, GRID)
        assert places == ([here] * 3 if here == before else sorted(places, reverse=here < before))
        assert abs(places[-1] - here) < 0.2
    assert [way[chunk] for chunk in FIRST_VISIT] == [1, 1]


def test_options_that_cannot_be_are_refused() -> None:
    for changes, words in [
        ({"seconds": 12}, "`seconds` must be at least 12.75"),
        ({"memories": ("window:21", "window:21")}, "`memories` must name different memories"),
        ({"memories": ("full:240",)}, "is for 240 latent frames, and the video has 2391"),
        ({"memories": ("huge",)}, "A memory must be slow-fast"),
        ({"num_videos": 0}, "`num_videos` must be a whole number of at least 1"),
    ]:
        with pytest.raises(UserError, match=words):
            EndlessBench(output=Path("x"), **changes)  # type: ignore[arg-type]


def record(memory: str, *, second: str, growth: int) -> dict[str, Any]:
    landmark = {"kind": "mill", "colour": "rose", "x": 60.0, "likelihood": 0.2}
    return {
        "memory": memory,
        "attended_frames": 21,
        "videos": [
            {"first": landmark, "second": {**landmark, "kind": second}},
            {"first": landmark, "second": landmark},
        ],
        "in_reach": 3,
        "num_returns": 5,
        "process_bytes": [500 * 2**20 + growth * chunk for chunk in range(200)],
        "chunk_seconds": [9.0, *[0.1] * 99, *[0.2] * 100],
        "disk_bytes": 7 * 2**20,
    }


def test_the_first_minute_stands_beside_the_last() -> None:
    records = [record("window:21", second="tree", growth=0), record("full:600", second="mill", growth=2**20)]
    summary = summarise_endless(records)
    flat, growing = summary["memories"]
    assert (flat["as_seen"], growing["as_seen"]) == ([False, True], [True, True])
    pale = record("window:21", second="mill", growth=0)
    pale["videos"][0]["second"]["colour"] = "sand"
    (row,) = summarise_endless([pale])["memories"]
    assert (row["as_seen"], row["kind_and_place"]) == ([False, True], [True, True])
    assert flat["process_bytes"] == {"minute": 500 * 2**20, "end": 500 * 2**20}
    assert growing["process_bytes"] == {"minute": 579 * 2**20, "end": 699 * 2**20}
    assert flat["chunk_seconds"] == {"first": 0.1, "last": 0.2}
    protocol = {"num_videos": 2, "num_chunks": 200, "num_detours": 31, "prompt": "a ball", "num_inference_steps": 4}
    text = endless_markdown({"protocol": protocol, "environments": [], "summary": summary, "records": records})
    assert "| `full:600` | 21 | 100.0% [34%, 100%] of 2 | 2 of 2 | 3 | 5 | 579; 699 MiB | 7 MiB | 100; 200 ms |" in text


def test_all_of_it_at_toy_size_and_nothing_is_made_twice(tiny_wan_folder: Path, tmp_path: Path) -> None:
    pipe = tiny_student(tiny_wan_folder, camera_dim=8)
    student = save_student(pipe, tmp_path / "student", height=FRAME_SIZE, width=FRAME_SIZE)
    output = tmp_path / "results"
    arguments = ["bench", "endless", "--output", str(output), "--model", str(student), "--device", "cpu"]
    arguments += ["--seconds", "13", "--num-videos", "2", "--prompt", "a red circle", "--memories"]
    assert run([*arguments, "window:6"]) == 0
    before = json.loads((output / "endless.json").read_text())["records"]
    assert run([*arguments, "window:6,view-retrieval:3+3+6"]) == 0
    assert {path.name for path in output.iterdir()} == {"endless.json", "endless.md", "endless.png"}
    result = json.loads((output / "endless.json").read_text())
    assert result["records"][:1] == before
    window, back = result["records"]
    assert (window["num_returns"], window["in_reach"]) == (0, 0)
    assert back["num_returns"] > 0
    assert back["in_reach"] > 0
    assert len(back["process_bytes"]) == len(back["chunk_seconds"]) == result["protocol"]["num_chunks"] == 17
    assert back["disk_bytes"] > 0
    assert endless_markdown(result) == (output / "endless.md").read_text()

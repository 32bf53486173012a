"""The depth benchmark: its smaller memories against obvious twins, a whole run at toy size, its page and picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vidaccel.bench.depth.depth import DepthBench
from vidaccel.bench.depth.memories import MEMORIES, SmallMemory, rounded
from vidaccel.bench.depth.tables import depth_markdown, save_depth_plot, summarise_depth
from vidaccel.errors import UserError
from vidaccel.models.causal_blocks import History
from vidaccel.training.chunk_batch import EMPTY, slots_of

CONFIG = SimpleNamespace(num_layers=4, num_attention_heads=2, attention_head_dim=16)


def test_rounded_numbers_are_the_nearest_of_the_steps_of_their_head() -> None:
    side = torch.randn(1, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    found = rounded(side, 4)
    for token in range(3):
        for head in range(2):
            numbers = side[0, token, head]
            least = float(numbers.min().bfloat16())
            step = float(((numbers.max() - numbers.min().bfloat16().float()) / 15).bfloat16())
            steps = [least + step * place for place in range(16)]
            for number, other in zip(numbers.tolist(), found[0, token, head].tolist(), strict=True):
                assert abs(other - number) <= min(abs(one - number) for one in steps) + 0.02
    assert len(found[0, 0, 0].unique()) <= 16
    assert torch.equal(rounded(torch.full((1, 1, 1, 4), 3.0), 4), torch.full((1, 1, 1, 4), 3.0))


def test_fewer_frames_are_every_nth_of_those_of_the_whole_memory_the_last_among_them() -> None:
    whole = SmallMemory.parse("depth:1")
    for chunk in range(1, 30):
        assert whole.slots(chunk) == slots_of(chunk, "uniform")
        slow = [frame for frame in whole.slots(chunk).frames[3:15] if frame != EMPTY]
        for number in (2, 4):
            layout = SmallMemory.parse(f"frames:{number}").slots(chunk)
            assert [frame for frame in layout.frames[3:15] if frame != EMPTY] == slow[::-1][::number][::-1]
            assert layout.frames[:3] + layout.frames[15:] == (
                whole.slots(chunk).frames[:3] + whole.slots(chunk).frames[15:]
            )


@pytest.mark.parametrize(
    ("text", "share"),
    [("depth:1", 1), ("depth:2", 1 / 2), ("depth:4", 1 / 4), ("frames:2", 12 / 18), ("frames:4", 9 / 18)],
)
def test_bytes_are_those_of_layers_and_frames_that_are_kept(text: str, share: float) -> None:
    student = SimpleNamespace(config=CONFIG)
    whole = 2 * 4 * 18 * 64 * 2 * 16 * 2  # sides, layers, frames, tokens, heads, numbers, bytes
    assert SmallMemory.parse(text).num_bytes(student, tokens_per_frame=64) == whole * share
    assert SmallMemory.parse("bits:4").num_bytes(student, tokens_per_frame=64) == whole * (4 / 16 + 2 / 16)


def test_a_student_with_a_smaller_memory_remembers_what_it_says() -> None:
    layers = tuple((torch.randn(1, 4, 2, 16), torch.randn(1, 4, 2, 16)) for _ in range(4))
    student = SimpleNamespace(config=CONFIG, remember=lambda: History(layers))
    assert SmallMemory.parse("frames:2").of(student) is SmallMemory.parse("depth:1").of(student) is student
    assert SmallMemory.parse("depth:2").of(student).remember().layers[3] is layers[2]
    assert torch.equal(SmallMemory.parse("bits:3").of(student).remember().layers[1][1], rounded(layers[1][1], 3))


@pytest.mark.parametrize("text", ["depth", "depth:0", "depth:x", "bits:9", "layers:2"])
def test_another_memory_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"must be such as depth:1|at most 8 bits"):
        SmallMemory.parse(text)


def test_students_and_memories_are_different_ones(tmp_path: Path) -> None:
    for values in ({"memories": ("depth:1", "depth:1")}, {"models": ()}, {"models": ("a", "a")}, {"memories": ()}):
        with pytest.raises(UserError, match="at least one of each"):
            DepthBench(output=tmp_path, **values)


def test_the_embedded_student_is_measured_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    bench = DepthBench(
        output=tmp_path,
        device="cpu",
        memories=("depth:1", "depth:4"),
        num_trips=1,
        away_chunks=1,
        num_chunks=1,
        num_inference_steps=1,
    )
    summary = bench.run()
    stored = json.loads((tmp_path / "depth.json").read_text())
    assert [record["memory"] for record in stored["records"]] == ["depth:1", "depth:4"]
    assert summary["students"]["wan-tiny-causal"]["depth:4"]["share_of_bytes"] == 0.25
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    before = stored["records"]
    assert bench.run() == summary
    assert json.loads((tmp_path / "depth.json").read_text())["records"] == before


def test_the_page_has_a_row_for_every_student_and_memory(tmp_path: Path) -> None:
    records = [
        {
            "student": student,
            "memory": memory,
            "words": SmallMemory.parse(memory).words(4),
            "kv_routing": routing,
            "depth_every": 1,
            "as_seen": [True, False],
            "clearness": 0.2,
            "losses": {"returns": 0.03},
            "bytes": 1000,
        }
        for student, routing in (("plain", 0.0), ("routed", 0.5))
        for memory in MEMORIES
    ]
    environment = {
        "hardware": {"name": "a GPU"},
        "versions": {"torch": "2", "diffusers": "0"},
        "commit": "0" * 40,
        "weights": "toy",
        "date": "today",
        "command": "vidaccel bench depth",
    }
    protocol = {"num_trips": 2, "away_chunks": 6, "num_inference_steps": 4}
    content = {
        "protocol": protocol,
        "environments": [environment],
        "records": records,
        "summary": summarise_depth(records),
    }
    page = depth_markdown(content)
    assert page.count("| plain | own memory |") == page.count("| routed | routing 0.5 |") == len(MEMORIES)
    assert "2 of 4 layers (50%)" in page
    assert "50.0% [9%, 91%]" in page
    assert save_depth_plot(tmp_path / "depth.png", content).stat().st_size > 1000

"""The skipping benchmark: figures and verdicts of made-up records, its judge, and all of it at toy size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_models import save_student, tiny_student, tiny_transformer
from vidaccel.bench.recall.cells import RecallCell
from vidaccel.bench.recall.recall import RecallBench
from vidaccel.bench.skipping import measures, skipping
from vidaccel.bench.skipping.loss import LATE_FRAMES, Judge
from vidaccel.bench.skipping.measures import Arm
from vidaccel.bench.skipping.skipping import SkippingBench
from vidaccel.bench.skipping.summary import OTHER_NOISE, summarise_skipping
from vidaccel.bench.skipping.tables import skipping_markdown
from vidaccel.bench.student.student import StudentBench
from vidaccel.cli import run
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline
from vidaccel.rollout.decode import encode_start
from vidaccel.world import FRAME_SIZE, random_scene, render
from vidaccel.world import caption as caption_of

ASKED = {"colour": "red", "shape": "ball", "motion": "hop", "background": "snow"}
COUNT = 6


def reading(kind: str = "mill", likelihood: float = 0.2) -> dict[str, Any]:
    return {"kind": kind, "colour": "rose", "x": 60.0, "likelihood": likelihood}


def record(sampler: str, *, passes: float = 5, loss: float = 0.2, sharp: float = 50.0, lost: int = 0) -> dict[str, Any]:
    """COUNT prompts and trips; of the trips `lost` do not show the landmark of the first visit."""
    held = {"asked": ASKED, "passes": passes, "loss": loss, "difference": 0.1, "shown": {**ASKED, "sharpness": sharp}}
    trips = [
        {"passes": passes, "first": reading(), "second": reading("tree" if place < lost else "mill")}
        for place in range(COUNT)
    ]
    return {"sampler": sampler, "held": [held] * COUNT, "return": trips, "own": trips, "seconds": 1.0}


def verdict(**changes: Any) -> str:
    rows = summarise_skipping([record("student"), record("skip:3", **changes)])
    return str(rows[1]["verdict"])


def test_a_rule_passes_that_saves_a_fifth_and_loses_nothing() -> None:
    rows = summarise_skipping([record("student"), record("skip:3", passes=4, loss=0.206, sharp=49.0, lost=0)])
    assert rows[0]["verdict"] == "-"
    assert rows[1]["verdict"] == "passes"
    assert rows[1]["saved"]["mean"] == pytest.approx(0.2)
    assert rows[1]["loss"]["mean"] == pytest.approx(1.03)
    assert rows[1]["own_as_seen"]["share"]["correct"] == COUNT
    assert rows[1]["clearness"]["mean"] == pytest.approx(1)


def test_a_rule_fails_that_saves_less_blurs_forgets_or_loses_more() -> None:
    assert verdict(passes=4.1) == "fails: saves too little"
    assert verdict(passes=4, loss=0.22) == "fails: loss"
    assert verdict(passes=4, sharp=40.0) == "fails: sharpness"
    assert verdict(passes=4, lost=COUNT) == "fails: as seen, own as seen"


def test_it_is_open_where_an_interval_reaches_over_the_bound() -> None:
    plain, other = record("student"), record("skip:3", passes=4)
    other["held"] = [{**row, "loss": 0.2 * (0.9 + 0.05 * place)} for place, row in enumerate(other["held"])]
    assert summarise_skipping([plain, other])[1]["verdict"] == "open"


def test_other_noise_has_no_trips_and_its_shares_are_left_out() -> None:
    other = {**record(OTHER_NOISE), "return": [], "own": []}
    row = summarise_skipping([record("student"), other])[1]
    assert row["as_seen"] is row["first_valid"] is None
    assert list(row["saved_by_part"]) == ["held"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_prompts": 1}, "`num_prompts` must be a whole number of at least 2; got 1"),
        ({"num_chunks": 8}, "`num_chunks` must be a whole number of at least 9; got 8"),
        ({"samplers": ("skip:3", "skip:3")}, "must name different ones beside the student"),
        ({"samplers": ("student",)}, "must name different ones beside the student"),
        ({"samplers": ("euler:4",)}, "Trips are sampled as the student is; got euler:4"),
        ({"samplers": ("skip:x",)}, "Steps to leave out are written as"),
    ],
)
def test_it_says_what_it_cannot_do(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SkippingBench(output=Path("x"), **changes)


@pytest.mark.parametrize("kind", [SkippingBench, RecallBench, StudentBench])
def test_a_model_without_a_memory_is_refused(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a causal student, and wan-tiny has a WanTransformer3DModel"):
        kind(output=tmp_path, model="wan-tiny").run(pipe=SimpleNamespace(transformer=tiny_transformer()))
    assert not list(tmp_path.iterdir())


def test_the_judge_prefers_the_world_to_noise_with_equal_prompts() -> None:
    judge, scene = Judge("cpu"), random_scene(3, num_frames=4 * LATE_FRAMES + 1)
    clip = render([scene], num_frames=4 * LATE_FRAMES + 1)
    latents = encode_start(load_pipeline("wan-tiny", device="cpu").vae, clip).float()
    broken = latents + 0.5 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    texts = [caption_of(scene, frame=0)] * 2
    clean, noisy = judge.losses(torch.cat([latents, broken]), texts, max_sequence_length=64)
    assert clean < noisy / 2


def test_a_student_of_other_latents_is_refused(tiny_wan_folder: Path) -> None:
    with pytest.raises(UserError, match="latents are of another autoencoder"):
        Judge("cpu").check(tiny_student(tiny_wan_folder))


class NoJudge:
    """Stands in where there is no trained model of these latents."""

    def __init__(self, device: str) -> None:
        pass

    def check(self, pipe: Any) -> None:
        pass

    def losses(self, latents: Tensor, prompts: Sequence[str], *, max_sequence_length: int) -> list[float]:
        return latents.square().flatten(1).mean(dim=1).tolist()


@pytest.fixture
def student_folder(tiny_wan_folder: Path, tmp_path: Path) -> Path:
    pipe = tiny_student(tiny_wan_folder, camera_dim=8)
    pipe.register_to_config(num_inference_steps=3)
    return save_student(pipe, tmp_path / "student", height=FRAME_SIZE, width=FRAME_SIZE)


def test_all_of_it_at_toy_size_and_nothing_is_made_twice(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Arm.cell

    def short(arm: Arm, kind: Any) -> RecallCell:
        return replace(cell(arm, kind), away_chunks=1)

    monkeypatch.setattr(skipping, "Judge", NoJudge)
    monkeypatch.setattr(measures.Arm, "cell", short)
    output = tmp_path / "results"
    arguments = ["bench", "skipping", "--output", str(output), "--model", str(student_folder), "--device", "cpu"]
    arguments += ["--num-prompts", "2", "--num-trips", "2", "--num-chunks", "9"]
    assert run([*arguments, "--samplers", "skip:2"]) == 0
    assert run([*arguments, "--samplers", "skip:2,other-noise"]) == 0
    assert {path.name for path in output.iterdir()} == {"skipping.json", "skipping.md", "skipping.png"}
    result = json.loads((output / "skipping.json").read_text())
    plain, skip, other = result["records"]
    assert [one["sampler"] for one in (plain, skip, other)] == ["student", "skip:2", "other-noise"]
    for part in ("held", "return", "own"):
        assert [row["passes"] for row in plain[part]] == [4, 4]
        assert [row["passes"] for row in skip[part]] == [3, 3]
    assert [row["difference"] for row in plain["held"]] == [0, 0]
    assert all(row["difference"] > 0 for one in (skip, other) for row in one["held"])
    assert result["summary"]["samplers"][1]["saved"]["mean"] == pytest.approx(0.25)
    assert skipping_markdown(result) == (output / "skipping.md").read_text()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(measures.Held, "measure", never)
    assert run([*arguments, "--samplers", "skip:2"]) == 0

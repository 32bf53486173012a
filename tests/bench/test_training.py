"""`vidaccel bench training` on a toy: which cells there are, what their steps are made of, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.bench.training import cells as cells_module
from vidaccel.bench.training.training import TrainingBench
from vidaccel.errors import UserError

TOY: dict[str, Any] = {
    "shape": "toy",
    "height": 32,
    "width": 32,
    "text": 40,
    "lora": 2,
    "steps": 1,
    "chunks": 2,
    "device": "cpu",
}
DISTILLED = {"rollout", "exit", "teacher", "critic", "backward", "critic learns", "optimizer"}


def test_every_stage_is_timed_by_part_with_and_without_checkpointing_and_with_adapters(tmp_path: Path) -> None:
    bench = TrainingBench(output=tmp_path, **TOY)
    summary = bench.run()
    assert summary == {"num_cells": 8, "num_out_of_memory": 0}
    records = bench.results(bench.protocol({}), {}).records
    assert {(one["stage"], one["lora"], one["checkpointing"]) for one in records} == {
        *((stage, None, checkpointing) for stage in ("forcing", "1", "2") for checkpointing in (True, False)),
        *((stage, 2, True) for stage in ("1", "2")),
    }
    for record in records:
        parts = {"loss", "backward", "optimizer"} if record["stage"] == "forcing" else DISTILLED
        assert record["parts"].keys() == parts
        assert 0 < sum(record["parts"].values()) <= record["seconds"] * 1.01
    assert "LoRA 2" in (tmp_path / "training.md").read_text()
    before = (tmp_path / "training.json").read_text()
    TrainingBench(output=tmp_path, **TOY).run()
    assert (tmp_path / "training.json").read_text() == before, "finished cells are not measured again"


def test_what_does_not_fit_is_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = cells_module._timed

    def cramped(cell: Any, *args: Any, **kwargs: Any) -> Any:
        if not cell.checkpointing:
            raise torch.OutOfMemoryError("too much")
        return timed(cell, *args, **kwargs)

    monkeypatch.setattr(cells_module, "_timed", cramped)
    summary = TrainingBench(output=tmp_path, **{**TOY, "stages": ("forcing",)}).run()
    assert summary == {"num_cells": 2, "num_out_of_memory": 1}
    assert "| no | 1 |  | out of memory |" in (tmp_path / "training.md").read_text()


def test_clips_of_noise_have_a_full_memory_and_a_rollout_behind_it() -> None:
    sizes = cells_module.Sizes(shape="toy", height=32, width=32, chunks=2, text=40, batch_size=1)
    student = cells_module.random_student("toy", device=torch.device("cpu"))
    bank, prompts = cells_module.noise_data(sizes, student.config, device=torch.device("cpu"))
    assert bank.num_chunks == 8
    assert prompts.of(torch.tensor([0]), torch.tensor([3])).shape == (1, 40, student.config.text_dim)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for changes, words in (
        ({"shape": "hunyuan-video"}, "`shape`"),
        ({"steps": 0}, "`steps`"),
        ({"lora": -1}, "`lora`"),
        ({"stages": ("3",)}, "`stages`"),
        ({"stages": ()}, "`stages` must not be empty"),
        ({"height": 24}, "`height` must be a multiple of 16 pixels, got 24"),
        ({"width": -16}, "`width`"),
        ({"text": 0}, "`text`"),
    ):
        with pytest.raises(UserError, match=words):
            TrainingBench(output=tmp_path, **{**TOY, **changes})

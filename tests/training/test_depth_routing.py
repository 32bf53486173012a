"""Students whose layers read what other layers remember: how maps are drawn, what is trained, what is written down."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.support.tiny_donor import noise_bank
from vidaccel.errors import UserError
from vidaccel.memory import DepthMap, MemoryConfig, parse_memory
from vidaccel.models.causal_blocks import History
from vidaccel.training.causal_config import CausalTrainingConfig
from vidaccel.training.causal_export import export_student
from vidaccel.training.causal_student import load_donor, new_student, student_architecture, student_tensors
from vidaccel.training.causal_task import CausalTask
from vidaccel.training.causal_trainer import train_causal, trained_student
from vidaccel.training.checkpoint import TrainingState
from vidaccel.training.chunk_batch import context_of
from vidaccel.training.context_forcing_starts import load_beginning
from vidaccel.training.depth_routing import drawn_reading, reading
from vidaccel.training.loop import Schedule

Task = Callable[..., CausalTask]


def config_of(init: str, **changes: object) -> CausalTrainingConfig:
    config = CausalTrainingConfig(
        schedule=Schedule(steps=2, log_steps=1, num_validations=1, warmup_steps=1),
        device="cpu",
        init=init,
        layers=(0, 1, 2),
        camera_dim=8,
        num_chunks=4,
        bank_clips=2,
        batch_size=2,
        copies=2,
        own_share=1.0,
        validation_trips=0,
        validation_clips=0,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture
def task_of(donor_folder: str) -> Task:
    def made(**changes: object) -> CausalTask:
        donor = load_donor(donor_folder)
        torch.manual_seed(0)
        architecture = student_architecture(donor.transformer, num_layers=3, camera_dim=8)
        student = new_student(architecture, student_tensors(donor.transformer, layers=(0, 1, 2)))
        state = TrainingState(kind="causal")
        bank, config = noise_bank(num_clips=6), config_of(donor_folder, **changes)
        return CausalTask(student, donor, config, bank=bank, beginnings=bank, state=state)

    return made


def histories_of(task: CausalTask, depth: DepthMap) -> tuple[History, History]:
    """What the student itself remembers of a batch, and what its layers read."""
    batch = task._prompted(task._gathered(task.bank, [(0, 2, False, "any"), (1, 3, False, "any")]))
    with torch.no_grad():
        return context_of(task.student, batch).history, context_of(reading(task.student, depth), batch).history


def test_layers_read_what_their_leaders_remember_and_nothing_else_changes(task_of: Task) -> None:
    task = task_of()
    own, read = histories_of(task, DepthMap((0, 0, 1)))
    for layer, leader in enumerate((0, 0, 1)):
        assert all(map(torch.equal, read.layers[layer], own.layers[leader]))
    assert reading(task.student, DepthMap.every(1, 3)) is task.student


def test_a_map_is_drawn_for_a_step_and_none_without_routing(task_of: Task) -> None:
    student, draw = task_of().student, random.Random(0)
    before = draw.getstate()
    assert drawn_reading(student, draw, kv_routing=0.0, depth_every=1) is student
    assert draw.getstate() == before  # trainings of before draw what they drew
    drawn = [drawn_reading(student, draw, kv_routing=0.5, depth_every=1) for _ in range(40)]
    assert 0 < sum(one is student for one in drawn) < 40
    assert drawn_reading(student, draw, kv_routing=0.0, depth_every=3) is not student


def test_one_map_serves_the_own_estimate_and_the_loss(task_of: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    task, read = task_of(kv_routing=1.0), []
    monkeypatch.setattr(History, "read_by", _noting(History.read_by, read))
    for _ in range(4):
        task.loss(0.0)
        assert len(read) == 2  # of the chunk before, and of the chunk
        assert read[0] == read[1]
        read.clear()


def _noting(function: Callable[..., History], read: list[DepthMap]) -> Callable[..., History]:
    def noted(history: History, depth: DepthMap) -> History:
        read.append(depth)
        return function(history, depth)

    return noted


def test_routing_has_gradients_for_every_weight_and_training_without_is_as_before(task_of: Task) -> None:
    losses = []
    for changes in ({}, {"kv_routing": 0.0, "depth_every": 1}, {"depth_every": 3}):
        task = task_of(**changes)
        loss, _ = task.loss(0.0)
        loss.backward()
        losses.append(loss.item())
        assert all(_has_gradient(parameter.grad) for parameter in task.parameters)
    assert losses[0] == losses[1] != losses[2]


def test_compiled_blocks_serve_for_every_map(task_of: Task) -> None:
    task, counter = task_of(kv_routing=0.5, own_share=0.0), CompileCounter()
    task.student.compile_repeated_blocks(dynamic=False, backend=counter)
    task.loss(0.0)
    compiled = counter.frame_count
    for _ in range(6):
        task.loss(0.0)
    assert counter.frame_count == compiled > 0


def _has_gradient(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all())


@pytest.mark.parametrize("settings", [{"kv_routing": 0.5}, {"depth_every": 2}, {}], ids=str)
def test_the_students_config_says_how_it_was_trained(
    settings: dict[str, float], donor_folder: str, tmp_path: Path
) -> None:
    list(train_causal(config_of(donor_folder, **settings), tmp_path / "one"))
    _, student = trained_student(tmp_path / "one")
    assert (student.config.kv_routing, student.config.depth_every) == (
        settings.get("kv_routing", 0.0),
        settings.get("depth_every", 1),
    )


def test_an_exported_student_has_the_memory_that_it_was_trained_with(donor_folder: str, tmp_path: Path) -> None:
    for every, end in ((1, ""), (2, "%2")):
        checkpoint, folder = tmp_path / f"every-{every}", tmp_path / f"student-{every}"
        list(train_causal(config_of(donor_folder, depth_every=every), checkpoint))
        export_student(folder, causal=checkpoint, threshold=0.9)
        words = json.loads((folder / "model_index.json").read_text())["memory"]
        assert words == f"slow-fast:3+12x3+6@0.900000{end}"
        assert parse_memory(words) == MemoryConfig(similarity_threshold=0.9, keyframe_frames=3, depth_every=every)


def test_a_distillation_is_no_training_for_layers_that_share_a_memory(donor_folder: str, tmp_path: Path) -> None:
    list(train_causal(config_of(donor_folder, kv_routing=0.5), tmp_path / "routed"))
    beginning = load_beginning(str(tmp_path / "routed"))
    assert beginning.state is not None
    for architecture in (beginning.architecture, beginning.state.architecture["transformer"]):
        assert architecture["kv_routing"] == 0
    list(train_causal(config_of(donor_folder, depth_every=2), tmp_path / "fixed"))
    with pytest.raises(UserError, match="one layer in 2, and in a distillation every layer reads its own"):
        load_beginning(str(tmp_path / "fixed"))


def test_no_group_has_more_layers_than_there_are(donor_folder: str, tmp_path: Path) -> None:
    config = config_of(donor_folder, depth_every=4)
    with pytest.raises(
        UserError, match="`depth_every` must be a whole number from 1 to 3, the number of layers; got 4"
    ):
        list(train_causal(config, tmp_path / "made"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kv_routing": 1.5}, "`kv_routing` must be from 0 to 1, got 1.5"),
        ({"depth_every": 0}, "`depth_every` must be a whole number of at least 1; got 0"),
        ({"kv_routing": 0.5, "depth_every": 2}, "give one of them"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, float], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        config_of("wan-tiny", **settings)

"""`vidaccel train offline`: two stages that follow one teacher, and everything that is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.support.offline_world import save_tiny_student
from tests.support.tiny_donor import noise_bank
from vidaccel.errors import UserError
from vidaccel.training import app as training_app
from vidaccel.training.causal_export import export_student
from vidaccel.training.checkpoint import load_checkpoint
from vidaccel.training.loop import Schedule
from vidaccel.training.offline import trainer
from vidaccel.training.offline.collect import CollectConfig
from vidaccel.training.offline.distill import OfflineDistill
from vidaccel.training.offline.loading import recorded_teacher
from vidaccel.training.offline.store import TargetStore
from vidaccel.training.offline.trainer import OfflineTrainingConfig, train_offline
from vidaccel.training.trip_bank import TripBank


@pytest.fixture(scope="module")
def student_folder(donor_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_student(donor_folder, tmp_path_factory.mktemp("student"))


@pytest.fixture(autouse=True)
def _clips_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips are not rendered: what is in them does not matter here, and it takes longer than all else."""

    def noise(vae: Any, tokenizer: Any, *, trips: Any, on_progress: Any = None) -> TripBank:
        found = noise_bank(num_clips=len(trips), num_chunks=4, side=4)
        if on_progress is not None:
            on_progress(len(trips), len(trips))
        return found

    monkeypatch.setattr(trainer, "build_trip_bank", noise)


def config_of(init: str, **changes: Any) -> OfflineTrainingConfig:
    schedule = Schedule(steps=4, log_steps=1, num_validations=1, warmup_steps=1, learning_rate=1e-3)
    config = OfflineTrainingConfig(
        init=init,
        collect=CollectConfig(kind="visited", num_states=8, rollouts_per_shard=2),
        distill=OfflineDistill(schedule=schedule, batch_size=2),
        teacher_steps=4,
        held_out=2,
        bank_clips=3,
        num_chunks=4,
        validation_trips=0,
        device="cpu",
    )
    return replace(config, **changes)


def ode(config: OfflineTrainingConfig) -> OfflineTrainingConfig:
    return replace(config, collect=replace(config.collect, kind="ode"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder, kind="causal")[1]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_second_stage_follows_the_teacher_of_the_first_and_refuses_another(
    student_folder: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    cost, *records = train_offline(ode(config_of(student_folder)), first)
    assert cost == {
        "states_collected": 8.0,
        "teacher_forwards": 4 * 4.0,
        "student_forwards": 0.0,
        "seconds": pytest.approx(cost["seconds"]),
    }
    assert records[-1]["held_out_end_distance"] > 0
    config = config_of(str(first))
    with pytest.raises(UserError, match="must follow the trajectories of the teacher before it: weights is"):
        next(train_offline(config, second))
    with pytest.raises(UserError, match="history is 'own' there, asked for 'last:3'"):
        next(train_offline(replace(config, teacher=student_folder, history="last:3"), second))
    assert not second.exists(), "nothing is written before the check"
    list(train_offline(replace(config, teacher=student_folder), second))
    state = load_checkpoint(second, kind="causal")[0]
    assert (state.round, state.step, state.recipe["init"]) == (1, 8, student_folder)
    sampled = (state.recipe["validation_steps"], state.recipe["validation_sampler"])
    assert sampled == (config.collect.student_steps, "stochastic")
    assert recorded_teacher(state) == TargetStore(first / "targets").fingerprint
    assert not same(weights(first), weights(second))


def test_the_same_seed_trains_the_same_student_also_after_a_collection_that_was_cut_off(
    student_folder: str, tmp_path: Path
) -> None:
    config = config_of(student_folder)
    list(train_offline(config, tmp_path / "one"))

    def cut_off(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(train_offline(config, tmp_path / "two", on_targets=cut_off))
    assert 0 < len(TargetStore(tmp_path / "two" / "targets")) < 8
    list(train_offline(config, tmp_path / "two"))
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_a_training_goes_on_from_its_checkpoint_and_its_targets(student_folder: str, tmp_path: Path) -> None:
    config = config_of(student_folder)
    records = train_offline(config, tmp_path)
    while "held_out_end_distance" not in next(records):
        pass
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "targets").glob("*.safetensors")}
    list(train_offline(config, tmp_path, resume=tmp_path))
    state = load_checkpoint(tmp_path, kind="causal")[0]
    assert (state.round, state.step) == (1, 8), "a finished round is followed by another"
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "targets").glob("*.safetensors")}


def test_online_training_stores_nothing_and_differs_from_offline(student_folder: str, tmp_path: Path) -> None:
    config = config_of(student_folder)
    list(train_offline(config, tmp_path / "offline"))
    list(train_offline(replace(config, refresh_steps=2), tmp_path / "online"))
    assert not (tmp_path / "online" / "targets").exists()
    assert not same(weights(tmp_path / "offline"), weights(tmp_path / "online"))


def test_what_was_distilled_can_be_exported(student_folder: str, tmp_path: Path) -> None:
    list(train_offline(config_of(student_folder), tmp_path / "student"))
    output = tmp_path / "exported"
    export_student(output, causal=tmp_path / "student", weights="toy", stochastic=True, threshold=0.9)
    card = (output / "README.md").read_text()
    assert "kind visited" in card
    assert "teacher_steps 4" in card
    assert str(tmp_path) not in card


def test_the_command_rehearses_and_refuses_in_one_line(student_folder: str, tmp_path: Path) -> None:
    run, output = CliRunner().invoke, str(tmp_path / "student")
    command = ["offline", "--toy", "--init", student_folder, "--device", "cpu", "--output"]
    result = run(training_app.app, [*command, output])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "student" / "curves.png").is_file()
    for changes, words in (
        ([output], "holds a checkpoint"),
        ([str(tmp_path / "new"), "--history", "long"], "`history` must be own or last:N"),
        (
            [str(tmp_path / "new"), "--student-steps", "3", "--teacher-steps", "3", "--init", "wan-tiny"],
            "takes a camera",
        ),
        ([str(tmp_path / "new"), "--gigabytes", "0.00001"], "states fit"),
        ([str(tmp_path / "new"), "--stage", "ode", "--refresh-steps", "3"], "never grow old"),
    ):
        result = run(training_app.app, [*command, *changes])
        assert isinstance(result.exception, UserError), words
        assert words in str(result.exception)
    assert not (tmp_path / "new" / "state.json").exists()

"""From a trained causal student to a folder that rolls out: what is written, the threshold, the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline

from tests.support.tiny_donor import noise_bank
from tests.training.test_causal import causal_config
from vidaccel.catalog.registry import spec_of
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig, parse_memory
from vidaccel.memory.camera import Camera
from vidaccel.memory.keys_values import KeyValueMemory
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.training import app as training_app
from vidaccel.training import causal_export
from vidaccel.training.causal_config import CausalTrainingConfig
from vidaccel.training.causal_export import export_student
from vidaccel.training.causal_rollout import TEXT_LENGTH
from vidaccel.training.causal_student import load_donor
from vidaccel.training.causal_trainer import train_causal, trained_student
from vidaccel.training.checkpoint import load_checkpoint, save_checkpoint
from vidaccel.training.flow import prompt_embeddings
from vidaccel.training.keyframe_threshold import calibrate_threshold, chunk_similarities


@pytest.fixture(scope="module")
def trained(donor_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "student"
    list(train_causal(causal_config(donor_folder), folder))
    return folder


def test_the_export_holds_the_trained_weights_in_bf16(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "student"
    assert export_student(output, causal=trained, weights="toy", threshold=0.9875) is None
    loaded = CausalWanTransformer3DModel.from_pretrained(output / "transformer", torch_dtype=torch.bfloat16)
    for name, value in trained_student(trained)[1].state_dict().items():
        assert torch.equal(loaded.state_dict()[name].bfloat16(), value.bfloat16()), name
    assert (loaded.config.num_layers, loaded.takes_camera, loaded.clean_pass) == (2, True, "frame")
    index = json.loads((output / "model_index.json").read_text())
    assert index["_class_name"] == "ContextForcingWanPipeline"
    assert parse_memory(index["memory"], index["chunk_frames"]) == MemoryConfig(
        similarity_threshold=0.9875, keyframe_frames=3
    )
    assert index["transformer"] == ["vidaccel.models.causal_wan", "CausalWanTransformer3DModel"]
    scheduler = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["shift"], scheduler["stochastic_sampling"]) == (3.0, False)
    card = (output / "README.md").read_text()
    for text in ("| causal | 1 | 4 |", "layers 0, 2", "clips of 4 chunks", "deterministic"):
        assert text.lower() in card.lower()
    assert (output / "transformer_curves.png").stat().st_size > 1000
    with pytest.raises(UserError, match="exists; give --overwrite"):
        export_student(output, causal=trained)
    for place, words in ((trained, "which it is made from"), (trained.parent, "which it is made from")):
        with pytest.raises(UserError, match=words):
            export_student(place, causal=trained, overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    for place in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        with pytest.raises(UserError, match="no diffusers folder, so it is not replaced"):
            export_student(place, causal=trained, overwrite=True)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "precious"
    assert (trained / "state.json").is_file()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        export_student(tmp_path / "other", causal=tmp_path / "missing")
    assert not (tmp_path / "other").exists()


def test_a_distilled_student_is_written_with_a_stochastic_scheduler(trained: Path, tmp_path: Path) -> None:
    export_student(tmp_path / "student", causal=trained, threshold=0.9, stochastic=True)
    scheduler = json.loads((tmp_path / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["stochastic_sampling"]
    assert "4 stochastic steps" in (tmp_path / "student" / "README.md").read_text()


def test_a_share_of_every_weight_is_the_teachers(trained: Path, tmp_path: Path) -> None:
    state, tensors = load_checkpoint(trained, kind="causal")
    with pytest.raises(UserError, match="no checkpoint of a distillation"):
        export_student(tmp_path / "none", causal=trained, threshold=0.9, teacher_share=0.25)
    assert not (tmp_path / "none").exists()
    teacher = {name.replace("transformer.", "teacher."): 2 * one + 1 for name, one in tensors.items()}
    save_checkpoint(tmp_path / "distilled", state, {**tensors, **teacher})
    export_student(tmp_path / "student", causal=tmp_path / "distilled", threshold=0.9, teacher_share=0.25)
    loaded = CausalWanTransformer3DModel.from_pretrained(
        tmp_path / "student" / "transformer", torch_dtype=torch.bfloat16
    )
    for name, value in trained_student(trained)[1].state_dict().items():
        wanted = 0.75 * value + 0.25 * (2 * value + 1)
        torch.testing.assert_close(loaded.state_dict()[name].float(), wanted, rtol=0.01, atol=1e-3)
    assert "25% of the teacher's weights" in (tmp_path / "student" / "README.md").read_text()


def test_the_pipeline_of_the_rollout_loads_an_export_and_makes_a_clip(trained: Path, tmp_path: Path) -> None:
    output = export_folder(trained, tmp_path)
    spec = spec_of(str(output))
    assert (spec.weights, spec.defaults.num_inference_steps, spec.defaults.guidance_scale) == ("toy", 4, 1.0)
    pipe = ContextForcingWanPipeline.from_pretrained(output)
    chunks = list(pipe.stream("a red ball", num_chunks=3, height=32, width=32, num_inference_steps=1))
    assert [None if chunk.frames is None else tuple(chunk.frames.shape) for chunk in chunks] == [
        (1, 9, 3, 32, 32),
        (1, 12, 3, 32, 32),
        (1, 12, 3, 32, 32),
    ]


def export_folder(trained: Path, tmp_path: Path) -> Path:
    export_student(tmp_path / "student", causal=trained, weights="toy", threshold=0.9)
    return tmp_path / "student"


def test_no_bars_of_other_libraries_stand_between_the_lines(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_folder(trained, tmp_path)  # loads the donor's networks and saves them
    assert "it/s" not in capsys.readouterr().err


@pytest.mark.parametrize("init", ["wan-tiny", "wan-tiny-causal"])
def test_a_student_of_an_embedded_model_shares_its_networks(trained: Path, tmp_path: Path, init: str) -> None:
    state, tensors = load_checkpoint(trained, kind="causal")
    save_checkpoint(tmp_path / "copy", replace(state, recipe={**state.recipe, "init": init}), tensors)
    output = export_folder(tmp_path / "copy", tmp_path)
    assert json.loads((output / "vidaccel.json").read_text())["shares"] == "wan-tiny"
    assert {path.name for path in output.iterdir() if path.is_dir()} == {"transformer", "scheduler"}


@torch.no_grad()
def test_similarities_are_those_that_a_memory_finds(trained: Path, donor_folder: str) -> None:
    student, donor, bank = trained_student(trained)[1], load_donor(donor_folder), noise_bank(num_clips=2)
    torch.nn.init.normal_(student.camera_embedder.linear_2.weight, std=0.3)
    found = chunk_similarities(student, donor.text_encoder, bank)
    memory = KeyValueMemory(MemoryConfig(), student.memory_shape(4, 4, batch_size=2), student.rotary_table(4, 4))
    for chunk in range(bank.num_chunks):
        frames = slice(3 * chunk, 3 * chunk + 3)
        memory.begin_chunk(camera=Camera(bank.columns[:, frames], bank.motions[:, frames]))
        prompt = prompt_embeddings(donor.text_encoder, bank.tokens[:, chunk], length=TEXT_LENGTH)
        latents = bank.latents[:, frames].float().transpose(1, 2)
        student(latents, torch.zeros(2), prompt, memory=memory, alone=True)
        memory.commit()
        if chunk:
            assert memory.similarity is not None
            torch.testing.assert_close(found[:, chunk - 1], memory.similarity, atol=1e-5, rtol=1e-5)


def test_the_threshold_divides_turning_from_resting(trained: Path, donor_folder: str) -> None:
    student, donor, bank = trained_student(trained)[1], load_donor(donor_folder), noise_bank(num_chunks=15)
    moving = bank.motions.abs()[:, :, None, None, None]
    still = bank.latents[:, :1].float()  # what a camera at rest sees does not change, what it passes does
    shown = torch.where(moving > 0.05, bank.latents.float(), still.expand_as(bank.latents)).half()
    found = calibrate_threshold(student, donor.text_encoder, replace(bank, latents=shown))
    assert max(found.turning) < found.threshold < sorted(found.resting)[len(found.resting) // 2]
    assert (found.found, found.spared > 0.6) == (1.0, True)
    held = replace(bank, columns=torch.zeros_like(bank.columns))
    with pytest.raises(ValueError, match="no chunk in which the camera starts"):
        calibrate_threshold(student, donor.text_encoder, held)


def test_the_commands_train_and_export_and_refuse_bad_input(
    donor_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalTrainingConfig, "rehearsal", lambda config: causal_config(config.init))
    monkeypatch.setattr(causal_export, "_CALIBRATION_TRIPS", 1)
    student, exported = str(tmp_path / "student"), str(tmp_path / "exported")
    train = ["causal", "--toy", "--steps", "4", "--init", donor_folder, "--output", student]
    export = ["export-causal", "--causal", student, "--output", exported, "--weights", "toy", "--device", "cpu"]
    for arguments in (train, export):
        result = CliRunner().invoke(training_app.app, arguments)
        assert result.exit_code == 0, result.output
    for text in ("keyframes below similarity", "camera starts or stops: similarity", "camera rests: similarity"):
        assert text in result.output
    memory = json.loads((tmp_path / "exported" / "model_index.json").read_text())["memory"]
    assert f"below similarity {float(memory.partition('@')[2]):.6f}" in result.output
    assert (tmp_path / "student" / "curves.png").is_file()
    assert (tmp_path / "exported" / "transformer").is_dir()
    for arguments, text in (
        ([*train, "--layers", "first"], "such as 0,1,4,5; got 'first'"),
        ([*train, "--init", "nothing", "--output", str(tmp_path / "new")], "`model` must be a name that"),
        (train, "holds a checkpoint"),
        ([*export, "--threshold", "2"], "`threshold` must be from 0 to 1, got 2.0"),
    ):
        result = CliRunner().invoke(training_app.app, arguments)
        assert isinstance(result.exception, UserError)
        assert text in str(result.exception)

"""Training end to end at toy size: repeatable, resumable, exported to the stock pipeline."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import WanPipeline
from safetensors import SafetensorError
from torch import Tensor
from typer.testing import CliRunner

from vidaccel.catalog.registry import spec_of
from vidaccel.errors import UserError
from vidaccel.training import app as training_app
from vidaccel.training import checkpoint, console_app
from vidaccel.training.architecture import TEXT_ENCODER_ARCHITECTURE, TRANSFORMER_ARCHITECTURE, VAE_ARCHITECTURE
from vidaccel.training.averaging import WeightAverage
from vidaccel.training.budget import Budget
from vidaccel.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from vidaccel.training.curves import read_records
from vidaccel.training.export import export_pipeline
from vidaccel.training.loop import Schedule, start_round
from vidaccel.training.transformer_trainer import TransformerTrainingConfig, train_transformer, trained_vae
from vidaccel.training.vae_trainer import VaePhase, VaeTrainingConfig, train_vae

SMALL_VAE = {**VAE_ARCHITECTURE, "base_dim": 4, "dim_mult": [1, 1, 2, 2]}
SMALL_TRANSFORMER = {
    **TRANSFORMER_ARCHITECTURE,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 32,
    "num_layers": 1,
    "freq_dim": 32,
    "text_dim": 16,
}
SMALL_TEXT_ENCODER = {**TEXT_ENCODER_ARCHITECTURE, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}
SCHEDULE = Schedule(steps=4, log_steps=2, num_validations=2, warmup_steps=2)


def vae_config(**changes: object) -> VaeTrainingConfig:
    config = VaeTrainingConfig(
        schedule=SCHEDULE,
        device="cpu",
        architecture=SMALL_VAE,
        phases=(
            VaePhase(until=0.5, batch_size=2, num_frames=1, size=32),
            VaePhase(until=1.0, batch_size=1, num_frames=5, size=32),
        ),
        num_frames=5,
        pool_clips=2,
        refresh_clips=1,
        refresh_steps=2,
        validation_clips=1,
    )
    return replace(config, **changes)


def transformer_config(**changes: object) -> TransformerTrainingConfig:
    config = TransformerTrainingConfig(
        schedule=replace(SCHEDULE, num_validations=1),
        device="cpu",
        transformer=SMALL_TRANSFORMER,
        text_encoder=SMALL_TEXT_ENCODER,
        num_frames=5,
        bank_clips=3,
        batch_size=2,
        validation_prompts=1,
        validation_steps=2,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "vae"
    list(train_vae(vae_config(), folder))
    return folder


@pytest.fixture(scope="module")
def transformer_folder(vae_folder: Path) -> Path:
    folder = vae_folder.parent / "transformer"
    list(train_transformer(transformer_config(), folder, vae=vae_folder))
    return folder


@pytest.fixture(scope="module")
def exported(vae_folder: Path, transformer_folder: Path) -> Path:
    return export_pipeline(
        vae_folder.parent / "exported", vae=vae_folder, transformer=transformer_folder, weights="toy"
    )


def weights(folder: Path, kind: str) -> dict[str, Tensor]:
    return load_checkpoint(folder, kind=kind)[1]  # type: ignore[arg-type]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_same_seed_trains_the_same_autoencoder(vae_folder: Path, tmp_path: Path) -> None:
    list(train_vae(vae_config(), tmp_path / "again"))
    list(train_vae(vae_config(seed=1), tmp_path / "other"))
    assert_same(weights(vae_folder, "vae"), weights(tmp_path / "again", "vae"))
    other = weights(tmp_path / "other", "vae")
    assert any(not torch.equal(value, other[name]) for name, value in weights(vae_folder, "vae").items())


def test_the_same_seed_trains_the_same_transformer(vae_folder: Path, transformer_folder: Path, tmp_path: Path) -> None:
    list(train_transformer(transformer_config(), tmp_path / "again", vae=vae_folder))
    assert_same(weights(transformer_folder, "transformer"), weights(tmp_path / "again", "transformer"))


def test_training_lowers_the_loss_of_the_autoencoder(tmp_path: Path) -> None:
    schedule = Schedule(steps=30, log_steps=10, num_validations=1, learning_rate=5e-3, warmup_steps=2)
    one_image = (VaePhase(until=1.0, batch_size=1, num_frames=1, size=128),)
    config = vae_config(schedule=schedule, phases=one_image, pool_clips=1, num_frames=1, refresh_steps=1000)
    records = [record for record in train_vae(config, tmp_path) if "loss" in record]
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert records[-1]["train_psnr"] > records[0]["train_psnr"] + 1


def test_an_interrupted_round_goes_on_and_a_finished_one_is_followed_by_another(tmp_path: Path) -> None:
    config, folder = vae_config(), tmp_path / "vae"
    records = train_vae(config, folder)
    while "psnr" not in (record := next(records)):
        pass
    records.close()
    interrupted, _ = load_checkpoint(folder, kind="vae")
    assert 0 < interrupted.round_step < 4
    assert interrupted.step == record["step"]

    list(train_vae(config, folder, resume=folder))
    finished, _ = load_checkpoint(folder, kind="vae")
    assert (finished.round, finished.step, finished.fraction) == (0, 4, 1.0)

    list(train_vae(config, tmp_path / "second", resume=folder))
    second, _ = load_checkpoint(tmp_path / "second", kind="vae")
    assert (second.round, second.round_step, second.step) == (1, 4, 8)
    assert second.seconds > finished.seconds
    steps = [record["step"] for record in read_records(tmp_path / "second" / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert steps[-1] == 8, "the records of the first round are carried along"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_leaves_a_checkpoint_of_the_last_step(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidaccel.training.vae_trainer import VaeTask

    def loss(task: VaeTask, fraction: float, original: Callable = VaeTask.loss) -> object:
        if task._steps == 1:
            raise stop
        return original(task, fraction)

    monkeypatch.setattr(VaeTask, "loss", loss)
    with pytest.raises(type(stop)):
        list(train_vae(vae_config(), tmp_path))
    assert load_checkpoint(tmp_path, kind="vae")[0].step == 1


@pytest.mark.parametrize("num_shown", [1, 2])
def test_an_interrupt_while_a_record_is_shown_reaches_the_training(
    num_shown: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = train_vae(vae_config(schedule=replace(SCHEDULE, log_steps=1)), tmp_path)
    monkeypatch.setattr(console_app, "_short", Mock(side_effect=[""] * (num_shown - 1) + [SystemExit(143)]))
    with pytest.raises(SystemExit):
        console_app.show(records, title="training", first=next(records))
    assert load_checkpoint(tmp_path, kind="vae")[0].round_step == num_shown


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM for one child")
@pytest.mark.parametrize("program", [["vidaccel", "train"], ["vidaccel.training.app"]], ids=" ".join)
def test_a_scheduler_that_ends_a_training_leaves_its_checkpoint(program: list[str], tmp_path: Path) -> None:
    made = tmp_path / "made"
    command = [sys.executable, "-m", *program, "vae", "--toy", "--steps", "1000000", "--output", str(made)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not (made / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert load_checkpoint(made, kind="vae")[0].step >= 2


def test_a_training_that_is_killed_goes_on_from_the_last_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidaccel.training import loop
    from vidaccel.training.vae_trainer import VaeTask

    def loss(task: VaeTask, fraction: float, original: Callable = VaeTask.loss) -> object:
        if task._steps == 2:
            raise RuntimeError("as SIGKILL: nothing is saved")
        return original(task, fraction)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_SAVE_SECONDS", 0.0)
        patched.setattr(VaeTask, "loss", loss)
        with pytest.raises(RuntimeError):
            list(train_vae(vae_config(), tmp_path))
    assert load_checkpoint(tmp_path, kind="vae")[0].step == 2
    list(train_vae(vae_config(), tmp_path, resume=tmp_path))
    assert load_checkpoint(tmp_path, kind="vae")[0].fraction == 1.0


def test_a_second_round_keeps_the_normalisation_of_the_latents(
    vae_folder: Path, transformer_folder: Path, tmp_path: Path
) -> None:
    config = transformer_config(bank_clips=2)
    list(train_transformer(config, tmp_path, vae=vae_folder, resume=transformer_folder))
    first, _ = load_checkpoint(transformer_folder, kind="transformer")
    second, _ = load_checkpoint(tmp_path, kind="transformer")
    assert second.latents_mean == first.latents_mean
    assert second.latents_std == first.latents_std


def test_the_stock_pipeline_loads_the_export_and_runs(exported: Path, vae_folder: Path) -> None:
    pipe = WanPipeline.from_pretrained(str(exported), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        "A red ball, on a zeppelin!", num_frames=5, height=32, width=32, num_inference_steps=2, output_type="pt"
    ).frames
    assert frames.shape == (1, 5, 3, 32, 32)
    assert torch.isfinite(frames).all()
    assert pipe.vae.config.latents_std != trained_vae(vae_folder).config.latents_std
    assert pipe.scheduler.config.flow_shift == 3.0
    assert pipe.tokenizer("A red ball, on a zeppelin!").input_ids.count(pipe.tokenizer.unk_token_id) == 1


def test_the_exported_weights_are_the_trained_ones_in_bf16(exported: Path, transformer_folder: Path) -> None:
    pipe = WanPipeline.from_pretrained(str(exported), local_files_only=True, dtype=torch.bfloat16)
    trained = weights(transformer_folder, "transformer")
    for network in ("transformer", "text_encoder"):
        for name, value in getattr(pipe, network).state_dict().items():
            if "embed_tokens" not in name:
                assert torch.equal(value.bfloat16(), trained[f"{network}.{name}"].bfloat16()), name


def test_the_export_says_what_it_is(exported: Path) -> None:
    spec = spec_of(str(exported))
    assert spec.weights == "toy"
    assert (spec.defaults.num_frames, spec.defaults.height, spec.defaults.max_sequence_length) == (5, 128, 64)
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "| transformer | 1 | 4 |" in card
    assert "optimizer muon" in card
    assert (exported / "transformer_curves.png").stat().st_size > 1000


def test_an_export_is_whole_or_not_there(vae_folder: Path, transformer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a complete checkpoint"):
        export_pipeline(tmp_path / "out", vae=vae_folder, transformer=tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists; give --overwrite"):
        export_pipeline(tmp_path / "out", vae=vae_folder, transformer=transformer_folder)


def test_a_checkpoint_of_the_wrong_kind_or_a_broken_one_is_one_clear_line(vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint of the vae, not of the transformer"):
        load_checkpoint(vae_folder, kind="transformer")
    (tmp_path / "state.json").write_text(json.dumps({"kind": "vae", "files": ["weights"]}), encoding="utf-8")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path, kind="vae")


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TrainingState(kind="vae", step=1), {"a": torch.ones(2)})
    with pytest.raises(FloatingPointError, match="diverged at step 2"):
        save_checkpoint(tmp_path, TrainingState(kind="vae", step=2), {"a": torch.tensor([1.0, float("nan")])})
    state, tensors = load_checkpoint(tmp_path, kind="vae")
    assert state.step == 1
    assert torch.equal(tensors["a"], torch.ones(2))


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, TrainingState(kind="vae", step=1), {"a": torch.ones(2)})
    monkeypatch.setattr(checkpoint, "save_file", fail := Mock(side_effect=SafetensorError("No space left on device")))
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        save_checkpoint(tmp_path, TrainingState(kind="vae", step=2), {"a": torch.zeros(2)})
    fail.assert_called_once()
    assert load_checkpoint(tmp_path, kind="vae")[0].step == 1


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("vae", ["--toy"]),
        ("transformer", ["--toy", "--vae", "none"]),
        ("causal", ["--toy"]),
        ("offline", ["--toy"]),
        ("export", ["--vae", "none", "--transformer", "none"]),
        ("export-causal", ["--causal", "none"]),
    ],
)
def test_what_runs_on_one_card_does_not_run_in_several_processes(
    command: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs on one card, and 2 processes were started; start one"):
        training_app.app([command, "--output", str(tmp_path / "made"), *given], standalone_mode=False)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("command", ["causal", "context-forcing", "offline"])
def test_a_file_in_the_way_of_an_output_is_seen_first(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"`output` must be a folder, .*file is a file"):
        training_app.app([command, "--output", str(tmp_path / "file" / "inside"), "--toy"], standalone_mode=False)


def test_large_checkpoints_are_split_and_read_back_whole(tmp_path: Path) -> None:
    tensors = {str(index): torch.full((1_500_000,), float(index)) for index in range(4)}
    save_checkpoint(tmp_path, TrainingState(kind="vae"), tensors)
    save_checkpoint(tmp_path, TrainingState(kind="vae", step=1), tensors)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 16_000_000
    assert_same(load_checkpoint(tmp_path, kind="vae")[1], tensors)


def test_the_budget_follows_the_clock_and_keeps_what_was_used_before() -> None:
    now = 100.0
    budget = Budget(seconds=10.0, steps=None, start=0.25, clock=lambda: now)
    assert budget.fraction(round_step=7) == 0.25
    now = 105.0
    assert budget.fraction(round_step=7) == 0.75
    assert Budget(seconds=None, steps=8).fraction(round_step=2) == 0.25


def test_the_average_lies_between_the_weights_it_saw_and_gives_them_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([parameter], decay=0.5)
    for value in (1.0, 2.0):
        parameter.data.fill_(value)
        average.update()
    with average.applied():
        inside = parameter.detach().clone()
    expected = torch.full((3,), 0.0)
    for step, value in enumerate((1.0, 2.0), start=1):
        decay = min(0.5, step / (step + 20))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(inside, expected)
    assert parameter.tolist() == [2.0, 2.0, 2.0]


def test_the_learning_rate_warms_up_and_ends_low() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup_steps=10, final_share=0.01)
    assert schedule.learning_rate_at(0.0, warm_step=0) == pytest.approx(0.1)
    assert schedule.learning_rate_at(0.5, warm_step=50) == pytest.approx(0.5)
    assert schedule.learning_rate_at(1.0, warm_step=99) == pytest.approx(0.01)


def test_the_learning_rate_may_stay_at_its_peak_and_fall_in_a_line() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup_steps=1, decay="linear", flat_share=0.3, final_share=0.02)
    rates = [schedule.learning_rate_at(fraction, warm_step=50) for fraction in (0.0, 0.3, 0.65, 1.0, 1.1)]
    assert rates == pytest.approx([1.0, 1.0, 0.51, 0.02, 0.02])
    cosine = Schedule(steps=100, learning_rate=1.0, warmup_steps=1, flat_share=0.5)
    assert [cosine.learning_rate_at(at, warm_step=50) for at in (0.5, 0.75)] == pytest.approx([1.0, 0.5])
    for wrong in ({"decay": "steps"}, {"flat_share": 1.0}):
        with pytest.raises(UserError):
            Schedule(steps=1, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{}, {"seconds": 1.0, "steps": 1}, {"steps": 0}, {"steps": math.inf}, {"seconds": -1.0}]
)
def test_a_training_without_a_clear_length_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Schedule(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["vae", "transformer", "causal", "context-forcing", "offline"])
@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--seconds", "inf", "`seconds` must be a finite number above 0, got inf"),
        ("--seconds", "nan", "`seconds` must be a finite number above 0, got nan"),
        ("--learning-rate", "inf", "`learning_rate` must be a finite number above 0, got inf"),
        ("--seed", str(2**63), "`seed` must be from 0 to 2\\*\\*63 - 1, got 9223372036854775808"),
        ("--seed", "-1", "`seed` must be from 0 to 2\\*\\*63 - 1, got -1"),
    ],
)
def test_no_training_is_endless_or_has_a_seed_that_does_not_fit(
    command: str, option: str, value: str, words: str, tmp_path: Path
) -> None:
    arguments = [command, "--output", str(tmp_path / "made"), "--toy", option, value]
    if command == "transformer":
        arguments += ["--vae", str(tmp_path)]
    with pytest.raises(UserError, match=words):
        training_app.app(arguments, standalone_mode=False)
    assert not (tmp_path / "made").exists()


def test_a_new_round_takes_the_new_recipe_and_the_old_steps() -> None:
    old = TrainingState(
        kind="vae", step=9, round_step=9, fraction=1.0, seconds=3.0, recipe={"seed": 0}, results={"psnr": 30.0}
    )
    started = start_round(old, TrainingState(kind="vae", recipe={"seed": 5}))
    assert (started.round, started.step, started.round_step, started.fraction) == (1, 9, 0, 0.0)
    assert started.recipe == {"seed": 5}
    assert started.results == {}, "those of the round before are not its own"
    assert started.history == [{"steps": 9, "seconds": 3.0, "recipe": {"seed": 0}}]
    third = start_round(replace(started, fraction=1.0, seconds=5.0, round_step=2), TrainingState(kind="vae"))
    assert [past["seconds"] for past in third.history] == [3.0, 2.0]


def test_the_commands_train_and_export_and_refuse_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(VaeTrainingConfig, "rehearsal", lambda config: vae_config())
    monkeypatch.setattr(TransformerTrainingConfig, "rehearsal", lambda config: transformer_config())
    vae, transformer, exported = (str(tmp_path / name) for name in ("vae", "transformer", "exported"))
    run = CliRunner().invoke
    for arguments in (
        ["vae", "--toy", "--steps", "4", "--output", vae],
        ["transformer", "--toy", "--steps", "4", "--vae", vae, "--output", transformer],
        ["export", "--vae", vae, "--transformer", transformer, "--output", exported, "--weights", "toy"],
    ):
        result = run(training_app.app, arguments)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "vae" / "curves.png").is_file()
    assert (tmp_path / "exported" / "model_index.json").is_file()

    monkeypatch.setattr("sys.argv", ["train", "vae", "--steps", "4", "--output", vae])
    with pytest.raises(SystemExit) as exit_info:
        training_app.main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

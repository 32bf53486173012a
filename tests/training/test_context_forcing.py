"""Distillation of a causal student: what learns from what, stages and views, exact resumption, starts, pictures."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from tests.support.tiny_donor import noise_bank
from tests.support.tiny_student import ARCHITECTURE, noise_prompts, save_forced
from vidaccel.catalog.models import EMBEDDED_STUDENT, EMBEDDED_TEACHER
from vidaccel.catalog.registry import spec_of
from vidaccel.errors import UserError
from vidaccel.memory.prefixes import without_prefix
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.training import app as training_app
from vidaccel.training import causal_task, causal_trainer
from vidaccel.training import context_forcing_step as step_module
from vidaccel.training import context_forcing_trainer as trainer_module
from vidaccel.training.causal_config import CausalTrainingConfig
from vidaccel.training.checkpoint import load_checkpoint, save_checkpoint
from vidaccel.training.chunk_batch import ChunkBatch, velocity_of
from vidaccel.training.context_forcing_config import (
    ContextForcingConfig,
    MatchingRule,
    RolloutRule,
    UpdateRule,
)
from vidaccel.training.context_forcing_networks import Networks
from vidaccel.training.context_forcing_starts import Forcing, ignorant_starts, load_beginning
from vidaccel.training.context_forcing_step import ContextForcing
from vidaccel.training.context_forcing_teacher import has_teacher, teacher_config, train_teacher
from vidaccel.training.context_forcing_trainer import train_context_forcing
from vidaccel.training.offline.fingerprint import TeacherFingerprint, weights_digest
from vidaccel.training.offline.loading import TEACHER
from vidaccel.training.self_rollout import PromptTable, StartShares, draw_starts
from vidaccel.training.trip_bank import TripBank

UPDATE = UpdateRule(critic_only=2, ratio=2)
ROLLOUT = RolloutRule(max_chunks=2)


def new_model(seed: int = 2) -> CausalWanTransformer3DModel:
    torch.manual_seed(seed)
    return CausalWanTransformer3DModel(**ARCHITECTURE)


def config(**changes: Any) -> ContextForcingConfig:
    values: dict[str, Any] = {
        "init": "nowhere",
        "updates": 3,
        "device": "cpu",
        "stage": "2",
        "update": UPDATE,
        "rollout": ROLLOUT,
        "batch_size": 2,
        "num_chunks": 7,
        "bank_clips": 4,
        "validation_trips": 0,
        "validations": 1,
        "log_steps": 2,
        "text": 40,
    }
    return ContextForcingConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def bank() -> TripBank:
    return noise_bank()


@pytest.fixture(scope="module")
def prompts(bank: TripBank) -> PromptTable:
    return noise_prompts(bank)


@pytest.fixture
def new_task(bank: TripBank, prompts: PromptTable) -> Any:
    def make(**changes: Any) -> ContextForcing:
        settings = config(**changes)
        networks = Networks(generator=new_model(), teacher=new_model(3), rule=settings.update)
        noise = torch.Generator().manual_seed(0)
        return ContextForcing(networks, settings, bank=bank, prompts=prompts, generator=noise)

    return make


def weights(network: torch.nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def moved(network: torch.nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(parameter, old) for parameter, old in zip(network.parameters(), before, strict=True))


# ---- one iteration ----------------------------------------------------------------------------------------------


def test_the_critic_learns_in_every_iteration_and_the_generator_in_every_second_after_a_while(new_task: Any) -> None:
    task = new_task()
    learnt = []
    for _ in range(7):
        generator, critic, teacher = (
            weights(network)
            for network in (task.networks.generator.network, task.networks.critic.network, task.networks.teacher)
        )
        scalars = task.iterate(0.5)
        assert moved(task.networks.critic.network, critic)
        assert not moved(task.networks.teacher, teacher)
        learnt.append(moved(task.networks.generator.network, generator))
        assert ("loss" in scalars) == learnt[-1]
    assert learnt == [False, False, True, False, True, False, True]
    assert task.num_updates == 3
    assert task.num_iterations == 7


def test_the_average_counts_updates_of_the_generator(new_task: Any) -> None:
    task = new_task()
    average = task.networks.average
    for number in range(6):
        before = [value.clone() for value in average.values]
        count = average.num_updates
        task.iterate(0.5)
        assert (average.num_updates > count) == (number in (2, 4))
        changed = any(not torch.equal(old, new) for old, new in zip(before, average.values, strict=True))
        assert changed == (average.num_updates > count)


def test_teacher_and_critic_see_what_their_view_says_and_the_generator_always_sees_all(
    new_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[int]] = {}

    def spied(name: str) -> Any:
        original = getattr(step_module, name)

        def wrapped(network: Any, batch: ChunkBatch, *args: Any, **kwargs: Any) -> Any:
            role = roles[id(network)]
            seen.setdefault(role, []).append(int(batch.context_mask.sum(1).max()))
            return original(network, batch, *args, **kwargs)

        return wrapped

    exit_pass = step_module.exit_pass

    def spied_exit(network: Any, scored: Any) -> Tensor:
        seen.setdefault("generator", []).append(int(scored.batch.context_mask.sum(1).max()))
        return exit_pass(network, scored)

    for name in ("context_of", "velocity_of"):
        monkeypatch.setattr(step_module, name, spied(name))
    monkeypatch.setattr(step_module, "exit_pass", spied_exit)
    rollout = replace(
        ROLLOUT, layouts="uniform", shares=StartShares(returns=1, arrivals=0, changes=0, anything=0, own=0)
    )
    for view in ("long", "short"):
        seen.clear()
        task = new_task(matching=MatchingRule(view=view, error_share=0), rollout=rollout)
        roles = {id(task.networks.teacher): "teacher", id(task.networks.critic.network): "critic"}
        for _ in range(5):
            task.iterate(0.5)
        assert max(seen["generator"]) > 6
        for role in ("teacher", "critic"):
            assert max(seen[role]) == (max(seen["generator"]) if view == "long" else 3)


def test_arms_draw_the_same_rollouts_whatever_the_view(new_task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = []
    for view in ("long", "short"):
        task = new_task(matching=MatchingRule(view=view, error_share=0))
        chunks = task._rolled_out(2, 0.5)
        first.append((chunks[0].batch.frames, chunks[0].noisy, chunks[0].exit_step))
    for one, other in zip(*first, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_the_critic_is_given_a_clean_past_and_its_loss_is_that_of_the_chunk_alone(
    new_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = new_task(matching=MatchingRule(error_share=0))
    (scored,) = task._rolled_out(2, 0.0)
    latents = torch.randn(scored.noisy.shape)
    given: list[tuple[Tensor, Tensor, Tensor]] = []

    def spied(network: Any, batch: ChunkBatch, noisy: Tensor, sigmas: Tensor, *, copies: int = 1) -> Tensor:
        given.append((batch.context, noisy, sigmas))
        return torch.zeros_like(noisy)

    monkeypatch.setattr(step_module, "velocity_of", spied)
    loss = task._follow(latents, scored.batch)["critic_loss"]
    ((context, noisy, sigmas),) = given
    assert torch.equal(context, scored.batch.context)
    levels = sigmas.view(-1, 1, 1, 1, 1)
    noise = (noisy - (1 - levels) * latents) / levels
    torch.testing.assert_close(loss, (noise - latents).square().mean(), rtol=1e-3, atol=1e-4)


def test_where_the_critic_is_the_teacher_the_generator_stays(new_task: Any) -> None:
    task = new_task(update=UpdateRule(critic_only=0, ratio=1))
    task.networks.critic.network.load_state_dict(task.networks.teacher.state_dict())
    (scored,) = task._rolled_out(2, 0.0)
    latents = step_module.exit_pass(task.networks.generator.network, scored)
    found = task._match(latents, scored.batch)
    assert float(found["loss"].detach()) == 0
    assert float(found["distance"]) > 0


def test_windows_levels_guidance_regression_and_recycled_errors_can_be_switched_on(new_task: Any) -> None:
    matching = MatchingRule(guidance=1.0, levels=2, flow_share=0.3, error_share=0.5, error_slow=True, landmark_weight=4)
    task = new_task(
        rollout=RolloutRule(max_chunks=3, scored=2), matching=matching, update=replace(UPDATE, critic_only=0)
    )
    plain = new_task(rollout=RolloutRule(max_chunks=3, scored=2), update=replace(UPDATE, critic_only=0))
    scalars = [one.iterate(1.0) for one in (task, plain)]
    assert set(scalars[0]) == {*scalars[1], "flow_loss"}
    assert all(bool(torch.isfinite(value)) for value in scalars[0].values())
    assert task.errors.count > 0


def test_judges_are_asked_and_the_critic_learns_at_the_levels_of_the_score_shift(
    new_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []

    def judged(network: Any, batch: Any, noisy: Tensor, sigmas: Tensor, *, copies: int) -> Tensor:
        asked.append(sigmas)
        return noisy

    def learnt(network: Any, batch: Any, noisy: Tensor, sigmas: Tensor, *, copies: int) -> Tensor:
        asked.append(sigmas)
        return velocity_of(network, batch, noisy, sigmas, copies=copies)

    def levels(shift: float) -> list[Tensor]:
        asked.clear()
        task = new_task(matching=MatchingRule(score_shift=shift))
        while task.num_updates == 0:
            task.iterate(0.5)
        return list(asked)

    monkeypatch.setattr(step_module, "_estimate", judged)
    monkeypatch.setattr(step_module, "velocity_of", learnt)
    usual, lower = levels(3.0), levels(0.5)
    assert len(usual) > 2, "teacher and critic of an update, and the critic's lessons"
    for one, other in zip(usual, lower, strict=True):
        times = one / (3.0 - 2.0 * one)
        torch.testing.assert_close(other, 0.5 * times / (1 - 0.5 * times))


def test_flow_matching_beside_it_is_of_returns_and_changes_at_the_levels_of_the_student(
    new_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = RolloutRule(max_chunks=2, shift=1.5)
    task, seen = new_task(matching=MatchingRule(flow_share=0.5), rollout=rule), []
    levels = set(torch.tensor(rule.sampler.sigmas).tolist())

    def drawn(bank: Any, draw: Any, *, count: int, num_chunks: int, shares: Any) -> Any:
        seen.append((shares.returns + shares.changes, shares.own))
        return draw_starts(bank, draw, count=count, num_chunks=num_chunks, shares=shares)

    def spied(network: Any, batch: Any, noisy: Tensor, sigmas: Tensor) -> Tensor:
        assert network is task.networks.generator.network
        seen.append(set(sigmas.tolist()) <= levels)
        return velocity_of(network, batch, noisy, sigmas)

    monkeypatch.setattr(step_module, "draw_starts", drawn)
    monkeypatch.setattr(step_module, "velocity_of", spied)
    scalars: dict[str, Tensor] = {}
    task._regress(scalars)
    assert seen == [(1.0, 0), True]
    assert float(scalars["flow_loss"]) > 0
    assert any(one.grad is not None and bool(one.grad.any()) for one in task.networks.generator.parameters)


def test_the_first_stage_is_short_rollouts_from_nothing_under_the_short_view(
    new_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = new_task(stage="both", first_share=0.25, rollout=RolloutRule(max_chunks=5))
    assert task.stage_at(0.0) == (1, 0.0)
    assert task.stage_at(0.125) == (1, 0.5)
    assert task.stage_at(0.25) == (2, 0.0)
    assert task.stage_at(1.0) == (2, 1.0)
    for _ in range(6):
        (scored,) = task._rolled_out(1, 1.0)
        assert int(scored.batch.first.max()) < 9
        assert len(set(scored.batch.first.tolist())) == 1
    views: list[str] = []
    original = step_module.view_of
    monkeypatch.setattr(step_module, "view_of", lambda batch, view: views.append(view) or original(batch, view))
    task.iterate(0.1)
    task.iterate(0.9)
    assert views == ["short", "long"]


def test_settings_that_make_no_sense_are_refused() -> None:
    for changes, words in (
        ({"updates": None}, "exactly one"),
        ({"seconds": 3.0}, "exactly one"),
        ({"updates": 0}, "above 0"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"num_chunks": 2}, "`num_chunks`"),
        ({"first_share": 2.0}, "`first_share`"),
        ({"validation_trips": -1}, "`validation_trips`"),
        ({"bank_seconds": -1.0}, "`bank_seconds`"),
    ):
        with pytest.raises(UserError, match=words):
            config(**changes)
    with pytest.raises(UserError, match="`scored`"):
        RolloutRule(scored=5)
    with pytest.raises(UserError, match="`max_chunks`"):
        RolloutRule(max_chunks=1, scored=2)
    with pytest.raises(UserError, match="`levels`"):
        MatchingRule(levels=0)
    with pytest.raises(UserError, match="`error_share`"):
        MatchingRule(error_share=1.5)
    with pytest.raises(UserError, match="`momentum`"):
        UpdateRule(momentum=1.0)
    with pytest.raises(UserError, match="`ratio`"):
        UpdateRule(ratio=0)


# ---- starts -----------------------------------------------------------------------------------------------------


def test_the_starts_of_a_seed_are_two_students_that_learnt_something(bank: TripBank, prompts: PromptTable) -> None:
    base = new_model()
    before = copy.deepcopy(base)
    made = [ignorant_starts(copy.deepcopy(base), bank, prompts, Forcing(steps=2, batch_size=2)) for _ in range(2)]
    for short, ignore in made:
        assert moved(short, weights(before))
        assert moved(ignore, weights(short))
    for first, again in zip(*made, strict=True):
        assert not moved(first, weights(again))
    with pytest.raises(UserError, match="exactly one"):
        Forcing()


# ---- the whole --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def init(donor_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a student as teacher forcing leaves it, untrained."""
    folder = tmp_path_factory.mktemp("forced") / "student"
    recipe = {
        "schedule": {"seconds": 3.0, "learning_rate": 0.5},
        "num_chunks": 7,
        "copies": 4,
        "validation_steps": 2,
    }
    known: dict[str, Any] = {"step": 7, "round_step": 7, "fraction": 1.0, "seconds": 3.0}
    return save_forced(new_model(), folder, init=donor_folder, recipe=recipe, **known)


@pytest.fixture
def noise_clips(bank: TripBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of noise instead of rendered ones, which take long to encode."""
    monkeypatch.setattr(trainer_module, "training_bank", lambda *args, **kwargs: bank)


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder, kind="causal")[1]


@pytest.mark.usefixtures("noise_clips")
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_leaves_a_checkpoint_of_the_last_iteration(
    init: str, stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def iterate(task: ContextForcing, fraction: float, original: Any = ContextForcing.iterate) -> Any:
        if task.num_iterations == 3:
            raise stop
        return original(task, fraction)

    monkeypatch.setattr(ContextForcing, "iterate", iterate)
    with pytest.raises(type(stop)):
        list(train_context_forcing(config(init=init), tmp_path))
    assert load_checkpoint(tmp_path, kind="causal")[0].progress["num_iterations"] == 3


@pytest.mark.usefixtures("noise_clips")
def test_a_run_that_was_killed_and_goes_on_gives_the_weights_of_one_that_was_not(init: str, tmp_path: Path) -> None:
    settings = config(init=init, updates=4, stage="both", first_share=0.3, save_seconds=0.0)
    list(train_context_forcing(settings, tmp_path / "whole"))
    run = train_context_forcing(settings, tmp_path / "killed")
    for record in run:
        if record["updates"] >= 2:
            break
    run.close()  # as a kill: what happened after the last checkpoint is lost
    state, _ = load_checkpoint(tmp_path / "killed", kind="causal")
    assert 0 < state.fraction < 1
    records = list(train_context_forcing(settings, tmp_path / "killed", resume=tmp_path / "killed"))
    assert records[-1]["fraction"] == 1.0
    whole, killed = (checkpoint_weights(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []
    states = [load_checkpoint(tmp_path / name, kind="causal")[0] for name in ("whole", "killed")]
    assert states[0].progress == states[1].progress
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)


@pytest.mark.usefixtures("noise_clips")
def test_the_checkpoint_is_one_of_a_causal_student_with_the_average_as_its_weights(init: str, tmp_path: Path) -> None:
    list(train_context_forcing(config(init=init), tmp_path / "made"))
    state, tensors = load_checkpoint(tmp_path / "made", kind="causal")
    student = CausalWanTransformer3DModel(**state.architecture["transformer"])
    student.load_state_dict(without_prefix("transformer", tensors))
    generator = without_prefix("generator.network", tensors)
    assert any(not torch.equal(tensor, generator[name]) for name, tensor in student.state_dict().items())
    assert state.origin is not None
    assert "distilled into 4 steps" in state.origin
    assert [past["steps"] for past in state.history] == [7]
    assert state.recipe["learning_rate"] == config().update.learning_rate
    assert (state.recipe["validation_steps"], state.recipe["validation_sampler"]) == (4, "stochastic")
    assert not {"schedule", "copies"} & state.recipe.keys(), "settings of teacher forcing"
    beginning = load_beginning(str(tmp_path / "made"))
    assert beginning.state is not None


def test_the_embedded_teacher_is_what_a_distillation_begins_from() -> None:
    teacher, student = load_beginning(EMBEDDED_TEACHER), load_beginning(EMBEDDED_STUDENT)
    assert teacher.student.config.num_layers == student.student.config.num_layers
    assert weights_digest(teacher.student) != weights_digest(student.student)
    folder = spec_of(EMBEDDED_TEACHER).folder
    assert folder is not None
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert not scheduler.config.stochastic_sampling, "it was not distilled"


@pytest.mark.usefixtures("noise_clips")
def test_a_student_that_followed_another_teacher_is_distilled_with_a_warning_and_others_without(
    init: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, tensors = load_checkpoint(Path(init), kind="causal")
    followed = TeacherFingerprint(
        weights=weights_digest(load_beginning(init).student),
        structure="causal",
        history="own",
        guidance_scale=1.0,
        schedule="euler 16 steps, shift 3",
    )
    for name, teacher in (("same", followed), ("other", replace(followed, weights="0123456789abcdef"))):
        recipe = {**state.recipe, TEACHER: teacher.to_dict()}
        save_checkpoint(tmp_path / name, replace(state, recipe=recipe), tensors)
    warnings = {}
    for name, view in ((init, "long"), ("same", "long"), ("same", "short"), ("other", "long")):
        caplog.clear()
        settings = config(init=name if name == init else str(tmp_path / name), matching=MatchingRule(view=view))
        next(train_context_forcing(settings, tmp_path / "made" / Path(name).name / view))
        warnings[name, view] = [record.getMessage() for record in caplog.records if record.name.endswith("fingerprint")]
    assert warnings[init, "long"] == warnings["same", "long"] == []
    assert "history is 'own' there, asked for 'last:3'" in warnings["same", "short"][0]
    assert "weights is '0123456789abcdef' there" in warnings["other", "long"][0]
    assert "schedule" not in warnings["other", "long"][0]


@pytest.mark.parametrize("length", [{"seconds": -1.0}, {"seconds": float("inf")}, {"steps": 0}])
def test_a_start_without_length_is_refused(length: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must be a finite number above 0"):
        Forcing(**length)


def test_what_is_no_student_to_distil_is_refused(donor_folder: str, init: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`init` must be a student that takes a camera"):
        list(train_context_forcing(config(init=donor_folder), tmp_path / "a"))
    with pytest.raises(UserError, match="no checkpoint of a distillation"):
        list(train_context_forcing(config(init=init), tmp_path / "b", resume=Path(init)))
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_the_command_distils_shows_pictures_and_exports_a_student_that_samples_with_fresh_noise(
    init: str, tmp_path: Path
) -> None:
    output, export = tmp_path / "made", tmp_path / "student"
    arguments = ["context-forcing", "--output", str(output), "--init", init, "--toy", "--device", "cpu"]
    arguments += ["--shift", "1.5", "--export", str(export)]
    result = CliRunner().invoke(training_app.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    state, _ = load_checkpoint(output, kind="causal")
    assert set(state.results) == {"as_seen", "blank", "valid", "first_visit_valid", "first_visit_likelihood"}
    (picture,) = (output / "samples").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (128, 3 * 128)
    assert (output / "curves.png").is_file()
    scheduler = json.loads((export / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["stochastic_sampling"], scheduler["shift"]) == (True, 1.5)
    assert json.loads((export / "vidaccel.json").read_text())["weights"] == "toy"
    assert "distilled into 4 steps" in (export / "README.md").read_text()


def forcing(donor: str, steps: int = 4) -> CausalTrainingConfig:
    """Teacher forcing in seconds, with a checkpoint on the way and nothing to read."""
    made = teacher_config(donor, seconds=None, steps=steps, layers=(0, 2), seed=0, device="cpu").rehearsal()
    schedule = replace(made.schedule, num_validations=2, log_steps=1)
    return replace(made, schedule=schedule, validation_trips=0, validation_clips=0)


def test_a_teacher_that_was_stopped_is_begun_again_and_is_the_one_it_would_have_been(
    donor_folder: str, bank: TripBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_trainer, "build_trip_bank", lambda *networks, **options: bank)
    settings, whole, killed = forcing(donor_folder), tmp_path / "whole", tmp_path / "killed"
    assert not has_teacher(settings, whole)
    list(train_teacher(settings, whole))
    run = train_teacher(settings, killed)
    next(record for record in run if record["fraction"] > 0.6)
    run.close()
    assert (killed / "state.json").is_file()
    assert not has_teacher(settings, killed)
    list(train_teacher(settings, killed))
    first, second = (checkpoint_weights(folder) for folder in (whole, killed))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    counts = [len((folder / "metrics.jsonl").read_text().splitlines()) for folder in (whole, killed)]
    assert counts[0] == counts[1], "what the stopped one recorded is gone"
    assert has_teacher(settings, killed)
    with pytest.raises(UserError, match=r"other settings \(schedule\)"):
        has_teacher(forcing(donor_folder, steps=5), killed)


@pytest.mark.usefixtures("noise_clips")
def test_one_command_makes_the_teacher_and_distils_it_and_goes_on_where_it_was_stopped(
    donor_folder: str, bank: TripBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_trainer, "build_trip_bank", lambda *networks, **options: bank)
    monkeypatch.setattr(causal_task.CausalTask, "validate", lambda task: {"as_seen": 0.5})
    monkeypatch.setattr(trainer_module.Validation, "results", lambda *students: {"as_seen": 0.25})
    flags = ["--init", donor_folder, "--layers", "0,2", "--teacher-steps", "2", "--toy", "--device", "cpu"]

    def run(output: Path, *more: str) -> Result:
        arguments = ["context-forcing", "--output", str(output), *flags, *more]
        return CliRunner().invoke(training_app.app, arguments, catch_exceptions=False)

    with monkeypatch.context() as stopped:

        def stop(*settings: object, **options: object) -> None:
            raise OSError("the machine is gone")

        stopped.setattr(trainer_module, "load_beginning", stop)
        with pytest.raises(UserError, match="the machine is gone"):
            run(tmp_path / "killed")
    before = (tmp_path / "killed" / "teacher" / "state.json").read_text()
    results = [run(tmp_path / "whole"), run(tmp_path / "killed", "--resume", str(tmp_path / "killed"))]
    assert [result.exit_code for result in results] == [0, 0]
    assert (tmp_path / "killed" / "teacher" / "state.json").read_text() == before, "the finished teacher is used"
    whole, killed = (checkpoint_weights(tmp_path / name) for name in ("whole", "killed"))
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []
    state, _ = load_checkpoint(tmp_path / "whole", kind="causal")
    assert [past["steps"] for past in state.history] == [2], "the card tells both rounds"
    with pytest.raises(UserError, match="goes on in its own folder"):
        run(tmp_path / "other", "--resume", str(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "0,1"], "give --teacher-seconds too"),
        (["--layers", "all", "--teacher-seconds", "9"], "`layers` must be numbers"),
        (["--teacher-seconds", "9", "--teacher-steps", "9"], "exactly one"),
        (["--shares", "returns=0.4"], "must sum to 1"),
        (["--shares", "homes=1"], "`shares` may name returns, arrivals, changes, anything, own; got 'homes'"),
        (["--shares", "nothing"], "names with numbers, such as returns=0.5,anything=0.5; got 'nothing'\\.$"),
        (["--shares", "returns=x"], "names with numbers, such as returns=0.5,anything=0.5; got 'returns=x'\\.$"),
        (["--shares", "returns=0.5,returns=0.5"], "each name once"),
        (["--shares", "own=2"], "begin with nothing must be from 0 to 1, got 2"),
        (["--teacher-share", "0.3"], "--teacher-share 0.3 is of exported weights; give --export too"),
        (["--max-chunks", "0"], "`max_chunks`"),
        (["--seconds", "5", "--updates", "5"], "exactly one"),
        (["--guidance", "-1"], "`guidance`"),
        (["--landmark-weight", "-1"], "`landmark_weight`"),
        (["--guidance", "inf"], "`guidance` must be a finite number of at least 0, got inf"),
        (["--critic-learning-rate", "nan"], "`critic_learning_rate` must be a finite number above 0, got nan"),
        (["--start-seconds", "inf"], "`start_seconds` must be a finite number above 0, got inf"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as raised:
        CliRunner().invoke(
            training_app.app, ["context-forcing", "--output", str(tmp_path / "out"), *arguments], catch_exceptions=False
        )
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "export", "words"),
    [
        ("out", ".", "is there already"),
        ("out", "out", "--export must lie outside of --output"),
        ("out", "out/teacher", "--export must lie outside of --output"),
        ("new/out", "new", "--export must lie outside of --output"),
    ],
)
def test_an_export_lies_outside_of_the_checkpoint(output: str, export: str, words: str, tmp_path: Path) -> None:
    places = ["--output", str(tmp_path / output), "--export", str(tmp_path / export)]
    with pytest.raises(UserError, match=words):
        CliRunner().invoke(training_app.app, ["context-forcing", *places], catch_exceptions=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("noise_clips")
def test_a_killed_run_with_adapters_goes_on_exactly_and_its_checkpoint_is_a_plain_student(
    init: str, tmp_path: Path
) -> None:
    settings = config(init=init, updates=3, save_seconds=0.0, lora=2, checkpointing=True)
    list(train_context_forcing(settings, tmp_path / "whole"))
    run = train_context_forcing(settings, tmp_path / "killed")
    next(record for record in run if record["updates"] >= 1)
    run.close()
    with pytest.raises(UserError, match="was made with `lora` 2 and goes on with the same; got None"):
        list(train_context_forcing(replace(settings, lora=None), tmp_path / "killed", resume=tmp_path / "killed"))
    list(train_context_forcing(settings, tmp_path / "killed", resume=tmp_path / "killed"))
    whole, killed = (checkpoint_weights(tmp_path / name) for name in ("whole", "killed"))
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []
    student = load_beginning(str(tmp_path / "whole")).student
    assert moved(student, weights(load_beginning(init).student))

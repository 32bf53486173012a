"""Teacher forcing of the causal student: how it begins, its loss, training, validation."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.support.tiny_donor import noise_bank
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.rollout.chunk import Shot, Student
from vidaccel.rollout.loop import rollout
from vidaccel.rollout.noise import chunk_generators
from vidaccel.rollout.state import new_state
from vidaccel.training import trip_bank
from vidaccel.training.causal_config import CausalTrainingConfig
from vidaccel.training.causal_rollout import TEXT_LENGTH, continue_clips
from vidaccel.training.causal_score import held_clips
from vidaccel.training.causal_student import load_donor, new_student, student_architecture, student_tensors
from vidaccel.training.causal_task import CausalTask, Target, draw_target
from vidaccel.training.causal_trainer import encoded_banks, train_causal, trained_student
from vidaccel.training.checkpoint import TrainingState, load_checkpoint
from vidaccel.training.chunk_batch import FROM_NOTHING, gather_batch, slots_of
from vidaccel.training.chunk_sampler import euler_sigmas, shifted_sampler
from vidaccel.training.flow import prompt_embeddings
from vidaccel.training.loop import Schedule
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank, build_trip_bank, training_clips
from vidaccel.world import Trip

SCHEDULE = Schedule(steps=4, log_steps=2, num_validations=1, warmup_steps=2, decay="linear", flat_share=0.3)


def causal_config(init: str, **changes: object) -> CausalTrainingConfig:
    config = CausalTrainingConfig(
        schedule=SCHEDULE,
        device="cpu",
        init=init,
        layers=(0, 2),
        camera_dim=8,
        num_chunks=4,
        bank_clips=2,
        batch_size=2,
        begin_batch=2,
        copies=2,
        validation_trips=0,
        validation_away_chunks=1,
        validation_clips=0,
        validation_chunks=2,
        validation_steps=2,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(donor_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal") / "student"
    list(train_causal(causal_config(donor_folder), folder))
    return folder


@pytest.fixture
def task(donor_folder: str) -> CausalTask:
    """A task of which nothing is trained, on a bank of noise; its student minds the camera."""
    donor = load_donor(donor_folder)
    torch.manual_seed(0)
    architecture = student_architecture(donor.transformer, num_layers=2, camera_dim=8)
    student = new_student(architecture, student_tensors(donor.transformer, layers=(0, 2)))
    for parameter in student.camera_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = causal_config(donor_folder)
    bank = noise_bank(num_clips=6)
    return CausalTask(student, donor, config, bank=bank, beginnings=bank, state=TrainingState(kind="causal"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder, kind="causal")[1]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# How it begins


def test_a_student_begins_as_the_kept_layers_of_its_donor_and_with_a_camera_that_changes_nothing(
    donor_folder: str,
) -> None:
    transformer = load_donor(donor_folder).transformer
    tensors, kept = transformer.state_dict(), student_tensors(transformer, layers=(2, 0))
    assert torch.equal(kept["blocks.0.ffn.net.2.weight"], tensors["blocks.2.ffn.net.2.weight"])
    assert torch.equal(kept["blocks.1.ffn.net.2.weight"], tensors["blocks.0.ffn.net.2.weight"])
    assert torch.equal(kept["proj_out.weight"], tensors["proj_out.weight"])
    assert not [name for name in kept if name.startswith("blocks.2.")]
    student = new_student(student_architecture(transformer, num_layers=2, camera_dim=8), kept)
    assert (student.takes_camera, student.clean_pass) == (True, "frame")
    assert student.camera_embedder.linear_2.weight.abs().max() == 0
    with pytest.raises(UserError, match="some of 0 to 2, got \\[3\\]"):
        student_tensors(transformer, layers=(3,))
    with pytest.raises(UserError, match="`layers` must be different ones, got \\[0, 0\\]"):
        student_tensors(transformer, layers=(0, 0))
    with pytest.raises(UserError, match="do not fit"):
        new_student(student_architecture(transformer, num_layers=3, camera_dim=8), kept)


def test_a_student_can_begin_from_another_student_and_keeps_its_camera(donor_folder: str, task: CausalTask) -> None:
    architecture = student_architecture(task.student, num_layers=2, camera_dim=99)
    again = new_student(architecture, student_tensors(task.student))
    assert architecture["camera_dim"] == 8
    assert same(again.state_dict(), task.student.state_dict())


def test_the_embedded_student_lends_its_transformer_and_the_embedded_model_the_rest() -> None:
    student, model = load_donor("wan-tiny-causal"), load_donor("wan-tiny")
    assert (student.transformer.config.num_layers, model.transformer.config.num_layers) == (4, 6)
    assert same(student.vae.state_dict(), model.vae.state_dict())
    assert same(student.text_encoder.state_dict(), model.text_encoder.state_dict())


# Targets and loss


def test_targets_are_drawn_from_the_tables_with_their_shares(donor_folder: str) -> None:
    bank, config = noise_bank(num_clips=8, num_chunks=15), causal_config(donor_folder)
    draw, count = random.Random(0), 4000
    targets = [draw_target(draw, bank, config) for _ in range(count)]
    shares = {kind: found / count for kind, found in Counter(target.kind for target in targets).items()}
    expected = {"returns": 0.5, "arrivals": 0.15, "changes": 0.15, "any": 0.2}
    assert shares == pytest.approx(expected, abs=0.03)
    for kind in ("returns", "arrivals", "changes"):
        drawn = {(target.row, target.chunk) for target in targets if target.kind == kind}
        assert drawn <= set(getattr(bank, kind))
    others = [target for target in targets if target.kind == "any"]
    assert {target.chunk for target in others} == set(range(15))
    assert 0.1 < sum(target.after_image for target in others) / len(others) < 0.3
    assert not [target for target in targets if target.after_image and target.chunk == 0]
    nothing = replace(bank, returns=(), arrivals=(), changes=())
    assert {draw_target(draw, nothing, config).kind for _ in range(200)} == {"any"}


def test_the_loss_of_a_copy_is_the_loss_of_that_copy_alone(task: CausalTask) -> None:
    batch = task._prompted(gather_batch(task.bank, [0, 3], [5, 2], [slots_of(5, "uniform"), slots_of(2, "none")]))
    sigmas = torch.tensor([[0.9, 0.3], [0.5, 0.8]])
    both = task.squared_errors(batch, sigmas, torch.Generator().manual_seed(4))
    noise = torch.randn(4, 16, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    for copy in range(2):
        one = noise[copy::2]
        noisy = (1 - sigmas[:, copy]).view(-1, 1, 1, 1, 1) * batch.chunk + sigmas[:, copy].view(-1, 1, 1, 1, 1) * one
        history = task.student.remember(
            batch.context,
            task.student.cache_prompt(batch.embeddings),
            positions=batch.context_positions,
            camera=batch.context_camera,
            mask=batch.context_mask,
        )
        velocity = task.student(
            noisy,
            1000 * sigmas[:, copy],
            batch.embeddings,
            history=history,
            frame_positions=batch.chunk_positions,
            camera=batch.chunk_camera,
        ).sample
        torch.testing.assert_close(both[:, copy], (velocity - (one - batch.chunk)).square(), atol=1e-4, rtol=1e-3)


def test_the_loss_has_gradients_for_every_weight_and_falls_on_the_same_batch(task: CausalTask) -> None:
    batch = task._prompted(gather_batch(task.bank, [0, 1], [5, 6], [slots_of(5, "uniform"), slots_of(6, "window")]))
    sigmas = torch.tensor([[0.9, 0.3], [0.5, 0.8]])

    def loss() -> Tensor:
        return task.squared_errors(batch, sigmas, torch.Generator().manual_seed(1)).mean()

    first = loss()
    first.backward()
    assert all(parameter.grad is not None for parameter in task.parameters)
    for optimizer in task.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
    for _ in range(8):
        for optimizer in task.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss().backward()
    assert loss() < 0.95 * first


def test_the_students_own_estimate_stands_for_the_chunk_before_and_nothing_else(task: CausalTask) -> None:
    targets = [Target(0, 5, False, "any"), Target(1, 1, True, "any"), Target(2, 0, False, "any")]
    slots = [slots_of(target.chunk, "uniform", after_image=target.after_image) for target in targets]
    batch = task._prompted(gather_batch(task.bank, [0, 1, 2], [5, 1, 0], slots))
    changed = task._with_own_estimate(task.bank, batch, targets, task.student)
    differs = (changed.context != batch.context).flatten(3).any(3).any(1)
    assert differs.nonzero().tolist() == [[0, 15], [0, 16], [0, 17]], "a given image stays, and so does nothing"
    disturbed = batch.disturbed(task.config.context_noise, task.generator).context - batch.context
    levels = disturbed[0, :, batch.context_mask[0]].abs().mean((0, 2, 3))
    assert (levels > 0).all()
    assert levels.max() < 0.3
    assert levels.unique().numel() == len(levels), "every frame has its own amount"
    assert not disturbed.transpose(1, 2)[~batch.context_mask].any(), "empty slots stay empty"


def test_the_first_copy_is_at_high_noise_and_the_records_hold_the_loss_of_returns(task: CausalTask) -> None:
    sigmas = task._sigmas(500)
    assert sigmas.shape == (500, 2)
    assert sigmas[:, 0].min() >= 0.8
    assert sigmas[:, 1].min() < 0.5
    loss, scalars = task.loss(0.0)
    assert loss.requires_grad
    assert set(scalars) == {"flow_loss", "return_loss", "begin_loss"}


def test_first_chunks_without_slots_are_those_with_empty_slots(task: CausalTask) -> None:
    rows = [0, 3, 1]
    batches = [
        task._prompted(gather_batch(task.bank, rows, [0, 0, 0], [layout] * 3))
        for layout in (slots_of(0, "none"), FROM_NOTHING)
    ]
    sigmas = torch.tensor([[0.9, 0.3], [0.5, 0.8], [0.6, 0.7]])
    empty, none = (task.squared_errors(one, sigmas, torch.Generator().manual_seed(2)) for one in batches)
    assert batches[1].frames.shape == (3, 0)
    torch.testing.assert_close(none, empty, atol=1e-5, rtol=1e-5)


def test_a_step_learns_from_first_chunks_beside_the_others(donor_folder: str, task: CausalTask) -> None:
    batch = task._beginnings()
    assert (batch.chunk.shape[0], batch.context.shape[2]) == (task.config.begin_batch, 0)
    assert not batch.first.any()
    without = CausalTask(
        task.student,
        task.donor,
        replace(task.config, begin_batch=0),
        bank=task.bank,
        beginnings=task.bank,
        state=TrainingState(kind="causal", architecture={}, recipe={}),
    )
    assert set(without.loss(0.0)[1]) == {"flow_loss", "return_loss"}


def test_clips_of_first_chunks_need_a_batch_of_them(donor_folder: str) -> None:
    with pytest.raises(UserError, match="`begin_clips` 3 are for first chunks, of which `begin_batch` 0"):
        causal_config(donor_folder, begin_clips=3, begin_batch=0)


def test_first_chunks_may_come_from_clips_of_their_own(donor_folder: str, tmp_path: Path) -> None:
    donor = load_donor(donor_folder)
    config = causal_config(donor_folder, begin_clips=3)
    bank, beginnings, _ = encoded_banks(donor, config, round_number=0)
    assert (bank.num_chunks, beginnings.num_chunks, len(beginnings.clips)) == (4, 1, 3)
    assert not {clip.seed for clip in bank.clips} & {clip.seed for clip in beginnings.clips}
    whole = build_trip_bank(
        donor.vae, donor.tokenizer, trips=training_clips([clip.seed for clip in beginnings.clips], num_chunks=4)
    )
    for name in ("latents", "columns", "motions", "coverage", "landmarks"):
        torch.testing.assert_close(getattr(beginnings, name), getattr(whole, name)[:, :CHUNK_FRAMES])
    assert torch.equal(beginnings.tokens, whole.tokens[:, :1])
    list(train_causal(replace(config, schedule=replace(SCHEDULE, steps=1)), tmp_path))
    assert load_checkpoint(tmp_path, kind="causal")[0].recipe["begin_clips"] == 3


def test_changes_may_come_from_short_clips_of_their_own(donor_folder: str, tmp_path: Path) -> None:
    config = causal_config(donor_folder, change_clips=12, change_batch=3)
    banks = encoded_banks(load_donor(donor_folder), config, round_number=0)
    assert banks.changed is not None
    assert (banks.changed.num_chunks, len(banks.changed.clips)) == (4, 12)
    assert banks.beginnings is banks.bank
    assert not {clip.seed for clip in banks.bank.clips} & {clip.seed for clip in banks.changed.clips}
    assert all(len(clip.spans) > 1 for clip in banks.changed.clips if isinstance(clip, Trip))
    list(train_causal(replace(config, schedule=replace(SCHEDULE, steps=1, log_steps=1)), tmp_path))
    recipe = load_checkpoint(tmp_path, kind="causal")[0].recipe
    assert (recipe["change_batch"], recipe["num_change_clips"]) == (3, 12)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["change_loss"] > 0


def test_a_step_learns_from_as_many_changes_as_it_is_told(donor_folder: str, task: CausalTask) -> None:
    changed = CausalTask(
        task.student,
        task.donor,
        replace(task.config, change_clips=5, change_batch=5),
        bank=task.bank,
        beginnings=task.bank,
        changed=replace(task.bank, changes=((2, 3), (4, 5))),
        state=TrainingState(kind="causal"),
    )
    seen: list[list[Target]] = []
    batch = changed._batch
    changed._batch = lambda bank, targets: (seen.append(list(targets)), batch(bank, targets))[1]  # type: ignore
    assert set(changed.loss(0.0)[1]) == {"flow_loss", "return_loss", "change_loss", "begin_loss"}
    assert [len(targets) for targets in seen] == [task.config.batch_size, 5]
    assert {(target.row, target.chunk) for target in seen[1]} <= {(2, 3), (4, 5)}


def test_short_clips_without_a_change_in_view_are_refused(donor_folder: str, task: CausalTask) -> None:
    with pytest.raises(UserError, match=r"None of the \d+ short clips shows .*--change-clips"):
        CausalTask(
            task.student,
            task.donor,
            task.config,
            bank=task.bank,
            beginnings=task.bank,
            changed=replace(task.bank, changes=()),
            state=TrainingState(kind="causal"),
        )


def test_changes_and_their_clips_go_together(donor_folder: str) -> None:
    for given in ({"change_clips": 3}, {"change_batch": 3}):
        with pytest.raises(UserError, match="give both or neither"):
            causal_config(donor_folder, **given)


def test_a_checkpoint_says_how_many_clips_there_was_time_for(
    donor_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trip_bank, "_CHUNKS_AT_A_TIME", 4)  # one clip
    config = causal_config(donor_folder, bank_clips=5, begin_clips=8, bank_seconds=1e-6)
    list(train_causal(replace(config, schedule=replace(SCHEDULE, steps=1)), tmp_path))
    recipe = load_checkpoint(tmp_path, kind="causal")[0].recipe
    assert (recipe["num_clips"], recipe["num_begin_clips"]) == (1, 4)


def test_no_two_seeds_rounds_or_beginnings_train_on_the_same_clips(donor_folder: str) -> None:
    donor, other = load_donor(donor_folder), load_donor(donor_folder)
    with torch.no_grad():
        next(other.transformer.parameters()).add_(1.0)
    seen: set[int] = set()
    for begun, seed, round_number in (
        (donor, 0, 0),
        (donor, 1, 0),
        (donor, 0, 1),
        (donor, 2**63 - 1, 0),
        (other, 0, 0),
    ):
        config = causal_config(donor_folder, seed=seed)
        bank, *_ = encoded_banks(begun, config, round_number=round_number)
        seeds = {clip.seed for clip in bank.clips}
        assert len(seeds) == config.bank_clips
        assert not seeds & seen
        seen |= seeds


# Rollouts


@torch.no_grad()
def test_the_functional_rollout_is_the_one_with_a_memory(task: CausalTask) -> None:
    prompts = ["a red ball hops up and down on a grassy meadow"]
    clips = held_clips(task.donor, prompts, bank=task.bank, num_chunks=6)
    memory = MemoryConfig(keyframe_rule="uniform", keyframe_interval=3)
    embeddings = prompt_embeddings(task.donor.text_encoder, clips.tokens[:, 0], length=TEXT_LENGTH)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    student = Student(transformer=task.student, scheduler=scheduler, num_inference_steps=2, guidance_scale=1.0)
    state = new_state(student, memory, height=4, width=4, seeds=(5,))
    shot = Shot(start_chunk=0, prompt=prompts[0], embeddings=(embeddings, embeddings))
    fast = [chunk.latents for chunk in rollout(student, state, [shot], num_chunks=6)]

    def noise(chunk: int, shape: torch.Size) -> Tensor:
        return torch.randn(shape[1:], generator=chunk_generators([5], chunk)[0])[None]

    slow = continue_clips(
        task.student, task.donor.text_encoder, clips, first_chunk=0, sampler=shifted_sampler(2), noise=noise
    )
    torch.testing.assert_close(slow.transpose(1, 2), torch.cat(fast, dim=2), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_chunks_before_the_first_stay_and_hidden_frames_change_what_follows(task: CausalTask) -> None:
    def made(bank: TripBank, *, stochastic: bool = False, hidden: Tensor | None = None) -> Tensor:
        sampler = shifted_sampler(2, stochastic=stochastic)
        return continue_clips(
            task.student, task.donor.text_encoder, bank, first_chunk=5, sampler=sampler, hidden=hidden
        )

    plain, hidden = made(task.bank), torch.zeros(task.bank.latents.shape[:2], dtype=torch.bool)
    assert torch.equal(plain[:, :15], task.bank.latents[:, :15].float())
    assert not torch.equal(plain[:, 15:], task.bank.latents[:, 15:].float())
    assert torch.equal(made(task.bank, hidden=hidden), plain)
    hidden[0, 6:9] = True
    others = made(task.bank, hidden=hidden)
    assert not torch.allclose(others[0], plain[0])
    torch.testing.assert_close(others[1:], plain[1:])
    assert not torch.allclose(made(task.bank, stochastic=True), plain)
    assert euler_sigmas(4) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


# Training


def test_the_same_seed_trains_the_same_student(donor_folder: str, trained: Path, tmp_path: Path) -> None:
    list(train_causal(causal_config(donor_folder), tmp_path / "again"))
    list(train_causal(causal_config(donor_folder, seed=1), tmp_path / "other"))
    assert same(weights(trained), weights(tmp_path / "again"))
    assert not same(weights(trained), weights(tmp_path / "other"))


def test_a_finished_round_is_followed_by_another_that_goes_on_from_its_weights_and_reads_everything(
    donor_folder: str, trained: Path, tmp_path: Path
) -> None:
    config = causal_config(
        donor_folder,
        schedule=replace(SCHEDULE, steps=1, learning_rate=1e-9),
        validation_trips=1,
        validation_clips=1,
    )
    records = list(train_causal(config, tmp_path, resume=trained))
    state, tensors = load_checkpoint(tmp_path, kind="causal")
    assert (state.round, state.step, state.round_step) == (1, 5, 1)
    assert all(torch.allclose(value, tensors[name], atol=1e-5) for name, value in weights(trained).items())
    found = records[-1]
    shares = {"as_seen", "blank", "own_recall", "colour", "shape", "motion", "background", "kept"}
    losses = {f"{clips}_{kind}" for clips in ("held_out", "trained") for kind in ("arrivals", "beginnings")}
    assert shares | losses | {"first_visit_likelihood", "true_likelihood"} <= found.keys()
    assert all(0 <= found[name] <= 1 for name in shares)
    assert state.results == {name: found[name] for name in state.results}
    with pytest.raises(UserError, match="checkpoint of the causal, not of the transformer"):
        load_checkpoint(trained, kind="transformer")


def test_a_checkpoint_gives_back_the_student_that_was_trained(trained: Path, donor_folder: str) -> None:
    state, student = trained_student(trained)
    assert same(student.state_dict(), {name.partition(".")[2]: value for name, value in weights(trained).items()})
    assert (state.architecture["transformer"]["camera_dim"], student.clean_pass) == (8, "frame")
    start = student_tensors(load_donor(donor_folder).transformer, layers=(0, 2))
    assert not torch.equal(student.state_dict()["proj_out.weight"], start["proj_out.weight"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"copies": 0}, "`copies` must be a whole number of at least 1; got 0"),
        ({"own_share": 1.5}, "`own_share` must be from 0 to 1, got 1.5"),
        ({"return_share": 0.8}, "must not exceed 1 together, got 1.1"),
        ({"landmark_weight": float("nan")}, "`landmark_weight` must be a finite number of at least 0, got nan"),
        ({"validation_clips": -1}, "`validation_clips` must be a whole number of at least 0; got -1"),
        ({"bank_seconds": 0.0}, "`bank_seconds` must be a finite number above 0, got 0"),
        ({"bank_seconds": float("inf")}, "`bank_seconds` must be a finite number above 0, got inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        causal_config("wan-tiny", **changes)

"""What training at published size needs, on tiny networks: checkpointing, packed memories, prompts, adapters."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_donor import noise_bank
from tests.support.tiny_student import camera_student, noise_prompts, tiny_text_encoder
from vidaccel.errors import UserError
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.training import adapters
from vidaccel.training.adapters import adapted, merged
from vidaccel.training.chunk_batch import ChunkBatch, context_of, velocity_of
from vidaccel.training.context_forcing_config import ContextForcingConfig, RolloutRule, UpdateRule
from vidaccel.training.context_forcing_networks import Networks, adapted_networks
from vidaccel.training.context_forcing_step import ContextForcing
from vidaccel.training.self_rollout import PromptTable, Start, layout_rule, new_video
from vidaccel.training.trip_bank import TripBank

RULE = UpdateRule(critic_only=0, ratio=1)


@pytest.fixture(scope="module")
def bank() -> TripBank:
    return noise_bank()


@pytest.fixture(scope="module")
def prompts(bank: TripBank) -> PromptTable:
    return noise_prompts(bank)


def seen_in(bank: TripBank, prompts: PromptTable, *starts: tuple[int, int], layouts: Any = "window") -> ChunkBatch:
    places = [Start(*start) for start in starts]
    return new_video(bank, prompts, places, rule=layout_rule(bank, layouts, random.Random(0))).batch(0)


def velocity(student: Any, batch: ChunkBatch) -> Tensor:
    return velocity_of(student, batch, batch.chunk, torch.full((len(batch.chunk),), 0.6))


# ---- checkpointing ----------------------------------------------------------------------------------------------


def gradients(student: CausalWanTransformer3DModel, loss: Tensor) -> list[Tensor]:
    student.zero_grad()
    loss.backward()
    return [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in student.parameters()]


@pytest.mark.parametrize("way", ["history", "full pass"])
def test_gradients_with_checkpointing_are_those_without(bank: TripBank, prompts: PromptTable, way: str) -> None:
    batch = seen_in(bank, prompts, (0, 5), (1, 3))
    student = camera_student()

    def loss() -> Tensor:
        if way == "history":
            return velocity(student, batch).square().mean()
        embeddings, time = batch.embeddings, torch.full((2,), 400.0)
        return student(batch.chunk, time, embeddings, chunk_frames=1, return_dict=False)[0].square().mean()

    plain = gradients(student, loss())
    student.enable_gradient_checkpointing()
    again = gradients(student, loss())
    assert sum(float(one.abs().sum()) for one in plain) > 0
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_checkpointing_computes_the_blocks_again_and_keeps_less(bank: TripBank, prompts: PromptTable) -> None:
    batch = seen_in(bank, prompts, (0, 5))
    student = camera_student()

    def kept() -> int:
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            velocity(student, batch)
        return sum(saved)

    plain = kept()
    student.enable_gradient_checkpointing()
    assert kept() < plain / 3


# ---- a sample alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [(0, 0), (0, 2), (0, 6)], ids=["nothing", "half", "full"])
def test_a_sample_alone_is_seen_as_beside_others_but_without_its_empty_slots(
    bank: TripBank, prompts: PromptTable, start: tuple[int, int]
) -> None:
    student = camera_student()
    pair = seen_in(bank, prompts, start, (1, 6))
    alone = seen_in(bank, prompts, start)
    torch.testing.assert_close(velocity(student, alone)[0], velocity(student, pair)[0], rtol=1e-4, atol=1e-5)
    history = context_of(student, alone).history
    assert (history.mask is None) == (start[1] > 0)
    assert history.layers[0][0].shape[1] == 4 * max(int(alone.context_mask.sum()), 1)


# ---- prompts ----------------------------------------------------------------------------------------------------


def test_prompts_that_do_not_fit_are_embedded_anew_for_every_batch(bank: TripBank, prompts: PromptTable) -> None:
    rows, chunks = torch.tensor([0, 3]), torch.tensor([1, 5])
    anew = PromptTable(bank, tiny_text_encoder(), length=40, most_bytes=1000)
    torch.testing.assert_close(anew.of(rows, chunks), prompts.of(rows, chunks))
    torch.testing.assert_close(anew.empty, prompts.empty)
    assert anew._embeddings is None


# ---- adapters ---------------------------------------------------------------------------------------------------


def lora_networks() -> Networks:
    return adapted_networks(camera_student(3), rank=3, seed=0, rule=RULE, checkpointing=True)


def lora_task(bank: TripBank, prompts: PromptTable, networks: Networks) -> ContextForcing:
    config = ContextForcingConfig(
        init="nowhere",
        updates=3,
        stage="2",
        update=RULE,
        rollout=RolloutRule(max_chunks=2),
        batch_size=2,
        num_chunks=7,
        lora=3,
        checkpointing=True,
    )
    return ContextForcing(networks, config, bank=bank, prompts=prompts, generator=torch.Generator().manual_seed(0))


def test_networks_with_adapters_are_the_teacher_at_first_on_the_very_same_weights(
    bank: TripBank, prompts: PromptTable
) -> None:
    networks = lora_networks()
    batch = seen_in(bank, prompts, (0, 5), (1, 3))
    wanted = velocity(networks.teacher, batch)
    places = {one.data_ptr() for one in networks.teacher.parameters()}
    for learner in (networks.generator, networks.critic):
        torch.testing.assert_close(velocity(learner.network, batch), wanted)
        own = [one for one in learner.network.parameters() if one.data_ptr() not in places]
        assert len(own) == len(learner.parameters) == 2 * 2 * 10  # two matrices for ten layers of two blocks
        assert all(one.requires_grad for one in own)


def test_only_adapters_learn_and_each_network_its_own(bank: TripBank, prompts: PromptTable) -> None:
    networks = lora_networks()
    frozen = [one.clone() for one in networks.teacher.parameters()]
    first = [one.detach().clone() for one in networks.generator.parameters]
    task = lora_task(bank, prompts, networks)
    for _ in range(2):
        scalars = task.iterate(0.5)
    assert all(bool(torch.isfinite(value)) for value in scalars.values())
    assert all(torch.equal(one, old) for one, old in zip(networks.teacher.parameters(), frozen, strict=True))
    moved = [not torch.equal(one, old) for one, old in zip(networks.generator.parameters, first, strict=True)]
    assert any(moved)
    known = [id(one) for optimizer in networks.generator.optimizers for one in optimizer.param_groups[0]["params"]]
    assert sorted(known) == sorted(map(id, networks.generator.parameters))
    batch = seen_in(bank, prompts, (0, 5), (1, 3))
    velocities = [velocity(one, batch) for one in (networks.teacher, networks.critic.network)]
    assert not torch.allclose(*velocities, rtol=1e-6, atol=1e-8)


def test_the_merged_average_gives_what_the_adapted_generator_gives(bank: TripBank, prompts: PromptTable) -> None:
    networks = lora_networks()
    with torch.no_grad():
        for number, value in enumerate(networks.average.values):
            torch.nn.init.normal_(value, std=0.2, generator=torch.Generator().manual_seed(number))
    plain = camera_student(0)
    plain.load_state_dict(networks.averaged())
    batch = seen_in(bank, prompts, (0, 5), (1, 3))
    with networks.average.applied():
        wanted = velocity(networks.generator.network, batch)
    torch.testing.assert_close(velocity(plain, batch), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, velocity(networks.teacher, batch), atol=1e-2)
    state = camera_student(1).state_dict()
    assert merged(state) == state


def test_adapted_networks_go_on_from_what_was_saved(bank: TripBank, prompts: PromptTable) -> None:
    task = lora_task(bank, prompts, lora_networks())
    for _ in range(2):
        task.iterate(0.5)
    saved = {name: tensor.clone() for name, tensor in task.networks.tensors().items()}
    other = adapted_networks(camera_student(8), rank=3, seed=9, rule=RULE, checkpointing=False)
    other.load(saved, num_updates=2)
    found = other.tensors()
    assert found.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(saved[name], found[name])] == []
    assert not any(name.startswith("generator") and "base_layer" in name for name in saved), "kept once, as the teacher"


def test_adapters_that_make_no_sense_or_cannot_be_made_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ContextForcingConfig(init="nowhere", updates=3)
    with pytest.raises(UserError, match="`lora` must be a whole number of at least 1 or None; got 0"):
        replace(settings, lora=0)
    with pytest.raises(UserError, match="as-is"):
        replace(settings, lora=4, start="ignore")
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vidaccel\[lora\]"):
        adapted(camera_student(), rank=2, seed=0)

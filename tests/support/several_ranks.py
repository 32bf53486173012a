"""What the processes of `test_several_ranks` do: `python -m tests.support.several_ranks TASK FOLDER [INIT]`.

step: three updates of generator and critic on a fixed batch, of which every rank has its part; writes all tensors.
train: a distillation, once whole, once killed and once ended by SIGTERM, both resumed; writes the checkpoints `whole`,
    `killed` and `stopped`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.tiny_donor import noise_bank
from tests.support.tiny_student import camera_student, noise_prompts
from vidaccel.training import context_forcing_trainer as trainer
from vidaccel.training.checkpoint import load_checkpoint
from vidaccel.training.chunk_batch import velocity_of
from vidaccel.training.context_forcing_config import ContextForcingConfig, RolloutRule, UpdateRule
from vidaccel.training.context_forcing_networks import Networks, adapted_networks
from vidaccel.training.context_forcing_step import ContextForcing
from vidaccel.training.dmd import flow_loss
from vidaccel.training.ranks import join_ranks, num_ranks, own_rank
from vidaccel.training.self_rollout import Start, layout_rule, new_video

STARTS = (Start(0, 5), Start(1, 4))
SIGMAS = (0.5, 0.8)


def new_networks(lora: int | None) -> Networks:
    rule = UpdateRule()
    if lora is not None:
        return adapted_networks(camera_student(3), rank=lora, seed=0, rule=rule, checkpointing=True)
    return Networks(generator=camera_student(2), teacher=camera_student(3), rule=rule, checkpointing=True)


def updated(lora: int | None, samples: list[int], *, rounds: int = 3) -> dict[str, torch.Tensor]:
    """All tensors of the networks after updates on `samples` of the batch, every sample by itself."""
    bank = noise_bank()
    prompts = noise_prompts(bank)
    networks = new_networks(lora)
    for _ in range(rounds):
        for learner in (networks.generator, networks.critic):
            for sample in samples:
                rule = layout_rule(bank, "window", random.Random(0))
                batch = new_video(bank, prompts, [STARTS[sample]], rule=rule).batch(0)
                noise = torch.randn(batch.chunk.shape, generator=torch.Generator().manual_seed(sample))
                sigmas = torch.tensor([SIGMAS[sample]])
                velocity = velocity_of(learner.network, batch, 0.5 * (batch.chunk + noise), sigmas)
                (flow_loss(velocity, noise=noise, clean=batch.chunk) / len(samples)).backward()
            learner.step()
        networks.average.update()
    saved = networks.tensors()
    again = new_networks(lora)
    again.load(saved, num_updates=rounds)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.tensors().items())
    return saved


def distil(folder: Path, init: str) -> None:
    trainer.training_bank = lambda *args, **kwargs: noise_bank()  # type: ignore[assignment]
    settings = ContextForcingConfig(
        init=init,
        updates=3,
        device="cpu",
        stage="both",
        first_share=0.3,
        update=UpdateRule(critic_only=2, ratio=2),
        rollout=RolloutRule(max_chunks=2),
        batch_size=1,
        num_chunks=7,
        bank_clips=4,
        validation_trips=0,
        validations=1,
        log_steps=2,
        text=40,
        save_seconds=0.0,
        checkpointing=True,
    )
    list(trainer.train_context_forcing(settings, folder / "whole"))
    run = trainer.train_context_forcing(settings, folder / "killed")
    next(record for record in run if record["updates"] >= 1)
    run.close()
    torch.distributed.barrier()  # rank 0 has written
    list(trainer.train_context_forcing(settings, folder / "killed", resume=folder / "killed"))
    stop(replace(settings, save_seconds=1e6), folder / "stopped")


def stop(settings: ContextForcingConfig, folder: Path) -> None:
    """SIGTERM comes to rank 0 alone, in the middle of an iteration; both end with the same one and go on from it."""
    iterate = ContextForcing.iterate

    def interrupted(task: ContextForcing, fraction: float) -> dict[str, torch.Tensor]:
        if own_rank() == 0 and task.num_iterations == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(task, fraction)

    ContextForcing.iterate = interrupted  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as end:
        list(trainer.train_context_forcing(settings, folder))
    assert end.value.code == 128 + signal.SIGTERM
    ContextForcing.iterate = iterate  # type: ignore[method-assign]
    torch.distributed.barrier()  # rank 0 has written
    state, _ = load_checkpoint(folder, kind="causal")
    assert [rank["num_iterations"] for rank in state.progress["ranks"]] == [4, 4]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    list(trainer.train_context_forcing(settings, folder, resume=folder))


def main(task: str, folder: str, *init: str) -> None:
    join_ranks(torch.device("cpu"))
    assert num_ranks() == 2
    if task == "train":
        distil(Path(folder), *init)
        return
    for lora in (None, 3):
        found = updated(lora, [own_rank()])
        if own_rank() == 0:
            save_file(
                {name: one.contiguous().clone() for name, one in found.items()}, Path(folder) / f"{lora}.safetensors"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])

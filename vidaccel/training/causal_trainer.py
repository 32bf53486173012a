"""Teacher forcing of the causal student on trips: it makes a chunk, and what it remembers is the truth.

Context Forcing starts its student from such weights (arXiv 2602.06028). Every sample of a batch has a memory of its
own kind (`chunk_batch`), and several noisy copies of its chunk see the same remembered frames.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vidaccel.errors import UserError
from vidaccel.machine.environment import code_version
from vidaccel.memory import DepthMap
from vidaccel.memory.prefixes import without_prefix
from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_config import CausalTrainingConfig
from vidaccel.training.causal_student import Donor, load_donor, new_student, student_architecture, student_tensors
from vidaccel.training.causal_task import CausalTask
from vidaccel.training.checkpoint import TrainingState, load_checkpoint
from vidaccel.training.device import training_device
from vidaccel.training.loop import Record, carry_records, start_round, train
from vidaccel.training.offline.fingerprint import weights_digest
from vidaccel.training.ranks import check_alone
from vidaccel.training.trip_bank import (
    CHANGE_CHUNKS,
    TripBank,
    build_trip_bank,
    change_clips,
    first_chunks,
    training_clips,
)

_SEEDS_PER_ROUND = 10_000_000
_ROUNDS_PER_SEED = 1000


class Banks(NamedTuple):
    """Clips to train on, those of which first chunks are taken, and short ones of changes, if there are any."""

    bank: TripBank
    beginnings: TripBank
    changed: TripBank | None

    @property
    def sizes(self) -> dict[str, int]:
        """How many clips there are of each, for the records."""
        sizes = {"num_clips": len(self.bank.clips), "num_begin_clips": len(self.beginnings.clips)}
        return sizes if self.changed is None else {**sizes, "num_change_clips": len(self.changed.clips)}


def train_causal(
    config: CausalTrainingConfig,
    output: Path,
    *,
    resume: Path | None = None,
    on_bank: Callable[[int, int], None] | None = None,
) -> Iterator[Record]:
    """Train the causal student into the checkpoint folder `output`; yields records with loss and speed.

    resume: a checkpoint to go on from. on_bank: called with finished and all clips while the bank is built.
    Raises `UserError` for a checkpoint or a pipeline that cannot be used, FloatingPointError if training diverges.
    """
    began = time.monotonic()
    check_alone("Teacher forcing")
    device = training_device(config.device)
    torch.manual_seed(config.seed)
    saved, tensors = load_checkpoint(resume, kind="causal") if resume else (None, {})
    donor = load_donor(config.init)
    num_layers = donor.transformer.config.num_layers if config.layers is None else len(config.layers)
    architecture = student_architecture(donor.transformer, num_layers=num_layers, camera_dim=config.camera_dim)
    trained_so = {"kv_routing": config.kv_routing, "depth_every": config.depth_every}
    fresh = TrainingState(kind="causal", architecture={"transformer": architecture}, recipe=causal_recipe(config))
    state = start_round(saved, fresh)
    state = replace(state, architecture={"transformer": {**state.architecture["transformer"], **trained_so}})
    DepthMap.every(config.depth_every, state.architecture["transformer"]["num_layers"])
    weights = without_prefix("transformer", tensors) or student_tensors(donor.transformer, layers=config.layers)
    student = new_student(state.architecture["transformer"], weights).to(device)
    if config.checkpointing:
        student.enable_gradient_checkpointing()
    donor.vae.to(device)
    donor.text_encoder.to(device)
    banks = encoded_banks(donor, config, round_number=state.round, on_bank=on_bank)
    state = replace(state, recipe={**state.recipe, **banks.sizes})
    carry_records(resume, output)
    torch.manual_seed(config.seed)
    task = CausalTask(
        student, donor, config, bank=banks.bank, beginnings=banks.beginnings, changed=banks.changed, state=state
    )
    reserve = 5 + 0.1 * (config.validation_clips + config.validation_trips)
    yield from train(task, config.schedule, state=state, output=output, began=began, reserve=reserve)


def encoded_banks(
    donor: Donor,
    config: CausalTrainingConfig,
    *,
    round_number: int,
    on_bank: Callable[[int, int], None] | None = None,
) -> Banks:
    """The clips of a training.

    They are of no other seed or round, nor of a training that begins from other weights: what a student was trained on
    before it knows already.
    """
    begun_from = int(weights_digest(donor.transformer), 16)
    first = ((begun_from + config.seed) * _ROUNDS_PER_SEED + round_number) * _SEEDS_PER_ROUND
    begin = first + config.bank_clips
    change = begin + config.begin_clips
    clips = partial(training_clips, num_chunks=config.num_chunks, hold_share=config.hold_share)
    parts = {
        "bank": clips(range(first, begin)),
        "beginnings": first_chunks(clips(range(begin, change))),
        "changed": change_clips(range(change, change + config.change_clips)),
    }
    lengths = {"bank": config.num_chunks, "beginnings": 1, "changed": CHANGE_CHUNKS}
    chunks = {name: len(part) * lengths[name] for name, part in parts.items()}
    encoded = {
        name: build_trip_bank(
            donor.vae,
            donor.tokenizer,
            trips=part,
            seconds=None if config.bank_seconds is None else config.bank_seconds * chunks[name] / sum(chunks.values()),
            on_progress=on_bank,
        )
        for name, part in parts.items()
        if part
    }
    return Banks(encoded["bank"], encoded.get("beginnings", encoded["bank"]), encoded.get("changed"))


def trained_student(checkpoint: Path, *, teacher_share: float = 0.0) -> tuple[TrainingState, Transformer]:
    """State and student of a checkpoint, in float32.

    teacher_share: of a distillation, how much of every weight is its teacher's (Wortsman et al., arXiv 2109.01903).
    Raises `UserError` if it cannot be used, or has no teacher and is to have a share of one.
    """
    state, tensors = load_checkpoint(checkpoint, kind="causal")
    weights = without_prefix("transformer", tensors)
    if teacher_share > 0:
        teacher = without_prefix("teacher", tensors)
        if not teacher:
            raise UserError(f"{checkpoint} is no checkpoint of a distillation and has no teacher; leave out its share.")
        weights = {name: one.lerp(teacher[name], teacher_share) for name, one in weights.items()}
    return state, new_student(state.architecture["transformer"], weights)


def causal_recipe(config: CausalTrainingConfig) -> dict[str, Any]:
    """What a checkpoint says of its settings."""
    settings = {name: value for name, value in asdict(config).items() if name != "device"}
    return {**settings, "version": code_version()}

"""One arm of the comparison of teachers: a start, a distillation of a fixed number of updates, and what it shows."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vidaccel.errors import UserError
from vidaccel.training.checkpoint import STATE_FILE, TrainingState, load_checkpoint, save_checkpoint
from vidaccel.training.chunk_sampler import Sampler
from vidaccel.training.context_forcing_config import ContextForcingConfig
from vidaccel.training.context_forcing_networks import Networks, compile_blocks
from vidaccel.training.context_forcing_score import draw_samples
from vidaccel.training.context_forcing_starts import Beginning, Forcing, base_student, ignorant_starts
from vidaccel.training.context_forcing_step import ContextForcing
from vidaccel.training.device import seeded_generator
from vidaccel.training.return_visits import Cell, ReturnVisits
from vidaccel.training.self_rollout import PromptTable
from vidaccel.training.trip_bank import TripBank

_CURVE_TRIPS = 64
CELLS: tuple[Cell, ...] = ("memory", "blank", "window", "swap", "first visit")


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What all arms share: the student that is the teacher, the clips, the trips they are measured on, their steps."""

    beginning: Beginning
    bank: TripBank
    prompts: PromptTable
    visits: ReturnVisits
    sampler: Sampler
    device: torch.device
    compile: bool


def starts_of(ground: Ground, base: str, forcing: Forcing, *, kept: Path) -> dict[str, Any]:
    """The starts "short" and "ignore" of a seed; taken from the folder `kept` if they are there, and written there."""
    names = ("short", "ignore")
    folders = [kept / f"{name}-{forcing.seed}" for name in names]
    networks = [base_student(base, ground.beginning.architecture).to(ground.device).eval() for _ in names]
    if ground.compile:
        compile_blocks(*networks)
    if not all((folder / STATE_FILE).is_file() for folder in folders):
        made = ignorant_starts(networks[0], ground.bank, ground.prompts, forcing)
        for trained, folder in zip(made, folders, strict=True):
            save_checkpoint(folder, TrainingState(kind="causal"), trained.state_dict())
    for network, folder in zip(networks, folders, strict=True):
        network.load_state_dict(load_checkpoint(folder, kind="causal")[1])
    return dict(zip(names, networks, strict=True))


def measured(student: Any, ground: Ground, cells: Sequence[Cell] = CELLS) -> dict[str, dict[str, Any]]:
    """By cell, what every trip shows, as plain lists."""
    outcomes = {cell: ground.visits.outcome(student, cell, sampler=ground.sampler) for cell in cells}
    return {cell: {name: list(values) for name, values in asdict(found).items()} for cell, found in outcomes.items()}


def run_arm(
    ground: Ground, start: Any, config: ContextForcingConfig, *, curve_updates: int, picture: Path
) -> dict[str, Any]:
    """Distil a copy of `start` for `config.updates` updates of the generator and measure its averaged last weights.

    curve_updates: measure as_seen on some trips after every so many updates. picture: rows of first visit, return with
    memory, return without. Raises `UserError` if a weight is no longer finite.
    """
    began = time.monotonic()
    networks = Networks(generator=copy.deepcopy(start), teacher=ground.beginning.student, rule=config.update)
    if ground.compile:
        networks.compile()
    noise = seeded_generator(ground.device, config.seed)
    task = ContextForcing(networks, config, bank=ground.bank, prompts=ground.prompts, generator=noise)
    assert config.updates is not None
    curve: list[Mapping[str, float]] = []
    known = 0
    while task.num_updates < config.updates:
        scalars = task.iterate(task.num_updates / config.updates)
        if task.num_updates > known and task.num_updates % curve_updates == 0:
            known = task.num_updates
            curve.append(_point(task, ground, scalars))
    student = task.networks.generator.network
    with task.networks.average.applied():
        if not all(bool(torch.isfinite(parameter).all()) for parameter in student.parameters()):
            raise UserError(f"An arm diverged within {config.updates} updates: a weight is no longer finite.")
        seconds = time.monotonic() - began
        cells = measured(student, ground)
        draw_samples(student, ground.visits, picture, sampler=ground.sampler)
    return {
        "updates": task.num_updates,
        "iterations": task.num_iterations,
        "seconds": seconds,
        "curve": curve,
        "cells": cells,
    }


def _point(task: ContextForcing, ground: Ground, scalars: Mapping[str, Any]) -> dict[str, float]:
    student = task.networks.generator.network
    with task.networks.average.applied():
        outcome = ground.visits.outcome(student, "memory", sampler=ground.sampler, count=_CURVE_TRIPS)
    found = {name: float(value) for name, value in scalars.items()}
    return {"updates": task.num_updates, "as_seen": sum(outcome.as_seen) / len(outcome.as_seen), **found}

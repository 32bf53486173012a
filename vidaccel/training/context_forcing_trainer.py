"""Distillation of a causal student into a few steps, with its long memory: from the teacher-forced one to a checkpoint.

A run that is stopped and goes on gives the weights of one that was not: checkpoints hold all networks, optimizers,
random states and counters, and the clips are rebuilt from their seeds. On several cards every rank has clips and random
numbers of its own, the weights are shared out (`sharding`), and rank 0 writes.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_write
from vidaccel.machine.environment import code_version
from vidaccel.training.budget import Budget
from vidaccel.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from vidaccel.training.chunk_batch import FAST_FRAMES
from vidaccel.training.chunk_sampler import STUDENT_STEPS
from vidaccel.training.context_forcing_config import ContextForcingConfig
from vidaccel.training.context_forcing_networks import Networks, adapted_networks, compile_blocks
from vidaccel.training.context_forcing_score import Validation
from vidaccel.training.context_forcing_starts import (
    Beginning,
    Forcing,
    base_student,
    ignorant_starts,
    load_beginning,
)
from vidaccel.training.context_forcing_step import ContextForcing
from vidaccel.training.device import seeded_generator, training_device
from vidaccel.training.loop import METRICS_FILE, Record, append_record, carry_records, finished_round, start_round
from vidaccel.training.offline.fingerprint import check_consistency, weights_digest
from vidaccel.training.offline.loading import recorded_teacher
from vidaccel.training.offline.states import HistoryView
from vidaccel.training.ranks import (
    join_ranks,
    mean_of_ranks,
    num_ranks,
    own_rank,
    shared_by_ranks,
    signals_of_ranks,
    tensors_of_ranks,
    values_of_ranks,
)
from vidaccel.training.self_rollout import PromptTable
from vidaccel.training.trip_bank import TripBank, build_trip_bank, training_clips

FIRST_SEED = 950_000_000
_SEEDS_PER_SEED = 1_000_000
_VALIDATED: Mapping[str, Any] = {"validation_steps": STUDENT_STEPS, "validation_sampler": "stochastic"}
_ORIGIN = (
    "Taught by teacher forcing, then distilled into {steps} steps by `vidaccel train context-forcing`: stage {stage}, "
    "teacher and critic with the {view} view."
)


def train_context_forcing(
    config: ContextForcingConfig,
    output: Path,
    *,
    resume: Path | None = None,
    on_bank: Callable[[int, int], None] | None = None,
) -> Iterator[Record]:
    """Distil `config.init` into the checkpoint folder `output`; yields records with losses, recall and speed.

    The folder's averaged student is what `vidaccel train export-causal` takes, and pictures lie in its `samples`.
    resume: a checkpoint of this command to go on from. on_bank: called with finished and all clips of the bank.
    Raises `UserError` for what cannot be used, FloatingPointError if the training diverges.
    """
    began = time.monotonic()
    device = join_ranks(training_device(config.device))
    _check_ranks(config)
    saved, tensors = load_checkpoint(resume, kind="causal") if resume else (None, {})
    if resume is not None and not (saved and saved.progress):
        raise UserError(f"{resume} is no checkpoint of a distillation; give it as --init instead of --resume.")
    if saved is not None and saved.recipe.get("lora") != config.lora:
        raise UserError(
            f"{resume} was made with `lora` {saved.recipe.get('lora')} and goes on with the same; got {config.lora}."
        )
    beginning = load_beginning(config.init)
    _compare_teachers(config, beginning)
    state = start_round(saved, _fresh(config, beginning))
    for network in (beginning.student, beginning.donor.vae, beginning.donor.text_encoder):
        network.to(device)
    num_clips = own_progress(state.progress).get("num_clips")
    bank = training_bank(config, beginning, num_clips=num_clips, on_progress=on_bank)
    task = new_task(config, beginning, bank, device=device)
    if saved is not None:
        restore(task, state, tensors)
    run = _Round(task, Validation(beginning.donor, config), state=state, output=output, began=began)
    if own_rank() == 0:
        carry_records(resume, output)
        _forget_records_after(output / METRICS_FILE, state.step)
    yield from run.go()


def _check_ranks(config: ContextForcingConfig) -> None:
    """Raise `UserError` for what is for one card alone."""
    if num_ranks() > 1 and (config.start != "as-is" or config.compile):
        raise UserError("On several cards `start` must be as-is, and blocks are not compiled; leave both out.")


def training_bank(
    config: ContextForcingConfig,
    beginning: Beginning,
    *,
    num_clips: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TripBank:
    """The clips of a seed, on several ranks this one's part; `num_clips` rebuilds exactly as many as there were."""
    share = -(-config.bank_clips // num_ranks())
    first = FIRST_SEED + config.seed * _SEEDS_PER_SEED + own_rank() * share
    count = share if num_clips is None else num_clips
    return build_trip_bank(
        beginning.donor.vae,
        beginning.donor.tokenizer,
        trips=training_clips(range(first, first + count), num_chunks=config.num_chunks),
        seconds=config.bank_seconds if num_clips is None else None,
        on_progress=on_progress,
    )


def new_task(
    config: ContextForcingConfig, beginning: Beginning, bank: TripBank, *, device: torch.device
) -> ContextForcing:
    """Networks at their start: the generator as `config.start` says, teacher and critic as the beginning."""
    prompts = PromptTable(bank, beginning.donor.text_encoder, length=config.text)
    networks = _networks(config, beginning, bank, prompts)
    if config.compile:
        networks.compile()
    noise = seeded_generator(device, config.seed, *([own_rank()] if own_rank() else []))
    return ContextForcing(networks, config, bank=bank, prompts=prompts, generator=noise)


def _networks(config: ContextForcingConfig, beginning: Beginning, bank: TripBank, prompts: PromptTable) -> Networks:
    teacher, rule, checkpointing = beginning.student, config.update, config.checkpointing
    if config.lora is not None:
        return adapted_networks(teacher, rank=config.lora, seed=config.seed, rule=rule, checkpointing=checkpointing)
    if config.start == "as-is":
        generator = copy.deepcopy(teacher)
    else:
        device = bank.latents.device
        base = base_student(config.base, beginning.architecture).to(device)
        if config.compile:
            compile_blocks(base)
        steps = config.start_steps
        forcing = Forcing(
            seconds=config.start_seconds if steps is None else None,
            steps=steps,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        short, ignore = ignorant_starts(base, bank, prompts, forcing)
        generator = short if config.start == "short" else ignore
    return Networks(generator=generator, teacher=teacher, rule=rule, checkpointing=checkpointing)


def progress_of(task: ContextForcing) -> dict[str, Any]:
    """Counters and random states of a task, of every rank its own, as JSON holds them; called by all ranks."""
    own = {
        "num_iterations": task.num_iterations,
        "num_updates": task.num_updates,
        "num_errors": task.errors.count,
        "num_clips": len(task.bank.latents),
        "draw": list(task.draw.getstate()),
        "generator": bytes(task.generator.get_state().tolist()).hex(),
    }
    return {"ranks": values_of_ranks(own)} if num_ranks() > 1 else own


def own_progress(progress: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `progress_of` said of this rank. Raises `UserError` where there were more or fewer of them."""
    ranks = progress.get("ranks", [progress])
    if progress and len(ranks) != num_ranks():
        raise UserError(
            f"The checkpoint is of a training on {len(ranks)} cards, which goes on on as many, not on {num_ranks()}; "
            "give it as --init to begin from its student."
        )
    own: Mapping[str, Any] = ranks[own_rank()] if progress else {}
    return own


def saved_tensors(task: ContextForcing) -> dict[str, Tensor]:
    """All that a checkpoint of a task keeps, by name, whole; called by all ranks."""
    residuals = {_residuals_name(rank): one for rank, one in enumerate(tensors_of_ranks(task.errors.residuals))}
    return {**task.networks.tensors(), **residuals}


def restore(task: ContextForcing, state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Put a task of the same settings where `state` and `tensors` of a checkpoint were saved."""
    progress = own_progress(state.progress)
    task.networks.load(dict(tensors), num_updates=progress["num_updates"])
    task.errors.residuals.copy_(tensors[_residuals_name(own_rank())])
    task.errors.count = progress["num_errors"]
    task.num_iterations = progress["num_iterations"]
    version, numbers, following = progress["draw"]
    task.draw.setstate((version, tuple(numbers), following))
    task.generator.set_state(torch.tensor(list(bytes.fromhex(progress["generator"])), dtype=torch.uint8))


def _residuals_name(rank: int) -> str:
    return f"errors.residuals.{rank}" if rank else "errors.residuals"


def _compare_teachers(config: ContextForcingConfig, beginning: Beginning) -> None:
    """Warn where the beginning followed another teacher's trajectories than those of what is now asked for scores.

    It is asked at any noise level, so that the schedule of trajectories does not matter.
    """
    known = None if beginning.state is None else recorded_teacher(beginning.state)
    if known is None:
        return
    here = replace(
        known,
        weights=weights_digest(beginning.student),
        history=HistoryView(frames=FAST_FRAMES if config.matching.view == "short" else None).name,
        guidance_scale=1 + config.matching.guidance,
    )
    check_consistency(known, here, stage="dmd")


def _fresh(config: ContextForcingConfig, beginning: Beginning) -> TrainingState:
    """A further round of the training that made the beginning, as the card of an export tells it."""
    origin = _ORIGIN.format(steps=STUDENT_STEPS, stage=config.stage, view=config.matching.view)
    before = beginning.state or TrainingState(kind="causal")
    history = [*before.history, finished_round(before)] if beginning.state else []
    return TrainingState(
        kind="causal",
        round=len(history),
        seconds=before.seconds,
        architecture={"transformer": beginning.architecture},
        recipe={**config.recipe, **_VALIDATED, "init": beginning.init, "version": code_version()},
        history=history,
        origin=origin,
    )


def _forget_records_after(path: Path, step: int) -> None:
    """What a killed run recorded after its last checkpoint happens again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line and json.loads(line)["step"] <= step]
    with atomic_write(path) as unfinished:
        unfinished.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


class _Round:
    """The running values of a distillation: when to record, to validate and to save."""

    def __init__(
        self, task: ContextForcing, validation: Validation, *, state: TrainingState, output: Path, began: float
    ) -> None:
        self.task, self.validation, self.state, self.output = task, validation, state, output
        self.config = task.config
        self._began, self._first_seconds = began, state.seconds
        self._first_updates = task.num_updates - state.round_step
        self._next_validation = self._slot(state.fraction) + 1
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last_record = self._last_save = time.monotonic()
        output.mkdir(parents=True, exist_ok=True)

    def go(self) -> Iterator[Record]:
        """Iterate until the budget is used."""
        config = self.config
        spent = time.monotonic() - self._began
        reserve = self.validation.seconds
        left = None if config.seconds is None else max(config.seconds - spent - reserve, 0.05 * config.seconds)
        budget = Budget(seconds=left, steps=config.updates, start=self.state.fraction)
        fraction = self.state.fraction
        with signals_of_ranks() as signals:
            try:
                while (fraction := self._shared(budget.fraction(self._round_updates))) < 1:
                    self._iterate(fraction)
                    if self._counts["critic_loss"] >= config.log_steps:
                        yield self._record(fraction)
                    if self._slot(fraction) >= self._next_validation:
                        yield self._validate(fraction)
                    elif self._shared(time.monotonic() - self._last_save) > config.save_seconds:
                        self._save(fraction)
                    if (number := self._shared(signals[0] if signals else 0)) > 0:
                        raise SystemExit(128 + int(number))
            except (KeyboardInterrupt, SystemExit):  # by Ctrl-C or SIGTERM, on several ranks at the same place
                self._save(fraction)
                raise
        yield self._validate(1.0)

    def _shared(self, value: float) -> float:
        """What rank 0 has of it, its clock or its signal: all ranks do the same."""
        return shared_by_ranks(float(value), self.task.device)

    @property
    def _round_updates(self) -> int:
        return self.task.num_updates - self._first_updates

    def _iterate(self, fraction: float) -> None:
        for name, value in self.task.iterate(fraction).items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self.state = replace(self.state, step=self.state.step + 1, round_step=self._round_updates)

    def _record(self, fraction: float) -> Record:
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        now = time.monotonic()
        speed = self._counts["critic_loss"] / max(now - self._last_record, 1e-9)
        self._sums, self._counts, self._last_record = {}, {}, now
        return self._write({**mean_of_ranks(means, self.task.device), "iterations_per_second": speed}, fraction)

    def _slot(self, fraction: float) -> int:
        return int(fraction * self.config.validations)

    def _validate(self, fraction: float) -> Record:
        """Results of the averaged generator, which is saved before and after it."""
        self._next_validation = self._slot(fraction) + 1
        self._save(fraction)
        began = time.monotonic()
        generator = self.task.networks.generator.network
        with self.task.networks.average.applied():
            results = self.validation.results(generator, self.output / "samples" / f"{self.state.step:06d}.png")
        self.state = replace(self.state, results=results)
        self._save(fraction)
        self._last_record += time.monotonic() - began
        return self._write(results, fraction)

    def _save(self, fraction: float) -> None:
        self.state = replace(
            self.state, fraction=min(fraction, 1.0), seconds=self._seconds(), progress=progress_of(self.task)
        )
        tensors = saved_tensors(self.task)
        if own_rank() == 0:
            save_checkpoint(self.output, self.state, tensors)
        self._last_save = time.monotonic()

    def _seconds(self) -> float:
        return round(self._first_seconds + time.monotonic() - self._began, 2)

    def _write(self, values: Mapping[str, float], fraction: float) -> Record:
        record: Record = {
            "step": self.state.step,
            "round": self.state.round,
            "updates": self.task.num_updates,
            "seconds": self._seconds(),
            "fraction": round(min(fraction, 1.0), 5),
            **values,
        }
        return append_record(self.output, record) if own_rank() == 0 else record

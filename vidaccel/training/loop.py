"""The loop that both trainings share: schedule, clipping, weight average, records, validation, checkpoints.

It never waits for the device except to write a record, to validate and to save.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from vidaccel.errors import UserError, check_amount
from vidaccel.training.averaging import WeightAverage
from vidaccel.training.budget import Budget, check_length
from vidaccel.training.checkpoint import TrainingState, save_checkpoint

METRICS_FILE = "metrics.jsonl"
_SAVE_SECONDS = 60.0  # a training that is killed loses no more
Record = dict[str, float]
Decay = Literal["cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a round is and how fast it learns.

    seconds, steps: length of a round, exactly one of them; `seconds` counts everything from the start of the call,
        preparation and validation included.
    learning_rate: the peak; after `flat_share` of the round it goes down to `final_share` of it, as `decay` says.
    warmup_steps: also after a resumption. ema_decay: of the weight average.
    log_steps: steps per record. num_validations: per round, evenly spread, the last one at the end.
    """

    seconds: float | None = None
    steps: int | None = None
    learning_rate: float = 1e-3
    decay: Decay = "cosine"
    flat_share: float = 0.0
    final_share: float = 0.01
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    log_steps: int = 50
    num_validations: int = 8

    def __post_init__(self) -> None:
        check_length("the training", seconds=self.seconds, steps=self.steps)
        check_amount("learning_rate", self.learning_rate)
        if self.decay not in get_args(Decay):
            raise UserError(f"`decay` must be one of {', '.join(get_args(Decay))}, got {self.decay!r}.")
        if not 0 <= self.flat_share < 1:
            raise UserError(f"`flat_share` must be from 0 to below 1, got {self.flat_share}.")

    def learning_rate_at(self, fraction: float, *, warm_step: int) -> float:
        """The learning rate `warm_step` steps after the start or resumption, `fraction` into the round."""
        done = min(max((fraction - self.flat_share) / (1 - self.flat_share), 0.0), 1.0)
        warmup = min(1.0, (warm_step + 1) / max(self.warmup_steps, 1))
        return self.learning_rate * warmup * self._share_of_peak(done)

    def _share_of_peak(self, done: float) -> float:
        """What is left of the peak when the share `done` of the decay is over."""
        if self.decay == "linear":
            return 1 - (1 - self.final_share) * done
        return max(self.final_share, 0.5 * (1 + math.cos(math.pi * done)))


class Task(Protocol):
    """What is trained.

    num_frames_per_step is a property: video frames of the latest batch, for the speed that records show.
    """

    parameters: list[nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    num_frames_per_step: int

    def loss(self, fraction: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a new batch, and scalars to record."""
        ...

    def validate(self) -> dict[str, float]:
        """Results with the weights as they are."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights to save."""
        ...


def start_round(state: TrainingState | None, fresh: TrainingState) -> TrainingState:
    """`fresh` for a new training; an interrupted round goes on, a finished one is followed by another, which has no
    results yet."""
    if state is None:
        return fresh
    if state.fraction < 1:
        return replace(state, recipe=fresh.recipe)
    return replace(
        state,
        round=state.round + 1,
        round_step=0,
        fraction=0.0,
        recipe=fresh.recipe,
        results={},
        history=[*state.history, finished_round(state)],
    )


def finished_round(state: TrainingState) -> dict[str, Any]:
    """What `history` keeps of the current round."""
    seconds = state.seconds - sum(past["seconds"] for past in state.history)
    return {"steps": state.round_step, "seconds": round(seconds, 2), "recipe": state.recipe}


def carry_records(resume: Path | None, output: Path) -> None:
    """A training that goes on in another folder takes its records along."""
    if resume is not None and (resume / METRICS_FILE).is_file() and not (output / METRICS_FILE).exists():
        output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(resume / METRICS_FILE, output / METRICS_FILE)


def append_record(output: Path, record: Record) -> Record:
    """Add a record to those of the training in `output`; returns it."""
    with (output / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def train(
    task: Task, schedule: Schedule, *, state: TrainingState, output: Path, began: float, reserve: float
) -> Iterator[Record]:
    """Train until the round's budget is used; yields what it also appends to `metrics.jsonl`.

    began: `time.monotonic()` at the start of the call; records count seconds from there.
    reserve: seconds to leave for the last validation.
    Raises FloatingPointError when the weights are no longer finite; the checkpoint before that is kept.
    """
    spent = time.monotonic() - began
    left = None if schedule.seconds is None else max(schedule.seconds - spent - reserve, 0.05 * schedule.seconds)
    budget = Budget(seconds=left, steps=schedule.steps, start=state.fraction)
    run = _TrainingRound(task, schedule, state=state, output=output, began=began)
    fraction = state.fraction
    try:
        while (fraction := budget.fraction(run.state.round_step)) < 1:
            run.step(fraction)
            if run.should_log:
                yield run.record(fraction)
            if run.should_validate(fraction):
                yield run.validate(fraction)
            elif run.should_save:
                run.save(fraction)
    except (KeyboardInterrupt, SystemExit):  # by Ctrl-C or SIGTERM
        run.save(fraction)
        raise
    yield run.validate(1.0)


class _TrainingRound:
    """The running values of `train`."""

    def __init__(self, task: Task, schedule: Schedule, *, state: TrainingState, output: Path, began: float) -> None:
        self.task, self.schedule, self.state, self.output = task, schedule, state, output
        self.average = WeightAverage(task.parameters, decay=schedule.ema_decay)
        self._began, self._first_seconds = began, state.seconds
        self._first_step = state.step
        self._next_validation = self._slot(state.fraction) + 1
        self._sums: dict[str, Tensor] = {}
        self._count = self._num_frames = 0
        self._last_record = self._last_save = time.monotonic()
        output.mkdir(parents=True, exist_ok=True)

    def step(self, fraction: float) -> None:
        rate = self.schedule.learning_rate_at(fraction, warm_step=self.state.step - self._first_step)
        loss, scalars = self.task.loss(fraction)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.task.parameters, self.schedule.max_grad_norm)
        for optimizer in self.task.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update()
        self._add({"loss": loss, "grad_norm": norm, **scalars})
        self.state = replace(self.state, step=self.state.step + 1, round_step=self.state.round_step + 1)

    def _add(self, scalars: Mapping[str, Tensor]) -> None:
        for name, value in scalars.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
        self._count += 1
        self._num_frames += self.task.num_frames_per_step

    @property
    def should_log(self) -> bool:
        return self._count >= self.schedule.log_steps

    def record(self, fraction: float) -> Record:
        means = (torch.stack([value.float() for value in self._sums.values()]) / self._count).tolist()
        now = time.monotonic()
        num_frames, seconds = self._num_frames, max(now - self._last_record, 1e-9)
        record = dict(zip(self._sums, means, strict=True))
        record["steps_per_second"] = self._count / seconds
        record["frames_per_second"] = num_frames / seconds
        self._sums, self._count, self._num_frames, self._last_record = {}, 0, 0, now
        return self._write(record, fraction)

    def _seconds(self) -> float:
        return round(self._first_seconds + time.monotonic() - self._began, 2)

    def _slot(self, fraction: float) -> int:
        return int(fraction * self.schedule.num_validations)

    def should_validate(self, fraction: float) -> bool:
        return self._slot(fraction) >= self._next_validation

    @property
    def should_save(self) -> bool:
        return time.monotonic() - self._last_save > _SAVE_SECONDS

    def validate(self, fraction: float) -> Record:
        """Results of the averaged weights, which are saved before and after it."""
        self._next_validation = self._slot(fraction) + 1
        self.save(fraction)
        began = time.monotonic()
        with self.average.applied():
            results = self.task.validate()
        self.state = replace(self.state, results=results)
        self.save(fraction)
        self._last_record += time.monotonic() - began
        return self._write(results, fraction)

    def save(self, fraction: float) -> None:
        self.state = replace(self.state, fraction=min(fraction, 1.0), seconds=self._seconds())
        with self.average.applied():
            save_checkpoint(self.output, self.state, self.task.tensors())
        self._last_save = time.monotonic()

    def _write(self, values: Mapping[str, float], fraction: float) -> Record:
        record: Record = {
            "step": self.state.step,
            "round": self.state.round,
            "seconds": self._seconds(),
            "fraction": round(min(fraction, 1.0), 5),
            **values,
        }
        return append_record(self.output, record)

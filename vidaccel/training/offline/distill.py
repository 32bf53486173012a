"""Distillation onto a teacher's ends: the loss, where its batches come from, and the task that the shared loop trains.

Offline, batches are drawn from a store that never changes; online, the student is rolled out and the teacher asked anew
every so many steps. The loss is the same function of the same records.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from vidaccel.errors import UserError, check_count
from vidaccel.memory.prefixes import with_prefix
from vidaccel.training.architecture import TEMPORAL_STRIDE, Transformer
from vidaccel.training.chunk_batch import context_of, velocity_in
from vidaccel.training.dmd import clean_estimate
from vidaccel.training.loop import Schedule
from vidaccel.training.offline.collect import ENDS, CollectConfig, Targets, collect_shard
from vidaccel.training.offline.states import Embed, States
from vidaccel.training.offline.store import Cost, TargetStore
from vidaccel.training.offline.teacher import Teacher
from vidaccel.training.transformer_trainer import new_optimizers
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank

_BATCH = 64  # records of a validation at a time


@dataclass(frozen=True, kw_only=True)
class OfflineDistill:
    """How a student is trained onto targets.

    batch_size: states a step. optimizer: for the matrices of the blocks. compile: the blocks, which pays in long runs.
    Raises UserError for an empty batch.
    """

    schedule: Schedule
    batch_size: int = 64
    optimizer: Literal["muon", "adamw"] = "muon"
    compile: bool = False

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, minimum=1)


def end_errors(student: Transformer, states: States, ends: Tensor, embed: Embed) -> Tensor:
    """Mean squared distance of the student's one-step ends from those of the teacher; (n,) float32."""
    context = context_of(student, states.surroundings(embed(states.tokens)))
    noisy = states.noisy.float()
    found = clean_estimate(noisy, velocity_in(student, context, noisy, states.sigmas), states.sigmas)
    return (found - ends.float()).square().flatten(1).mean(1)


@torch.no_grad()
def end_distance(student: Transformer, states: States, ends: Tensor, embed: Embed) -> float:
    """Root mean square of `end_errors` over all states, in units of the latents."""
    parts = [slice(first, first + _BATCH) for first in range(0, len(states), _BATCH)]
    errors = [end_errors(student, states.rows(part), ends[part], embed) for part in parts]
    return float(torch.cat(errors).mean().sqrt())


class TargetSource(Protocol):
    """Where a training takes its batches from."""

    @property
    def cost(self) -> Cost:
        """What its targets took so far."""
        ...

    def draw(self, count: int) -> tuple[States, Tensor]:
        """States and the teacher's ends for one step."""
        ...


class StoredTargets:
    """Batches of a store, in an order drawn anew for each pass over it; `held_out` of its last records are left out.

    A store of at most `cached_bytes` lies on the device; of a larger one each batch is read from disk.
    Raises UserError where nothing is left to draw.
    """

    def __init__(
        self,
        store: TargetStore,
        device: torch.device,
        *,
        seed: object,
        held_out: int = 0,
        cached_bytes: int = 4 * 10**9,
    ) -> None:
        self._store, self._device = store, device
        self._count = len(store) - held_out
        if self._count < 1:
            raise UserError(f"{store.folder} has {len(store)} states and {held_out} are held out; collect more.")
        self._deck = _Deck(f"vidaccel stored targets {seed}")
        self._records = None
        if store.num_bytes <= cached_bytes:
            self._records = {name: tensor.to(device) for name, tensor in store.read().items()}

    @property
    def cost(self) -> Cost:
        """What the collection took."""
        return self._store.cost

    def draw(self, count: int) -> tuple[States, Tensor]:
        """The next records of the order."""
        return self._rows(self._deck.draw(count, self._count))

    @property
    def num_states(self) -> int:
        """All records, those that are held out too."""
        return len(self._store)

    def held_out(self) -> tuple[States, Tensor]:
        """The records that are never drawn."""
        return self._rows(list(range(self._count, len(self._store))))

    def _rows(self, rows: list[int]) -> tuple[States, Tensor]:
        if self._records is None:
            records = self._store.read(rows)
        else:
            places = torch.tensor(rows, device=self._device)
            records = {name: tensor[places] for name, tensor in self._records.items()}
        return States.of(records, self._device), records[ENDS].to(self._device)


class FreshTargets:
    """Online: every `refresh_steps` batches a new shard of states, visited by the student as it is then."""

    def __init__(
        self,
        student: Transformer,
        teacher: Teacher,
        bank: TripBank,
        *,
        config: CollectConfig,
        embed: Embed,
        refresh_steps: int,
    ) -> None:
        check_count("refresh_steps", refresh_steps, minimum=1)
        self.cost = Cost()
        self._student, self._teacher, self._bank = student, teacher, bank
        self._config, self._embed, self._refresh_steps = config, embed, refresh_steps
        self._deck = _Deck(f"vidaccel fresh targets {config.seed}")
        self._num_batches = 0
        self._targets: Targets | None = None

    def draw(self, count: int) -> tuple[States, Tensor]:
        """Records of the latest shard."""
        number, since = divmod(self._num_batches, self._refresh_steps)
        if since == 0 or self._targets is None:
            self._targets, cost = self._collected(number)
            self.cost = self.cost + cost
            self._deck.shuffle()
        self._num_batches += 1
        rows = torch.tensor(self._deck.draw(count, len(self._targets.states)), device=self._targets.ends.device)
        return self._targets.states.rows(rows), self._targets.ends[rows]

    def _collected(self, number: int) -> tuple[Targets, Cost]:
        began = time.monotonic()
        config = self._config.of_shards(number + 1)
        targets, cost = collect_shard(
            self._student, self._teacher, self._bank, config=config, number=number, embed=self._embed
        )
        return targets, cost + Cost(seconds=time.monotonic() - began)


class _Deck:
    """Numbers below a count in a random order, and in another one when all were drawn."""

    def __init__(self, seed: str) -> None:
        self._draw = random.Random(seed)
        self._left: list[int] = []

    def shuffle(self) -> None:
        self._left = []

    def draw(self, num: int, count: int) -> list[int]:
        while len(self._left) < num:
            self._left += self._draw.sample(range(count), count)
        drawn, self._left = self._left[:num], self._left[num:]
        return drawn


class OfflineTask:
    """Student, batches and loss, as `loop.train` wants them.

    held_out: records for validation, and None for none. judge: gives further results of the student as it is then.
    """

    def __init__(
        self,
        student: Transformer,
        source: TargetSource,
        embed: Embed,
        *,
        config: "OfflineDistill",
        held_out: tuple[States, Tensor] | None = None,
        judge: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.student, self.source, self.embed, self.config = student, source, embed, config
        self.parameters = list(student.parameters())
        self.optimizers = new_optimizers(student, self.parameters, config.optimizer, rate=config.schedule.learning_rate)
        if config.compile:
            student.compile_repeated_blocks(dynamic=False)
        self.num_frames_per_step = config.batch_size * CHUNK_FRAMES * TEMPORAL_STRIDE
        self._held_out, self._judge = held_out, judge

    def loss(self, fraction: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared distance of ends in a batch; the root of it is recorded too, in units of the latents."""
        loss = end_errors(self.student, *self.source.draw(self.config.batch_size), self.embed).mean()
        return loss, {"end_distance": loss.detach().sqrt()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The distance on records that are never trained on, and what the judge finds."""
        results = {}
        with torch.compiler.set_stance("force_eager"):
            if self._held_out is not None:
                results["held_out_end_distance"] = end_distance(self.student, *self._held_out, self.embed)
            return results | (self._judge() if self._judge is not None else {})

    def tensors(self) -> dict[str, Tensor]:
        """The weights of the student."""
        return with_prefix("transformer", self.student.state_dict())

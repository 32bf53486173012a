"""What a distillation begins with: the teacher-forced student, and generators that cannot recall yet.

"short" and "ignore" are there to measure what a teacher teaches. "short" is teacher forcing from `base` with the last
chunk remembered only, so that filled slots are new to it; "ignore" goes on from it with sink and slow memory of other
clips: filled slots are ordinary and nothing was ever gained by reading them.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.training.architecture import Transformer
from vidaccel.training.averaging import WeightAverage
from vidaccel.training.budget import Budget, check_length
from vidaccel.training.causal_student import Donor, load_donor, new_student, student_architecture, student_tensors
from vidaccel.training.causal_trainer import trained_student
from vidaccel.training.checkpoint import STATE_FILE, TrainingState
from vidaccel.training.chunk_batch import ChunkBatch, velocity_of
from vidaccel.training.context_forcing_views import foreign_memory, short_view
from vidaccel.training.device import seeded_generator
from vidaccel.training.dmd import flow_loss
from vidaccel.training.flow import draw_high_sigmas, draw_sigmas, noisy_latents
from vidaccel.training.loop import Schedule
from vidaccel.training.self_rollout import Layouts, PromptTable, StartShares, draw_starts, layout_rule, new_video
from vidaccel.training.transformer_trainer import new_optimizers
from vidaccel.training.trip_bank import TripBank

_HIGH_SHARE = 0.25  # of samples at high noise
_CONTEXT_NOISE = 0.15
_SEEDS_APART = 1000  # so that the second round of a seed is not the first one of another
_CONTEXT_NOISE_SHARE = 0.7
ForcingPart = Literal["loss", "backward", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The teacher-forced student, what it shares with the model it came from, and its constructor's arguments.

    init: the donor's name or folder. state: of its training, where that is known.
    """

    student: Transformer
    donor: Donor
    architecture: dict[str, Any]
    init: str
    state: TrainingState | None = None


def load_beginning(init: str, *, option: str = "init") -> Beginning:
    """A checkpoint of `vidaccel train causal`, or an exported student by its name or folder, in float32.

    Every layer reads what it remembers itself in a distillation, so that what comes of it was not trained for layers
    that share a memory. Raises `UserError` as `load_forced` does, and for a student whose layers always share one.
    """
    found = load_forced(init, option=option)
    if (every := found.architecture.get("depth_every", 1)) > 1:
        raise UserError(
            f"{init} was trained with the memory of one layer in {every}, and in a distillation every layer reads its "
            "own; make one with `vidaccel train causal` without --depth-every."
        )
    architecture, state = {**found.architecture, "kv_routing": 0.0}, found.state
    if state is not None:
        state = replace(state, architecture={**state.architecture, "transformer": architecture})
    return replace(found, architecture=architecture, state=state)


def load_forced(init: str, *, option: str = "init") -> Beginning:
    """A student as `load_beginning` takes it, however its layers were trained to share a memory.

    option: what it was given as. Raises `UserError` for anything else, and for a student that is not told of its camera
    or whose memory depends on history: distillation encodes what is remembered frame by frame.
    """
    if (Path(init) / STATE_FILE).is_file():
        state, student = trained_student(Path(init))
        source = state.recipe["init"]
        found = Beginning(
            student=student,
            donor=load_donor(source),
            architecture=dict(state.architecture["transformer"]),
            init=source,
            state=state,
        )
    else:
        donor = load_donor(init, option=option)
        config = {name: value for name, value in donor.transformer.config.items() if not name.startswith("_")}
        architecture = {**config, "patch_size": list(config["patch_size"])}
        found = Beginning(student=donor.transformer, donor=donor, architecture=architecture, init=init)
    if not found.architecture.get("camera_dim") or found.architecture.get("clean_pass") != "frame":
        raise UserError(
            f"`{option}` must be a student that takes a camera and remembers frames on their own, and {init} is none; "
            "make one with `vidaccel train causal`."
        )
    return found


def base_student(base: str, architecture: dict[str, Any]) -> Transformer:
    """A student of this architecture that begins as the layers of `base` and has learnt nothing else, in float32.

    Raises `UserError` for a model that does not fit.
    """
    transformer = load_donor(base, option="base").transformer
    wanted = architecture["num_layers"]
    spread = transformer.config.num_layers
    if wanted > spread:
        raise UserError(f"`base` must have at least {wanted} layers, {base} has {spread}.")
    layers = [round(place * (spread - 1) / max(wanted - 1, 1)) for place in range(wanted)]
    sizes = student_architecture(transformer, num_layers=wanted, camera_dim=architecture["camera_dim"])
    return new_student(sizes, student_tensors(transformer, layers=layers))


@dataclass(frozen=True, kw_only=True)
class Forcing:
    """How long a round of teacher forcing is, and what its batches are; `seconds` or `steps`.

    layouts, shares: of what is remembered and of what the chunks show, as in `RolloutRule`.
    """

    seconds: float | None = None
    steps: int | None = None
    batch_size: int = 64
    seed: int = 0
    layouts: Layouts = "drawn"
    shares: StartShares = field(default_factory=StartShares)

    def __post_init__(self) -> None:
        check_length("a start", seconds=self.seconds, steps=self.steps)

    @property
    def schedule(self) -> Schedule:
        """How fast it learns."""
        return Schedule(
            seconds=self.seconds,
            steps=self.steps,
            learning_rate=1e-3,
            decay="linear",
            flat_share=0.4,
            final_share=0.02,
            warmup_steps=100,
            ema_decay=0.999,
        )


def ignorant_starts(
    student: Transformer, bank: TripBank, prompts: PromptTable, forcing: Forcing
) -> tuple[Transformer, Transformer]:
    """The starts "short" and "ignore" of a seed; `student` is trained into the second of them."""
    short = copy.deepcopy(teacher_forced(student, bank, prompts, forcing, seen=short_view))
    later = replace(forcing, seed=forcing.seed + _SEEDS_APART)
    return short, teacher_forced(student, bank, prompts, later, seen=foreign_memory)


def teacher_forced(
    student: Transformer,
    bank: TripBank,
    prompts: PromptTable,
    forcing: Forcing,
    *,
    seen: Callable[[ChunkBatch], ChunkBatch],
) -> Transformer:
    """Train `student` by flow matching on real chunks of which it sees `seen`; returns the average of its weights.

    Muon and AdamW at a rate that goes down over the last part; noise on what is remembered in most steps.
    """
    device = bank.latents.device
    work = TeacherForcing(student, bank, prompts, forcing, seen=seen)
    budget, step = Budget(seconds=forcing.seconds, steps=forcing.steps), 0
    while (fraction := budget.fraction(step)) < 1:
        work.step(rate=work.schedule.learning_rate_at(fraction, warm_step=step))
        step += 1
        if step == 1 and forcing.seconds is not None:  # what is compiled in the first step does not count
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            budget = Budget(seconds=forcing.seconds, steps=None)
    average = work.average
    with torch.no_grad():
        for parameter, value in zip(average.parameters, average.values, strict=True):
            parameter.copy_(value)
    return student


class TeacherForcing:
    """Flow matching of a student on real chunks, of which it sees `seen`; `average` is what it came to.

    on_part: called with the name of every part of a step when it ends; nothing is waited for.
    """

    def __init__(
        self,
        student: Transformer,
        bank: TripBank,
        prompts: PromptTable,
        forcing: Forcing,
        *,
        seen: Callable[[ChunkBatch], ChunkBatch] = lambda batch: batch,
        on_part: Callable[[ForcingPart], None] = lambda part: None,
    ) -> None:
        self.student, self.bank, self.prompts, self.forcing = student, bank, prompts, forcing
        self._seen, self._ended = seen, on_part
        self.schedule = forcing.schedule
        self.average = WeightAverage(list(student.parameters()), decay=self.schedule.ema_decay)
        self._optimizers = new_optimizers(student, self.average.parameters, "muon", rate=self.schedule.learning_rate)
        self._draw = random.Random(f"teacher forcing {forcing.seed}")
        self._generator = seeded_generator(bank.latents.device, forcing.seed)

    def step(self, *, rate: float) -> None:
        """One batch at the learning rate `rate`."""
        loss = _forcing_loss(self.student, self._seen(self._real_batch()), self._draw, self._generator)
        self._ended("loss")
        loss.backward()
        self._ended("backward")
        torch.nn.utils.clip_grad_norm_(self.average.parameters, self.schedule.max_grad_norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update()
        self._ended("optimizer")

    def _real_batch(self) -> ChunkBatch:
        forcing = self.forcing
        starts = draw_starts(self.bank, self._draw, count=forcing.batch_size, num_chunks=1, shares=forcing.shares)
        layouts = layout_rule(self.bank, forcing.layouts, self._draw)
        return new_video(self.bank, self.prompts, starts, rule=layouts).batch(0)


def _forcing_loss(student: Transformer, batch: ChunkBatch, draw: random.Random, generator: torch.Generator) -> Tensor:
    size, device = len(batch.chunk), generator.device
    if draw.random() < _CONTEXT_NOISE_SHARE:
        batch = batch.disturbed(_CONTEXT_NOISE, generator)
    high = draw_high_sigmas(size, generator)
    is_high = torch.rand(size, device=device, generator=generator) < _HIGH_SHARE
    sigmas = torch.where(is_high, high, draw_sigmas(size, generator))
    noise = torch.randn(batch.chunk.shape, device=device, generator=generator)
    velocity = velocity_of(student, batch, noisy_latents(batch.chunk, noise, sigmas), sigmas)
    return flow_loss(velocity, noise=noise, clean=batch.chunk)

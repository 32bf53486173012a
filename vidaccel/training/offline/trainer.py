"""`vidaccel train offline`: collect a teacher's targets, then train a student on them; or anew every so many steps."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vidaccel.errors import UserError, check_amount, check_count
from vidaccel.machine.environment import code_version
from vidaccel.memory.prefixes import without_prefix
from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_score import recall_score
from vidaccel.training.checkpoint import TrainingState, load_checkpoint
from vidaccel.training.chunk_sampler import shifted_sampler
from vidaccel.training.context_forcing_starts import Beginning, load_beginning
from vidaccel.training.device import training_device
from vidaccel.training.loop import Record, carry_records, start_round, train
from vidaccel.training.offline.collect import CollectConfig, collect
from vidaccel.training.offline.distill import FreshTargets, OfflineDistill, OfflineTask, StoredTargets, TargetSource
from vidaccel.training.offline.fingerprint import check_consistency
from vidaccel.training.offline.loading import TEACHER, embedding, recorded_teacher
from vidaccel.training.offline.states import Embed, HistoryView, States
from vidaccel.training.offline.teacher import Teacher
from vidaccel.training.ranks import check_alone
from vidaccel.training.return_visits import ReturnVisits
from vidaccel.training.trip_bank import TripBank, build_trip_bank, training_clips

TARGETS_FOLDER = "targets"
_FIRST_SEED = 1_200_000_000
_VISITS_SEED = 78_000_000
_SEEDS_PER_RUN = 1_000_000
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class OfflineTrainingConfig:
    """Settings of `train_offline`.

    init: what the student begins as: a checkpoint of `vidaccel train`, or a model with a causal student.
    collect: which states; its kind is the stage. distill: how the student is trained on them.
    teacher: as `init`; None: `init` itself. A stage that follows another must have that stage's teacher.
    teacher_steps, guidance_scale: of the teacher. history: what it is shown, `HistoryView.parse`.
    refresh_steps: training steps between two collections, with the student as it is then; None: one collection.
    held_out: states of the store that are not trained on. bank_clips, num_chunks: clips to begin from, their length.
    validation_trips: trips on which recall is measured.
    Raises UserError for values that make no sense.
    """

    init: str
    collect: CollectConfig
    distill: OfflineDistill
    teacher: str | None = None
    teacher_steps: int = 16
    guidance_scale: float = 1.0
    history: str = "own"
    refresh_steps: int | None = None
    held_out: int = 128
    bank_clips: int = 2000
    num_chunks: int = 15
    validation_trips: int = 64
    device: str = "auto"

    def __post_init__(self) -> None:
        check_amount("guidance_scale", self.guidance_scale, is_zero_allowed=True)
        check_count("bank_clips", self.bank_clips, minimum=1)
        check_count("held_out", self.held_out, minimum=0)
        check_count("validation_trips", self.validation_trips, minimum=0)
        check_count("refresh_steps", self.refresh_steps, minimum=1, optional=True)
        check_count("num_chunks", self.num_chunks, minimum=self.collect.num_own + 1)
        if self.refresh_steps and self.collect.kind == "ode":
            raise UserError("Ways from noise are the teacher's own and never grow old: leave out `refresh_steps`.")
        HistoryView.parse(self.history)

    def rehearsal(self) -> "OfflineTrainingConfig":
        """The same in seconds on a CPU: tiny batches, useless weights."""
        return replace(
            self,
            collect=replace(self.collect, num_states=8, rollouts_per_shard=2),
            distill=replace(self.distill, schedule=replace(self.distill.schedule, log_steps=1), batch_size=2),
            teacher_steps=self.collect.student_steps,
            held_out=2,
            bank_clips=2,
            num_chunks=4,
            validation_trips=0,
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings as checkpoints keep them, without the machine's."""
        left_out = ("device", "teacher", "collect", "distill")
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {**values, **asdict(self.collect), **asdict(self.distill)}


def train_offline(
    config: OfflineTrainingConfig,
    output: Path,
    *,
    resume: Path | None = None,
    on_bank: Progress | None = None,
    on_targets: Progress | None = None,
) -> Iterator[Record]:
    """Collect into `output`/targets and train the student into the checkpoint folder `output`; yields records,
    the first of what the collection took.

    resume: a checkpoint to go on from. on_bank, on_targets: called with finished and all clips, and states.
    Raises UserError for networks that cannot be used, a teacher that is not that of the stage before, and states that
    do not fit; FloatingPointError if training diverges.
    """
    began = time.monotonic()
    check_alone("Offline distillation")
    device = training_device(config.device)
    beginning = load_beginning(config.init)
    teacher = _teacher(config, beginning)
    saved, tensors = load_checkpoint(resume, kind="causal") if resume else (beginning.state, {})
    if saved is not None and (known := recorded_teacher(saved)) is not None:
        check_consistency(known, teacher.fingerprint, stage=config.collect.kind)
    if saved is not None and not resume:
        saved = replace(saved, fraction=1.0)  # a stage of its own, however far the one before came
    state = start_round(saved, _fresh_state(config, beginning, teacher))
    student = copy.deepcopy(beginning.student)
    if tensors:
        student.load_state_dict(without_prefix("transformer", tensors))
    for part in (beginning.donor.vae, beginning.donor.text_encoder, beginning.student, teacher.network, student):
        part.to(device)
    run = _Distillation(
        config=config, beginning=beginning, teacher=teacher, state=state, student=student.requires_grad_(True)
    )
    source, held_out = run.targets(output / TARGETS_FOLDER, on_bank=on_bank, on_targets=on_targets)
    if isinstance(source, StoredTargets):
        yield {"states_collected": float(source.num_states), **asdict(source.cost)}
    carry_records(resume, output)
    judge = run.judge if config.validation_trips else None
    task = OfflineTask(student, source, run.embed, config=config.distill, held_out=held_out, judge=judge)
    reserve = 5 + 0.1 * config.validation_trips
    yield from train(task, config.distill.schedule, state=state, output=output, began=began, reserve=reserve)


def _teacher(config: OfflineTrainingConfig, beginning: Beginning) -> Teacher:
    """The network that is asked; without one of its own the student as it begins."""
    own = config.teacher is None
    network = copy.deepcopy(beginning.student) if own else load_beginning(str(config.teacher), option="teacher").student
    return Teacher(
        network=network.eval().requires_grad_(False),
        history=HistoryView.parse(config.history),
        num_steps=config.teacher_steps,
        guidance_scale=config.guidance_scale,
    )


def _fresh_state(config: OfflineTrainingConfig, beginning: Beginning, teacher: Teacher) -> TrainingState:
    """A round of this training."""
    validated = {"validation_steps": config.collect.student_steps, "validation_sampler": "stochastic"}
    told = {**validated, "init": beginning.init, "version": code_version(), TEACHER: teacher.fingerprint.to_dict()}
    recipe = {**config.recipe, **told}
    return TrainingState(kind="causal", architecture={"transformer": beginning.architecture}, recipe=recipe)


@dataclass(frozen=True, kw_only=True)
class _Distillation:
    """What a training works with. The states of a store are those of the student as `init` has it."""

    config: OfflineTrainingConfig
    beginning: Beginning
    teacher: Teacher
    state: TrainingState
    student: Transformer

    @property
    def embed(self) -> Embed:
        """Embeddings of prompts."""
        return embedding(self.beginning.donor)

    def targets(
        self, folder: Path, *, on_bank: Progress | None, on_targets: Progress | None
    ) -> tuple[TargetSource, tuple[States, Tensor] | None]:
        """Where batches come from, and the records that are held out."""
        config = self.config
        bank = self._bank(on_bank)
        if config.refresh_steps is not None:
            fresh = replace(config.collect, seed=config.collect.seed + _SEEDS_PER_RUN * self.state.step)
            return self._fresh(bank, fresh, config.refresh_steps), None
        store = collect(
            self.beginning.student,
            self.teacher,
            bank,
            folder=folder,
            config=config.collect,
            embed=self.embed,
            on_progress=on_targets,
        )
        seed = f"{config.collect.seed} {self.state.round} {self.state.round_step}"
        source = StoredTargets(store, bank.latents.device, seed=seed, held_out=config.held_out)
        return source, source.held_out() if config.held_out else None

    def _fresh(self, bank: TripBank, collection: CollectConfig, refresh_steps: int) -> FreshTargets:
        return FreshTargets(
            self.student, self.teacher, bank, config=collection, embed=self.embed, refresh_steps=refresh_steps
        )

    def _bank(self, on_bank: Progress | None) -> TripBank:
        first = _FIRST_SEED + _SEEDS_PER_RUN * self.config.collect.seed
        seeds = range(first, first + self.config.bank_clips)
        trips = training_clips(seeds, num_chunks=self.config.num_chunks)
        donor = self.beginning.donor
        return build_trip_bank(donor.vae, donor.tokenizer, trips=trips, on_progress=on_bank)

    def judge(self) -> dict[str, float]:
        """Recall of the student with its few steps."""
        donor, count = self.beginning.donor, self.config.validation_trips
        visits = ReturnVisits(donor, range(_VISITS_SEED, _VISITS_SEED + count))
        sampler = shifted_sampler(self.config.collect.student_steps, stochastic=True)
        return recall_score(self.student, visits, sampler=sampler)

"""Settings of the distillation of a causal student: `vidaccel train context-forcing`."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from vidaccel.errors import UserError, check_amount, check_count, check_seed, check_share
from vidaccel.training.architecture import FLOW_SHIFT
from vidaccel.training.budget import check_length
from vidaccel.training.chunk_sampler import STUDENT_STEPS, Sampler, shifted_sampler
from vidaccel.training.context_forcing_views import View
from vidaccel.training.self_rollout import Layouts, LengthRule, StartShares

Stage = Literal["1", "2", "both"]
StartKind = Literal["as-is", "short", "ignore"]


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How generator and critic learn.

    learning_rate, critic_learning_rate: of both optimizers of a network, Muon for matrices of blocks and AdamW with
        betas (0, 0.999) for the rest. momentum, critic_momentum: of Muon.
    ratio: the critic learns in every iteration, the generator in every `ratio`-th, after `critic_only` iterations.
    ema_decay: of the averaged generator, counted in its updates.
    """

    learning_rate: float = 2e-4
    critic_learning_rate: float = 5e-4
    momentum: float = 0.8
    critic_momentum: float = 0.9
    ratio: int = 2
    critic_only: int = 20
    max_grad_norm: float = 1.0
    ema_decay: float = 0.98

    def __post_init__(self) -> None:
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            check_amount(name, getattr(self, name))
        for name in ("momentum", "critic_momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"`{name}` must be from 0 to below 1, got {getattr(self, name)}.")
        check_count("ratio", self.ratio, minimum=1)
        check_count("critic_only", self.critic_only, minimum=0)


@dataclass(frozen=True, kw_only=True)
class RolloutRule:
    """What the student makes in training.

    max_chunks: most chunks of a rollout. length, growth_share: how lengths grow to it, and in which share of the stage.
    scored: how many of the chunks are judged, the last ones.
    layouts: how the memory is laid out, see `layout_rule`. shares: what happens in the chunks.
    shift: of the noise levels of its steps. Through the noise of the last one some things cannot be told, such as the
        colour of a landmark, and are averaged; a smaller shift leaves less noise there.
    """

    max_chunks: int = 6
    length: LengthRule = "linear"
    growth_share: float = 0.5
    scored: int = 1
    layouts: Layouts = "drawn"
    shares: StartShares = field(default_factory=StartShares)
    shift: float = FLOW_SHIFT

    @property
    def sampler(self) -> Sampler:
        """How the student makes a chunk."""
        return shifted_sampler(STUDENT_STEPS, shift=self.shift, stochastic=True)

    def __post_init__(self) -> None:
        check_amount("shift", self.shift)
        if not 1 <= self.scored <= 4:
            raise UserError(f"`scored` must be from 1 to 4 chunks, got {self.scored}.")
        if not 0 < self.growth_share <= 1:
            raise UserError(f"`growth_share` must be above 0 and at most 1, got {self.growth_share}.")
        if self.max_chunks < self.scored:
            raise UserError(f"`max_chunks` must be at least the {self.scored} scored ones, got {self.max_chunks}.")


@dataclass(frozen=True, kw_only=True)
class MatchingRule:
    """How teacher and critic judge.

    view: what they are given, all that the student remembers or the last chunk only.
    guidance: of the teacher, cond + guidance (cond - uncond). levels: noise levels a sample.
    score_shift: of these levels, and of those at which the critic learns; a smaller one asks more often what can be
        told through little noise only.
    flow_share: weight of flow matching beside the matching loss of the generator, on real chunks after returns and
        changes of the prompt.
    landmark_weight: extra weight, in both losses, of cells that landmarks cover in the real clip.
    error_share, error_slow: samples with a recycled error on the last remembered chunk, and whether on older frames.
    """

    view: View = "long"
    guidance: float = 0.0
    levels: int = 1
    score_shift: float = FLOW_SHIFT
    flow_share: float = 0.0
    landmark_weight: float = 0.0
    error_share: float = 0.25
    error_slow: bool = False

    def __post_init__(self) -> None:
        for name in ("flow_share", "error_share"):
            check_share(name, getattr(self, name))
        check_count("levels", self.levels, minimum=1)
        check_amount("score_shift", self.score_shift)
        for name in ("guidance", "landmark_weight"):
            check_amount(name, getattr(self, name), is_zero_allowed=True)


@dataclass(frozen=True, kw_only=True)
class ContextForcingConfig:
    """Settings of `train_context_forcing`.

    init: teacher-forced student, a checkpoint or a folder: teacher, and what generator and critic begin as.
    seconds, updates: length, exactly one of them; seconds count everything from the start of the call, updates are
        those of the generator, and a training of that length can be repeated bit by bit.
    stage: "1", rollouts from nothing under the short view; "2", contextual; "both", the first `first_share` is stage 1.
    start: what the generator begins as, see `context_forcing_starts`: "as-is" `init`; the others are trained from
        `base` for `start_seconds` or `start_steps` each.
    bank_clips, bank_seconds: clips encoded before the training, and when to stop with fewer.
    validation_trips, validation_away_chunks: trips on which recall is measured, `validations` times, and how long the
        camera stays away on them. text: tokens of a prompt.
    batch_size, bank_clips: the first is a rank's, the second is shared out among the ranks.
    lora: rank of the adapters with which generator and critic differ from the teacher; None: all weights learn.
    checkpointing: less memory for a quarter more time, see `Networks`.
    """

    init: str
    seconds: float | None = None
    updates: int | None = None
    stage: Stage = "both"
    first_share: float = 0.2
    start: StartKind = "as-is"
    base: str = "wan-tiny"
    start_seconds: float | None = 25.0
    start_steps: int | None = None
    seed: int = 0
    device: str = "auto"
    update: UpdateRule = field(default_factory=UpdateRule)
    rollout: RolloutRule = field(default_factory=RolloutRule)
    matching: MatchingRule = field(default_factory=MatchingRule)
    batch_size: int = 64
    num_chunks: int = 15
    bank_clips: int = 3000
    bank_seconds: float | None = None
    text: int = 64
    validations: int = 4
    validation_trips: int = 32
    validation_away_chunks: int = 6
    log_steps: int = 20
    save_seconds: float = 60.0
    compile: bool = False
    lora: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_length("the distillation", seconds=self.seconds, updates=self.updates)
        check_seed(self.seed)
        for name in ("batch_size", "bank_clips", "log_steps", "validations"):
            check_count(name, getattr(self, name), minimum=1)
        check_count("validation_trips", self.validation_trips, minimum=0)
        for name in ("start_seconds", "start_steps", "bank_seconds"):
            check_amount(name, getattr(self, name), optional=True)
        if self.num_chunks <= self.rollout.max_chunks:
            raise UserError(
                f"`num_chunks` must be more than the {self.rollout.max_chunks} of a rollout, got {self.num_chunks}."
            )
        check_count("lora", self.lora, minimum=1, optional=True)
        if self.lora is not None and self.start != "as-is":
            raise UserError(f"`lora` adapts the weights of the teacher; `start` must be as-is, got {self.start!r}.")
        check_share("first_share", self.first_share)

    def rehearsal(self) -> "ContextForcingConfig":
        """The same in seconds on a CPU: tiny batches, useless weights."""
        return replace(
            self,
            update=replace(self.update, critic_only=2),
            rollout=replace(self.rollout, max_chunks=min(self.rollout.max_chunks, 2)),
            start_seconds=None,
            start_steps=2,
            batch_size=2,
            num_chunks=5,
            bank_clips=2,
            validations=1,
            validation_trips=1,
            validation_away_chunks=1,
            log_steps=2,
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings as checkpoints and cards keep them: flat, and without those of the machine."""
        flat = _flat(asdict(self))
        return {name: value for name, value in flat.items() if name not in ("device", "save_seconds")}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found

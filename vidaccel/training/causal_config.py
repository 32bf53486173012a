"""Settings of the causal student's training by teacher forcing."""

from dataclasses import dataclass, replace
from typing import Literal

from vidaccel.errors import UserError, check_amount, check_count, check_seed, check_share
from vidaccel.training.loop import Schedule

_COUNTS = ("bank_clips", "batch_size", "copies", "num_chunks", "camera_dim", "depth_every")
_COUNTS_OR_NONE = (
    "begin_batch",
    "begin_clips",
    "change_batch",
    "change_clips",
    "validation_trips",
    "validation_clips",
)
_SHARES = (
    "hold_share",
    "return_share",
    "arrival_share",
    "change_share",
    "caption_dropout",
    "word_dropout",
    "image_share",
    "context_noise",
    "context_noise_share",
    "own_share",
    "kv_routing",
)


@dataclass(frozen=True, kw_only=True)
class CausalTrainingConfig:
    """Settings of `train_causal`.

    init: trained pipeline that lends its transformer, text encoder, tokenizer and autoencoder.
    layers: the layers of its transformer that the student begins with; None: all.
    camera_dim: width of the layers that take the camera's motion, where `init` has none.
    num_chunks: length of a clip. hold_share: old scenes in which the camera holds all the time.
    bank_clips, bank_seconds: clips encoded before the training, and when to stop with fewer, those of `begin_clips` and
        `change_clips` included: each of them gets the part that its chunks are of all.
    batch_size, copies: chunks a step, and noise levels of each, the first of them high.
    begin_batch: first chunks of clips, which are made from nothing, beside the `batch_size` others of a step.
    begin_clips: clips of which only the first chunk is encoded, for `begin_batch`; 0: those of the bank.
    change_batch, change_clips: chunks a step that follow a change of the prompt, beside all others, and the short clips
        that they are taken from, in each of which the prompt changes: many more changes than long clips have in the
        time that it takes to encode them. Both are 0, or neither.
    return_share, arrival_share, change_share: of the others, chunks that are made after a return, at a new place, or
        after a change of the prompt, as far as the bank has them; the rest are any.
    image_share: of this rest, chunks of clips that begin with a given single frame.
    context_noise, context_noise_share: greatest noise on remembered frames, and in how many steps there is some.
    own_share: steps in which the chunk before is the student's own estimate instead of the truth.
    kv_routing: probability with which a layer reads what a random earlier one remembers, drawn for every step.
    depth_every: instead, layers that always share one memory, in groups of so many.
    subject_weight, landmark_weight: extra weight in the loss of cells that the subject and landmarks cover.
    validation_trips, validation_away_chunks: trips that come back, and after how many chunks they do.
    validation_clips, validation_chunks: rollouts with one prompt, and their length.
    validation_steps: denoising steps of both.
    checkpointing: what lies inside the blocks is computed again for gradients, for less memory.
    """

    schedule: Schedule
    seed: int = 0
    device: str = "auto"
    init: str = "wan-tiny-causal"
    layers: tuple[int, ...] | None = None
    camera_dim: int = 64
    num_chunks: int = 15
    hold_share: float = 0.3
    bank_clips: int = 6000
    bank_seconds: float | None = None
    batch_size: int = 64
    begin_batch: int = 64
    begin_clips: int = 0
    change_batch: int = 0
    change_clips: int = 0
    copies: int = 4
    optimizer: Literal["muon", "adamw"] = "muon"
    return_share: float = 0.5
    arrival_share: float = 0.15
    change_share: float = 0.15
    caption_dropout: float = 0.1
    word_dropout: float = 0.02
    subject_weight: float = 3.0
    landmark_weight: float = 1.0
    image_share: float = 0.2
    context_noise: float = 0.15
    context_noise_share: float = 0.7
    own_share: float = 0.15
    kv_routing: float = 0.0
    depth_every: int = 1
    validation_trips: int = 64
    validation_away_chunks: int = 6
    validation_clips: int = 16
    validation_chunks: int = 16
    validation_steps: int = 4
    compile: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in _COUNTS:
            check_count(name, getattr(self, name), minimum=1)
        for name in _SHARES:
            check_share(name, getattr(self, name))
        for name in ("subject_weight", "landmark_weight"):
            check_amount(name, getattr(self, name), is_zero_allowed=True)
        for name in _COUNTS_OR_NONE:
            check_count(name, getattr(self, name), minimum=0)
        check_amount("bank_seconds", self.bank_seconds, optional=True)
        check_seed(self.seed)
        if self.begin_clips and not self.begin_batch:
            raise UserError(
                f"`begin_clips` {self.begin_clips} are for first chunks, of which `begin_batch` 0 trains on none; "
                "leave one of them out."
            )
        if (self.change_clips > 0) != (self.change_batch > 0):
            raise UserError(
                f"`change_batch` {self.change_batch} is taken from `change_clips` {self.change_clips}; "
                "give both or neither."
            )
        if self.kv_routing > 0 and self.depth_every > 1:
            raise UserError(
                "Layers share a memory by chance (`kv_routing`) or always (`depth_every`); give one of them."
            )
        taken = self.return_share + self.arrival_share + self.change_share
        if taken > 1:
            raise UserError(
                f"`return_share`, `arrival_share` and `change_share` must not exceed 1 together, got {taken:g}."
            )

    def rehearsal(self) -> "CausalTrainingConfig":
        """The same in seconds on a CPU: tiny batches, useless weights."""
        return replace(
            self,
            schedule=replace(self.schedule, log_steps=2, num_validations=1),
            bank_clips=2,
            batch_size=2,
            begin_batch=min(self.begin_batch, 2),
            begin_clips=min(self.begin_clips, 2),
            change_batch=min(self.change_batch, 2),
            change_clips=min(self.change_clips, 8),
            copies=2,
            num_chunks=4,
            validation_trips=1,
            validation_away_chunks=1,
            validation_clips=1,
            validation_chunks=4,
            validation_steps=2,
        )

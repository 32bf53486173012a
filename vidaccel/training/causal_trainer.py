"""Teacher forcing of the causal student on long clips: one pass over remembered frames and copies of the next chunk.

Context Forcing starts its student from such weights (arXiv 2602.06028); the pass over clean frames and noisy copies
under one mask is that of CausVid and Self-Forcing (arXiv 2412.07772, 2506.08009).
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.training.architecture import TEMPORAL_STRIDE, Transformer
from vidaccel.training.causal_data import LongClipBank, build_long_bank
from vidaccel.training.causal_layout import ChunkLayout, chunk_sequence, draw_layouts, num_context_slots
from vidaccel.training.causal_score import rollout_score
from vidaccel.training.causal_student import (
    Donor,
    chunk_velocity,
    load_donor,
    new_student,
    student_architecture,
    student_tensors,
)
from vidaccel.training.checkpoint import TrainingState, load_checkpoint, with_prefix, without_prefix
from vidaccel.training.device import seeded_generator, training_device
from vidaccel.training.flow import draw_sigmas, drop_words, noisy_latents, prompt_embeddings
from vidaccel.training.loop import Record, Schedule, carry_records, start_round, train
from vidaccel.training.transformer_trainer import new_optimizers
from vidaccel.world import random_scene

_SEEDS_PER_ROUND = 10_000_000
_FIRST_SEED = 900_000_000
_HELD_OUT_SEED = 77_000_000
_HELD_OUT_LAYOUTS = 8
_SHARES = (
    "hold_share",
    "caption_dropout",
    "word_dropout",
    "image_share",
    "context_noise",
    "context_noise_share",
    "hide_share",
    "own_share",
)


@dataclass(frozen=True, kw_only=True)
class CausalTrainingConfig:
    """Settings of `train_causal`.

    init: trained pipeline that lends its transformer, text encoder, tokenizer and autoencoder.
    layers: the layers of its transformer that the student begins with.
    memory: what the student will remember; keyframes are drawn, so its rule matters for validation only.
    num_frames: pixel frames of a clip; the default holds, pans away, holds there and pans back.
    hold_share: clips in which the camera holds all the time instead.
    bank_clips, bank_seconds: clips encoded before the training, and when to stop with fewer.
    batch_size, copies: clips a step, and noise levels of the chunk for each.
    image_share: steps whose clip begins with a given single frame.
    context_noise, context_noise_share: greatest noise on remembered frames, and in how many steps there is some.
    hide_share: steps in which remembered chunks do not see some of the earlier ones.
    own_share: steps in which the chunk before is the student's own estimate instead of the truth.
    validation_clips, validation_chunks, validation_steps: rollouts, their length and their denoising steps.
    """

    schedule: Schedule
    seed: int = 0
    device: str = "auto"
    init: str = "wan-tiny"
    layers: tuple[int, ...] = (0, 1, 4, 5)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    num_frames: int = 385
    hold_share: float = 0.3
    bank_clips: int = 2560
    bank_seconds: float | None = None
    batch_size: int = 64
    copies: int = 4
    optimizer: Literal["muon", "adamw"] = "muon"
    caption_dropout: float = 0.1
    word_dropout: float = 0.02
    text: int = 64
    subject_weight: float = 3.0
    image_share: float = 0.2
    context_noise: float = 0.15
    context_noise_share: float = 0.7
    hide_share: float = 0.5
    own_share: float = 0.3
    validation_clips: int = 16
    validation_chunks: int = 16
    validation_steps: int = 8
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("bank_clips", "batch_size", "copies"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.memory.mode != "clean":
            raise UserError(f"A student is trained for a memory in the clean mode, got {self.memory.mode!r}.")
        chunk = self.memory.chunk_frames * TEMPORAL_STRIDE
        if self.num_frames % TEMPORAL_STRIDE != 1 or self.num_frames <= chunk:
            raise UserError(
                f"`num_frames` must be {TEMPORAL_STRIDE}k + 1 and hold more than one chunk, got {self.num_frames}."
            )
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"`{name}` must be from 0 to 1, got {getattr(self, name)}.")


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
    device = training_device(config.device)
    saved, tensors = load_checkpoint(resume, kind="causal") if resume else (None, {})
    donor = load_donor(config.init)
    fresh = TrainingState(
        kind="causal",
        architecture={"transformer": student_architecture(donor.transformer, num_layers=len(config.layers))},
        recipe=_recipe(config),
    )
    state = start_round(saved, fresh)
    weights = without_prefix("transformer", tensors) or student_tensors(donor.transformer, layers=config.layers)
    student = new_student(state.architecture["transformer"], weights).to(device)
    donor.vae.to(device)
    donor.text_encoder.to(device)
    first = _FIRST_SEED + config.seed + state.round * _SEEDS_PER_ROUND
    bank = build_long_bank(
        donor.vae,
        donor.tokenizer,
        seeds=range(first, first + config.bank_clips),
        num_frames=config.num_frames,
        hold_share=config.hold_share,
        seconds=config.bank_seconds,
        on_progress=on_bank,
    )
    carry_records(resume, output)
    torch.manual_seed(config.seed)
    task = CausalTask(student, donor, config, bank=bank, state=state)
    reserve = 5 + 0.03 * config.validation_clips * config.validation_chunks
    yield from train(task, config.schedule, state=state, output=output, began=began, reserve=reserve)


def trained_student(checkpoint: Path) -> tuple[TrainingState, Transformer]:
    """State and student of a checkpoint, in float32. Raises `UserError` if it cannot be used."""
    state, tensors = load_checkpoint(checkpoint, kind="causal")
    return state, new_student(state.architecture["transformer"], without_prefix("transformer", tensors))


def _recipe(config: CausalTrainingConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "device"}


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Latents (B, C, F, h, w) of the context and of the chunk, weights of its cells, the clips and the embeddings."""

    context: Tensor
    chunk: Tensor
    weight: Tensor
    clips: Tensor
    embeddings: Tensor


class CausalTask:
    """Student, bank and loss, as `loop.train` wants them; donor's networks are only read."""

    def __init__(
        self,
        student: Transformer,
        donor: Donor,
        config: CausalTrainingConfig,
        *,
        bank: LongClipBank,
        state: TrainingState,
    ) -> None:
        self.student, self.donor, self.config, self.bank = student, donor, config, bank
        self.device = bank.latents.device
        self.parameters = list(student.parameters())
        self.optimizers = new_optimizers(student, self.parameters, config.optimizer, rate=config.schedule.learning_rate)
        if config.compile:
            student.compile_repeated_blocks(dynamic=False)
        self.generator = seeded_generator(self.device, config.seed, state.round, state.round_step)
        self._draw = random.Random(f"causal {config.seed} {state.round} {state.round_step}")
        self.num_frames_per_step = (
            config.batch_size * config.memory.chunk_frames * donor.vae.config.scale_factor_temporal
        )
        self._held_out: LongClipBank | None = None

    def loss(self, fraction: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted flow-matching loss of a random chunk of random clips, and the plain one for the records."""
        layout, previous = self._layouts(self._draw)
        clips = torch.randint(
            len(self.bank.latents), (self.config.batch_size,), device=self.device, generator=self.generator
        )
        batch = self._batch(self.bank, layout, clips, self.generator)
        if previous is not None and self._draw.random() < self.config.own_share:
            batch = self._with_own_estimate(batch, layout, previous)
        if layout.context and self._draw.random() < self.config.context_noise_share:
            batch = replace(batch, context=self._disturbed(batch.context, layout.chunks))
        hide = self._draw if self._draw.random() < self.config.hide_share else None
        return self._flow_loss(batch, layout, self.generator, hide=hide)

    def _layouts(self, draw: random.Random) -> tuple[ChunkLayout, ChunkLayout | None]:
        num_frames = self.bank.latents.shape[2]
        return draw_layouts(self.config.memory, num_frames=num_frames, image_share=self.config.image_share, draw=draw)

    def _batch(self, bank: LongClipBank, layout: ChunkLayout, clips: Tensor, generator: torch.Generator) -> _Batch:
        config = self.config
        weight = 1 + config.subject_weight * _frames(bank.coverage[:, None], clips, layout.current)
        segment = bank.segment_of(layout.current)
        wording = torch.randint(bank.tokens.shape[2], clips.shape, device=self.device, generator=generator)
        tokens = bank.tokens[clips, segment, wording]
        tokens = drop_words(tokens, captions=config.caption_dropout, words=config.word_dropout, generator=generator)
        with torch.no_grad():
            embeddings = prompt_embeddings(self.donor.text_encoder, tokens, length=config.text)
        return _Batch(
            context=_frames(bank.latents, clips, layout.context),
            chunk=_frames(bank.latents, clips, layout.current),
            weight=weight / weight.mean(),
            clips=clips,
            embeddings=embeddings,
        )

    def _flow_loss(
        self, batch: _Batch, layout: ChunkLayout, generator: torch.Generator, *, hide: random.Random | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        copies, size = self.config.copies, len(batch.clips)
        slots = num_context_slots(self.config.memory)
        sequence = chunk_sequence(layout, num_slots=slots, copies=copies, device=self.device, hide=hide)
        sigmas = draw_sigmas(size * copies, generator).view(size, copies)
        target = batch.chunk.repeat(1, 1, copies, 1, 1)
        noise = torch.randn(target.shape, device=self.device, generator=generator)
        velocity = chunk_velocity(
            self.student,
            sequence,
            context=batch.context,
            noisy=_noisy_copies(target, noise, sigmas),
            sigmas=sigmas,
            embeddings=batch.embeddings,
        )
        squared = (velocity - (noise - target)).square()
        return (squared * batch.weight.repeat(1, 1, copies, 1, 1)).mean(), {"flow_loss": squared.detach().mean()}

    @torch.no_grad()
    def _with_own_estimate(self, batch: _Batch, layout: ChunkLayout, previous: ChunkLayout) -> _Batch:
        """The chunk before the current one as the student sees it from noise, as in a rollout the past is its own."""
        chunk = _frames(self.bank.latents, batch.clips, previous.current)
        size = (len(batch.clips), 1)
        sigmas = 0.3 + 0.6 * torch.rand(size, device=self.device, generator=self.generator)
        noise = torch.randn(chunk.shape, device=self.device, generator=self.generator)
        noisy = _noisy_copies(chunk, noise, sigmas)
        slots = num_context_slots(self.config.memory)
        velocity = chunk_velocity(
            self.student,
            chunk_sequence(previous, num_slots=slots, copies=1, device=self.device),
            context=_frames(self.bank.latents, batch.clips, previous.context),
            noisy=noisy,
            sigmas=sigmas,
            embeddings=batch.embeddings,
        )
        estimate = noisy - sigmas.view(-1, 1, 1, 1, 1) * velocity
        context = batch.context.clone()
        for slot, frame in enumerate(layout.context):
            if frame in previous.current:
                context[:, :, slot] = estimate[:, :, previous.current.index(frame)]
        return replace(batch, context=context)

    def _disturbed(self, context: Tensor, chunks: tuple[int, ...]) -> Tensor:
        """Remembered frames with a little noise, as much for all frames of one chunk."""
        most = self.config.context_noise
        shape = (len(context), len(chunks))
        levels = most * torch.rand(shape, device=self.device, generator=self.generator)
        levels = levels[:, [chunks.index(chunk) for chunk in chunks]][:, None, :, None, None]
        noise = torch.randn(context.shape, device=self.device, generator=self.generator)
        return (1 - levels) * context + levels * noise

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss on scenes never trained on, and what the oracle reads from rollouts of their captions."""
        config = self.config
        if config.validation_clips == 0:
            return {}
        seeds = range(_HELD_OUT_SEED, _HELD_OUT_SEED + config.validation_clips)
        if self._held_out is None:
            self._held_out = build_long_bank(
                self.donor.vae,
                self.donor.tokenizer,
                seeds=seeds,
                num_frames=config.num_frames,
                split="test",
                hold_share=config.hold_share,
            )
        draw, generator = random.Random("causal validation"), seeded_generator(self.device, _HELD_OUT_SEED)
        clips = torch.arange(config.validation_clips, device=self.device)
        losses = []
        with torch.compiler.set_stance("force_eager"):
            for _ in range(_HELD_OUT_LAYOUTS):
                layout, _ = self._layouts(draw)
                batch = self._batch(self._held_out, layout, clips, generator)
                losses.append(self._flow_loss(batch, layout, generator)[1]["flow_loss"])
        channels, _, *size = self._held_out.latents.shape[1:]
        scores = rollout_score(
            self.student,
            self.donor,
            [random_scene(seed, num_frames=config.num_frames, split="test") for seed in seeds],
            memory=replace(config.memory, keyframe_rule="uniform"),
            shape=(channels, config.validation_chunks * config.memory.chunk_frames, *size),
            num_steps=config.validation_steps,
            guidance_scales=config.guidance_scales,
        )
        return {"held_out_loss": float(torch.stack(losses).mean()), **scores}

    def tensors(self) -> dict[str, Tensor]:
        """The weights of the student."""
        return with_prefix("transformer", self.student.state_dict())


def _frames(clips: Tensor, rows: Tensor, frames: tuple[int, ...]) -> Tensor:
    """`frames` of the `rows` of (N, C, F, h, w); (B, C, frames, h, w) float32."""
    columns = torch.tensor(frames, dtype=torch.long, device=clips.device)
    return clips[rows[:, None], :, columns[None, :]].transpose(1, 2).float()


def _noisy_copies(target: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Copies side by side (B, C, copies * F, h, w), each at its own of the noise levels (B, copies)."""
    copies = sigmas.shape[1]

    def apart(latents: Tensor) -> Tensor:
        return latents.unflatten(2, (copies, -1)).transpose(1, 2).flatten(0, 1)

    noisy = noisy_latents(apart(target), apart(noise), sigmas.flatten())
    return noisy.unflatten(0, (-1, copies)).transpose(1, 2).flatten(2, 3)

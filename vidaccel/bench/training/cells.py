"""One way to train a student of published size: networks and data are made of noise, a few full steps are timed.

Nothing is rendered or encoded: latents are noise, prompts what a tiny text encoder of the published width makes of
random words. Shapes as in `vidaccel.training.trip_bank`.
"""

from __future__ import annotations

import copy
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vidaccel.bench.shared.random_model import random_transformer
from vidaccel.catalog.families.family import Component
from vidaccel.catalog.families.recipes import t5_encoder
from vidaccel.catalog.pipelines import STUDENT_TRANSFORMER
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.random_models.build import build_part
from vidaccel.training.architecture import Transformer
from vidaccel.training.chunk_batch import SLOTS
from vidaccel.training.context_forcing_config import ContextForcingConfig, MatchingRule, RolloutRule, UpdateRule
from vidaccel.training.context_forcing_networks import Networks, adapted_networks
from vidaccel.training.context_forcing_starts import Forcing, TeacherForcing
from vidaccel.training.context_forcing_step import ContextForcing
from vidaccel.training.device import seeded_generator
from vidaccel.training.latents import TOKENS_PER_CAPTION
from vidaccel.training.ranks import num_ranks, own_rank
from vidaccel.training.self_rollout import PromptTable, StartShares
from vidaccel.training.sharding import shard
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank

Stage = Literal["forcing", "1", "2"]
_CAMERA_DIM = 256
_PAST_CHUNKS = SLOTS // CHUNK_FRAMES  # after so many the memory is full
_LAST = StartShares(returns=1, arrivals=0, changes=0, anything=0, own=0)  # the only returns of the bank are its ends
_PIXELS = 8  # of a latent cell
PATCH_PIXELS = 2 * _PIXELS  # of a token's side
_RATE = 2e-6  # Context Forcing's; random weights have nothing to learn


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A stage, how many weights learn, and whether what lies inside the blocks is computed again.

    stage: teacher forcing, or 1 or 2 of the distillation. lora: rank of adapters; None: all weights learn.
    """

    stage: Stage
    lora: int | None
    checkpointing: bool

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others in a result file."""
        return {**asdict(self), "cards": num_ranks()}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained on what: a row of the catalog, pixels, chunks of a rollout, tokens of a prompt, the batch."""

    shape: str
    height: int
    width: int
    chunks: int
    text: int
    batch_size: int


def measured(cell: Cell, sizes: Sizes, *, steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds a step, by part, and most memory; where that is not enough, `error` says it and there are no seconds."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    record: dict[str, Any] = {**cell.key, "error": None, "parts": {}, "seconds": None}
    try:
        record |= _timed(cell, sizes, steps=steps, device=device)
    except torch.OutOfMemoryError:
        record["error"] = "out of memory"
    gc.collect()
    if device.type == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
    return {"peak_bytes": None, **record}


def _timed(cell: Cell, sizes: Sizes, *, steps: int, device: torch.device) -> dict[str, Any]:
    began = time.monotonic()
    clock = _PartClock(device)
    step = _step_of(cell, sizes, clock=clock, device=device)
    clock.begin()
    prepared = time.monotonic() - began
    step()  # chooses kernels; does not count
    clock.begin()
    began = time.monotonic()
    for _ in range(steps):
        step()
    seconds = (time.monotonic() - began) / steps
    parts = {name: spent / steps for name, spent in clock.parts.items()}
    return {"seconds": seconds, "parts": parts, "prepared_seconds": prepared}


class _PartClock:
    """Adds up how long parts take, each from the end of the one before; waits for the device at every end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.parts: dict[str, float] = {}

    def begin(self) -> None:
        """Forget what was measured."""
        self.parts = defaultdict(float)
        self._last = self._now()

    def end(self, part: str) -> None:
        """A part ends here."""
        now = self._now()
        self.parts[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()


def _step_of(cell: Cell, sizes: Sizes, *, clock: _PartClock, device: torch.device) -> Callable[[], object]:
    """A function that makes one full step."""
    student = random_student(sizes.shape, device=device)
    bank, prompts = noise_data(sizes, student.config, device=device)
    if cell.stage == "forcing":
        student.requires_grad_(True)
        if cell.checkpointing:
            student.enable_gradient_checkpointing()
        shard(student)
        forcing = Forcing(steps=1, batch_size=sizes.batch_size, layouts="window", shares=_LAST)
        work = TeacherForcing(student, bank, prompts, forcing, on_part=clock.end)
        return lambda: work.step(rate=_RATE)
    rule = UpdateRule(critic_only=0, ratio=1, learning_rate=_RATE, critic_learning_rate=_RATE)
    config = ContextForcingConfig(
        init=sizes.shape,
        updates=1,
        stage=cell.stage,
        update=rule,
        rollout=RolloutRule(max_chunks=sizes.chunks, length="fixed", layouts="window", shares=_LAST),
        matching=MatchingRule(),
        batch_size=sizes.batch_size,
        num_chunks=bank.num_chunks,
    )
    if cell.lora is None:
        student.requires_grad_(True)
        generator = copy.deepcopy(student)
        networks = Networks(generator=generator, teacher=student, rule=rule, checkpointing=cell.checkpointing)
    else:
        networks = adapted_networks(student, rank=cell.lora, seed=0, rule=rule, checkpointing=cell.checkpointing)
    noise = seeded_generator(device, own_rank())
    task = ContextForcing(networks, config, bank=bank, prompts=prompts, generator=noise, on_part=clock.end)
    return lambda: task.iterate(1.0)


def random_student(shape: str, *, device: torch.device) -> Transformer:
    """A causal student of the row `shape` with random weights in float32, told of its camera; frozen."""
    config: Mapping[str, Any] = SHAPES[shape].transformer.config
    config = {**config, "camera_dim": _CAMERA_DIM, "clean_pass": "frame"}
    component = Component(kind=STUDENT_TRANSFORMER, config=config)
    return random_transformer(component, device=device, dtype=torch.float32)


def noise_data(sizes: Sizes, config: Any, *, device: torch.device) -> tuple[TripBank, PromptTable]:
    """Clips of noise that end when the memory has been full for a rollout, and random prompts; other ones a rank."""
    num_clips, num_chunks = sizes.batch_size, _PAST_CHUNKS + sizes.chunks
    num_frames = num_chunks * CHUNK_FRAMES
    cells = (sizes.height // _PIXELS, sizes.width // _PIXELS)
    draw = torch.Generator().manual_seed(own_rank())

    def none(*shape: int) -> Tensor:
        return torch.zeros(num_clips, num_frames, *shape, device=device)

    latents = torch.randn(num_clips, num_frames, config.in_channels, *cells, generator=draw)
    tokens = torch.randint(2, 512, (num_clips, num_chunks, TOKENS_PER_CAPTION), generator=draw)
    bank = TripBank(
        latents=latents.to(device, torch.float16),
        columns=none(),
        motions=none(),
        tokens=tokens.to(device),
        coverage=none(*cells).half(),
        landmarks=none(*cells).half(),
        returns=tuple((clip, num_chunks - 1) for clip in range(num_clips)),
        arrivals=(),
        changes=(),
        keyframes=((),) * num_clips,
        clips=(),
    )
    encoder = t5_encoder("UMT5EncoderModel", d_model=config.text_dim, num_layers=1)
    return bank, PromptTable(bank, build_part(encoder, seed=0).to(device).eval(), length=sizes.text)

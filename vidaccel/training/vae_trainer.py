"""Training of the autoencoder: images first, then small crops of longer and longer clips.

Throughput decides the result: narrow 3-D convolutions use a GPU badly, so whole clips go through in one pass
(`vae_clip`) and crops replace full frames wherever time is what has to be learnt.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import Tensor, nn

from vidaccel.errors import UserError, check_seed
from vidaccel.memory.prefixes import with_prefix, without_prefix
from vidaccel.training.architecture import TEMPORAL_STRIDE, VAE_ARCHITECTURE, Vae, new_vae
from vidaccel.training.checkpoint import TrainingState, load_checkpoint
from vidaccel.training.clip_pool import ClipPool
from vidaccel.training.device import autocast, seeded_generator, training_device
from vidaccel.training.loop import Record, Schedule, carry_records, start_round, train
from vidaccel.training.ranks import check_alone
from vidaccel.training.vae_clip import decode_clip, encode_clip
from vidaccel.training.vae_loss import KL_WEIGHT, psnr_of, reconstruction_loss, sample_latents
from vidaccel.world import FRAME_SIZE, random_scene, render

_SEEDS_PER_ROUND = 1_000_000
_VALIDATION_BATCH = 4


@dataclass(frozen=True, kw_only=True)
class VaePhase:
    """Batches of `batch_size` crops of `size` pixels and `num_frames` frames, until `until` of the round is done."""

    until: float
    batch_size: int
    num_frames: int
    size: int


VAE_PHASES = (
    VaePhase(until=0.27, batch_size=64, num_frames=1, size=128),
    VaePhase(until=0.64, batch_size=24, num_frames=17, size=64),
    VaePhase(until=0.86, batch_size=12, num_frames=33, size=64),
    VaePhase(until=1.0, batch_size=8, num_frames=49, size=64),
)
# A further round keeps to clips: its weights know images.
VAE_LATER_PHASES = (
    VaePhase(until=0.5, batch_size=12, num_frames=33, size=64),
    VaePhase(until=0.9, batch_size=8, num_frames=49, size=64),
    VaePhase(until=1.0, batch_size=2, num_frames=49, size=128),
)


@dataclass(frozen=True, kw_only=True)
class VaeTrainingConfig:
    """Settings of `train_vae`.

    phases: None takes `VAE_PHASES` in the first round and `VAE_LATER_PHASES` in the others.
    subject_weight: weight of a pixel of the moving subject against one of the scenery.
    pool_clips: rendered clips kept for cutting crops; every `refresh_steps` steps `refresh_clips` are replaced.
    validation_clips: clips with unseen combinations of attributes, at full size and length.
    compile: compile the residual blocks (pays in rounds of many minutes only).
    channels_last: memory format of the 3-D convolutions.
    """

    schedule: Schedule
    seed: int = 0
    device: str = "auto"
    architecture: Mapping[str, Any] = field(default_factory=lambda: dict(VAE_ARCHITECTURE))
    phases: tuple[VaePhase, ...] | None = None
    num_frames: int = 49
    subject_weight: float = 3.0
    pool_clips: int = 1024
    refresh_clips: int = 32
    refresh_steps: int = 8
    validation_clips: int = 8
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.pool_clips < self.refresh_clips or self.refresh_clips < 1:
            raise UserError(
                f"`refresh_clips` must be from 1 to `pool_clips` ({self.pool_clips}), got {self.refresh_clips}."
            )
        for phase in self.phases or ():
            if phase.num_frames > self.num_frames or phase.num_frames % TEMPORAL_STRIDE != 1 or phase.size > FRAME_SIZE:
                raise UserError(
                    f"A phase needs {TEMPORAL_STRIDE}k + 1 frames up to {self.num_frames}, size <= {FRAME_SIZE}; "
                    f"got {phase}."
                )

    def rehearsal(self) -> "VaeTrainingConfig":
        """The same in seconds on a CPU: tiny batches, useless weights."""
        phases = (
            VaePhase(until=0.4, batch_size=2, num_frames=1, size=64),
            VaePhase(until=1.0, batch_size=1, num_frames=5, size=32),
        )
        return replace(
            self,
            schedule=replace(self.schedule, log_steps=2, num_validations=2),
            phases=phases,
            num_frames=5,
            pool_clips=4,
            refresh_clips=2,
            validation_clips=1,
        )


def train_vae(config: VaeTrainingConfig, output: Path, *, resume: Path | None = None) -> Iterator[Record]:
    """Train the autoencoder into the checkpoint folder `output`; yields records with loss, PSNR and speed.

    resume: a checkpoint to go on from: an interrupted round goes on where it was, after a finished one another begins.
    Raises `UserError` for a checkpoint that cannot be used, FloatingPointError if the training diverges.
    """
    began = time.monotonic()
    check_alone("The training of the autoencoder")
    device = training_device(config.device)
    fresh = TrainingState(kind="vae", architecture={"vae": dict(config.architecture)})
    saved, tensors = load_checkpoint(resume, kind="vae") if resume else (None, {})
    state = start_round(saved, fresh)
    config = replace(config, phases=config.phases or (VAE_LATER_PHASES if state.round else VAE_PHASES))
    state = replace(state, recipe=_recipe(config))
    carry_records(resume, output)
    torch.manual_seed(config.seed)
    vae = new_vae(state.architecture["vae"])
    if tensors:
        vae.load_state_dict(without_prefix("vae", tensors))
    task = VaeTask(vae.to(device), config, state=state)
    yield from train(task, config.schedule, state=state, output=output, began=began, reserve=4.0)


def _recipe(config: VaeTrainingConfig) -> dict[str, Any]:
    recipe = asdict(replace(config, architecture={}))
    return {name: value for name, value in recipe.items() if name not in ("architecture", "device")}


class VaeTask:
    """The autoencoder, its data and its loss, as `loop.train` wants them."""

    def __init__(self, vae: Vae, config: VaeTrainingConfig, *, state: TrainingState) -> None:
        self.vae, self.config = vae, config
        self.device = next(vae.parameters()).device
        self.phases = config.phases or VAE_PHASES
        self.parameters = list(vae.parameters())
        _prepare(vae, config)
        on_gpu = self.device.type == "cuda"
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                self.parameters, lr=config.schedule.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=on_gpu
            )
        ]
        first_seed = config.seed + (1 + state.round) * _SEEDS_PER_ROUND + state.round_step
        self.pool = ClipPool(config.pool_clips, num_frames=config.num_frames, first_seed=first_seed, device=self.device)
        self.generator = seeded_generator(self.device, config.seed, state.round, state.round_step)
        self.num_frames_per_step = 0
        self._steps = 0

    def loss(self, fraction: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of the phase that `fraction` lies in."""
        self._steps += 1
        if self._steps % self.config.refresh_steps == 0:
            self.pool.refresh(self.config.refresh_clips)
        phase = next((phase for phase in self.phases if fraction < phase.until), self.phases[-1])
        self.num_frames_per_step = phase.batch_size * phase.num_frames
        video, mask = self.pool.crops(
            phase.batch_size, num_frames=phase.num_frames, size=phase.size, generator=self.generator
        )
        with autocast(self.device):
            moments = encode_clip(self.vae, video)
        latents, divergence = sample_latents(moments, self.generator)
        with autocast(self.device):
            reconstruction = decode_clip(self.vae, latents)
        weight = 1 + (self.config.subject_weight - 1) * mask
        loss, squared = reconstruction_loss(reconstruction.float(), video, weight)
        return loss + KL_WEIGHT * divergence, {"train_psnr": psnr_of(squared.detach()), "kl": divergence}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean PSNR in dB over unseen clips, and over their first frames coded as images."""
        return {
            "psnr": _mean_psnr(self.vae, self.config.validation_clips, num_frames=self.config.num_frames),
            "image_psnr": _mean_psnr(self.vae, self.config.validation_clips, num_frames=1),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The weights of the autoencoder."""
        return with_prefix("vae", self.vae.state_dict())


def _prepare(vae: Vae, config: VaeTrainingConfig) -> None:
    for module in vae.modules():
        if config.channels_last and isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if config.compile and isinstance(module, WanResidualBlock):
            module.compile(dynamic=False)


def _mean_psnr(vae: Vae, num_clips: int, *, num_frames: int) -> float:
    device = next(vae.parameters()).device
    values = []
    for first in range(0, num_clips, _VALIDATION_BATCH):
        seeds = range(first, min(first + _VALIDATION_BATCH, num_clips))
        scenes = [random_scene(seed, split="test") for seed in seeds]
        video = render(scenes, num_frames=num_frames, device=device).transpose(1, 2) * 2 - 1
        with autocast(device), torch.compiler.set_stance("force_eager"):
            reconstruction = decode_clip(vae, encode_clip(vae, video).chunk(2, dim=1)[0])
        squared = (reconstruction.float().clamp(-1, 1) - video).square().mean((1, 2, 3, 4))
        values.append(psnr_of(squared))
    return float(torch.cat(values).mean())

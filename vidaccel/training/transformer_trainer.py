"""Training of the transformer and its text encoder by flow matching on a bank of encoded clips."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidaccel.catalog.pipelines import WAN_TEXT_TOKENS
from vidaccel.errors import UserError, check_amount, check_count, check_seed
from vidaccel.memory.prefixes import with_prefix, without_prefix
from vidaccel.training.architecture import (
    TEMPORAL_STRIDE,
    TEXT_ENCODER_ARCHITECTURE,
    TRANSFORMER_ARCHITECTURE,
    TextEncoder,
    Transformer,
    Vae,
    WordTokenizer,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    new_vae,
)
from vidaccel.training.checkpoint import TrainingState, load_checkpoint
from vidaccel.training.device import autocast, seeded_generator, training_device
from vidaccel.training.flow import draw_sigmas, drop_words, noisy_latents, prompt_embeddings, timesteps_of
from vidaccel.training.latents import TOKENS_PER_CAPTION, LatentBank, build_bank
from vidaccel.training.loop import Record, Schedule, carry_records, start_round, train
from vidaccel.training.muon import BatchedMuon, split_parameters
from vidaccel.training.oracle_score import oracle_score
from vidaccel.training.ranks import check_alone
from vidaccel.world import vocabulary

_SEEDS_PER_ROUND = 10_000_000
_FIRST_SEED = 5_000_000


@dataclass(frozen=True, kw_only=True)
class TransformerTrainingConfig:
    """Settings of `train_transformer`.

    bank_clips: clips rendered and encoded before the training; each has four captions.
    batch_size: clips a step. optimizer: `muon` for the matrices of the blocks and AdamW for the rest, or `adamw`.
    caption_dropout, word_dropout: share of captions without text, and of words turned into `<unk>`.
    long_text_share: share of steps with the text padded to `long_text`, WanPipeline's default, instead of `text`.
    subject_weight: the loss of a latent cell weighs 1 + this * its coverage by the subject.
    validation_prompts, validation_steps, guidance_scale: of the videos that the oracle reads.
    compile: compile the blocks of the transformer (a minute, then steps are a third shorter).
    """

    schedule: Schedule
    seed: int = 0
    device: str = "auto"
    transformer: Mapping[str, Any] = field(default_factory=lambda: dict(TRANSFORMER_ARCHITECTURE))
    text_encoder: Mapping[str, Any] = field(default_factory=lambda: dict(TEXT_ENCODER_ARCHITECTURE))
    num_frames: int = 49
    bank_clips: int = 24_576
    batch_size: int = 64
    optimizer: Literal["muon", "adamw"] = "muon"
    caption_dropout: float = 0.1
    word_dropout: float = 0.02
    text: int = 64
    long_text: int = WAN_TEXT_TOKENS
    long_text_share: float = 0.25
    subject_weight: float = 3.0
    validation_prompts: int = 32
    validation_steps: int = 30
    guidance_scale: float = 5.0
    compile: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_amount("subject_weight", self.subject_weight, is_zero_allowed=True)
        if self.optimizer not in ("muon", "adamw"):
            raise UserError(f"`optimizer` must be muon or adamw, got {self.optimizer!r}.")
        for name in ("bank_clips", "batch_size"):
            check_count(name, getattr(self, name), minimum=1)
        if self.num_frames % TEMPORAL_STRIDE != 1:
            raise UserError(f"`num_frames` must be {TEMPORAL_STRIDE}k + 1, got {self.num_frames}.")
        if min(self.text, self.long_text) < TOKENS_PER_CAPTION:
            raise UserError(f"`text` and `long_text` must be at least {TOKENS_PER_CAPTION} tokens.")

    def rehearsal(self) -> "TransformerTrainingConfig":
        """The same in seconds on a CPU: tiny batches, useless weights."""
        return replace(
            self,
            schedule=replace(self.schedule, log_steps=2, num_validations=1),
            num_frames=5,
            bank_clips=4,
            batch_size=2,
            validation_prompts=1,
            validation_steps=2,
        )


def train_transformer(
    config: TransformerTrainingConfig,
    output: Path,
    *,
    vae: Path,
    resume: Path | None = None,
    on_bank: Callable[[int, int], None] | None = None,
) -> Iterator[Record]:
    """Train transformer and text encoder into the checkpoint folder `output`; yields records with loss and speed.

    vae: checkpoint of the autoencoder. resume: a checkpoint to go on from, with the normalisation it was trained with.
    on_bank: called with finished and all clips while the bank is built.
    Raises `UserError` for a checkpoint that cannot be used, FloatingPointError if the training diverges.
    """
    began = time.monotonic()
    check_alone("The training of the transformer")
    device = training_device(config.device)
    architecture = {"transformer": dict(config.transformer), "text_encoder": dict(config.text_encoder)}
    fresh = TrainingState(kind="transformer", architecture=architecture, recipe=_recipe(config))
    saved, tensors = load_checkpoint(resume, kind="transformer") if resume else (None, {})
    state = start_round(saved, fresh)
    autoencoder = trained_vae(vae).to(device).eval().requires_grad_(False)
    tokenizer = new_tokenizer(vocabulary())
    bank = build_bank(
        autoencoder,
        tokenizer,
        num_clips=config.bank_clips,
        num_frames=config.num_frames,
        first_seed=_FIRST_SEED + config.seed + state.round * _SEEDS_PER_ROUND,
        statistics=None if not state.latents_mean or not state.latents_std else (state.latents_mean, state.latents_std),
        on_progress=on_bank,
    )
    state = replace(state, latents_mean=tuple(bank.mean.tolist()), latents_std=tuple(bank.std.tolist()))
    autoencoder.register_to_config(latents_mean=bank.mean.tolist(), latents_std=bank.std.tolist())
    carry_records(resume, output)
    torch.manual_seed(config.seed)
    networks = _networks(state.architecture, tensors, device)
    task = TransformerTask(networks, config, bank=bank, state=state, judge=(tokenizer, autoencoder))
    reserve = 0.2 * config.validation_prompts + 5
    yield from train(task, config.schedule, state=state, output=output, began=began, reserve=reserve)


def trained_vae(checkpoint: Path) -> Vae:
    """The autoencoder of a checkpoint, in float32. Raises `UserError` if it cannot be used."""
    state, tensors = load_checkpoint(checkpoint, kind="vae")
    vae = new_vae(state.architecture["vae"])
    vae.load_state_dict(without_prefix("vae", tensors))
    return vae


def trained_networks(checkpoint: Path) -> tuple[TrainingState, Transformer, TextEncoder]:
    """State, transformer and text encoder of a checkpoint, in float32. Raises `UserError` if it cannot be used."""
    state, tensors = load_checkpoint(checkpoint, kind="transformer")
    return (state, *_networks(state.architecture, tensors, torch.device("cpu")))


def _networks(
    architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> tuple[Transformer, TextEncoder]:
    transformer = new_transformer(architecture["transformer"])
    text_encoder = new_text_encoder(architecture["text_encoder"], words=vocabulary())
    if tensors:
        transformer.load_state_dict(without_prefix("transformer", tensors))
        _load_text_encoder(text_encoder, without_prefix("text_encoder", tensors))
    return transformer.to(device), text_encoder.to(device)


def _load_text_encoder(text_encoder: TextEncoder, tensors: dict[str, Tensor]) -> None:
    size = text_encoder.config.vocab_size
    if tensors["shared.weight"].shape[0] != size:
        raise UserError(
            f"The checkpoint knows {tensors['shared.weight'].shape[0]} words and the world has {size}: train it again."
        )
    text_encoder.load_state_dict(tensors, strict=False)


def _recipe(config: TransformerTrainingConfig) -> dict[str, Any]:
    recipe = asdict(replace(config, transformer={}, text_encoder={}))
    return {name: value for name, value in recipe.items() if name not in ("transformer", "text_encoder", "device")}


class TransformerTask:
    """Transformer and text encoder, the bank and the loss, as `loop.train` wants them."""

    def __init__(
        self,
        networks: tuple[Transformer, TextEncoder],
        config: TransformerTrainingConfig,
        *,
        bank: LatentBank,
        state: TrainingState,
        judge: tuple[WordTokenizer, Vae],
    ) -> None:
        self.transformer, self.text_encoder = networks
        self.config, self.bank, self._judge = config, bank, judge
        self.device = bank.latents.device
        self.parameters = [*self.transformer.parameters(), *self.text_encoder.parameters()]
        self.optimizers = new_optimizers(
            self.transformer, self.parameters, config.optimizer, rate=config.schedule.learning_rate
        )
        if config.compile:
            self.transformer.compile_repeated_blocks(dynamic=False)
        self.generator = seeded_generator(self.device, config.seed, state.round, state.round_step)
        self._draw = random.Random(f"{config.seed} {state.round} {state.round_step}")
        self.num_frames_per_step = config.batch_size * config.num_frames

    def loss(self, fraction: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted flow-matching loss of a random batch, and the plain one for the records."""
        config, generator = self.config, self.generator
        latents, weight, tokens = self._batch()
        tokens = drop_words(tokens, captions=config.caption_dropout, words=config.word_dropout, generator=generator)
        length = config.long_text if self._draw.random() < config.long_text_share else config.text
        embeddings = prompt_embeddings(self.text_encoder, tokens, length=length)
        sigmas = draw_sigmas(len(latents), generator)
        noise = torch.randn(latents.shape, device=self.device, generator=generator)
        with autocast(self.device):
            velocity = self.transformer(
                noisy_latents(latents, noise, sigmas), timesteps_of(sigmas), embeddings, return_dict=False
            )[0]
        squared = (velocity.float() - (noise - latents)).square()
        return (squared * weight).mean(), {"flow_loss": squared.detach().mean()}

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, weights of their cells and tokens of one wording each."""
        bank, size = self.bank, self.config.batch_size
        clip = torch.randint(len(bank.latents), (size,), device=self.device, generator=self.generator)
        wording = torch.randint(bank.tokens.shape[1], (size,), device=self.device, generator=self.generator)
        weight = 1 + self.config.subject_weight * bank.coverage[clip].float()[:, None]
        return bank.latents[clip].float(), weight / weight.mean(), bank.tokens[clip, wording]

    def validate(self) -> dict[str, float]:
        """Share of attributes of unseen prompts that the oracle reads from generated clips."""
        tokenizer, vae = self._judge
        if self.config.validation_prompts == 0:
            return {}
        return oracle_score(
            self.transformer,
            self.text_encoder,
            tokenizer,
            vae,
            num_prompts=self.config.validation_prompts,
            shape=self.bank.latents.shape[1:],
            num_inference_steps=self.config.validation_steps,
            guidance_scale=self.config.guidance_scale,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The weights of both networks; the text encoder's embedding table once."""
        text = {name: tensor for name, tensor in self.text_encoder.state_dict().items() if "embed_tokens" not in name}
        return with_prefix("transformer", self.transformer.state_dict()) | with_prefix("text_encoder", text)


def new_optimizers(
    transformer: Transformer, parameters: list[nn.Parameter], kind: str, *, rate: float
) -> list[torch.optim.Optimizer]:
    """AdamW for `parameters`, but with the kind "muon" Muon for the matrices in the transformer's blocks."""
    matrices, others = split_parameters(transformer, parameters) if kind == "muon" else ([], parameters)
    on_gpu = parameters[0].device.type == "cuda"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu)
    ]
    return [*optimizers, BatchedMuon(matrices, lr=rate)] if matrices else optimizers

"""Tiny random Wan pipelines for the tests: every form diffusers has, on a CPU, in milliseconds, without a download.

The weights are random, so only mechanics can be tested with them, never quality. Pipelines built here have no text
encoder (pass `prompt_embeds`, see `call_arguments`); `save_tiny_wan` writes a complete folder that has one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline

from vidaccel.models.causal_wan import CausalWanTransformer3DModel

FPS = 16  # of saved students
LATENT_CHANNELS = 16
TEXT_DIM = 16
TEXT_LENGTH = 6
HEIGHT = WIDTH = 32
NUM_FRAMES = 9
WORDS = ("a", "and", "blue", "circle", "green", "left", "moves", "on", "red", "right", "sky", "square", "the", "to")


def tiny_transformer(*, seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """A random 2-layer Wan transformer, (B, 16, F, H, W) in and out unless `changes` say otherwise."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(**(_transformer_config() | changes)).eval()


def tiny_vace_transformer(*, seed: int = 0) -> WanVACETransformer3DModel:
    torch.manual_seed(seed)
    config = _transformer_config() | {"vace_layers": [0], "vace_in_channels": 96}
    return WanVACETransformer3DModel(**config).eval()


def tiny_vae(*, seed: int = 0, z_dim: int = LATENT_CHANNELS) -> AutoencoderKLWan:
    """A random causal VAE with Wan2.1's strides: 4 in time, 8 in space."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
    ).eval()


def tiny_scheduler(name: str = "unipc", *, shift: float = 3.0) -> Any:
    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "stochastic":
        return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    raise ValueError(f"`name` must be one of unipc, euler, stochastic; got {name!r}.")


def tiny_wan_t2v(*, seed: int = 0, scheduler: str = "unipc") -> WanPipeline:
    return _quiet(WanPipeline(transformer=tiny_transformer(seed=seed), **_shared_components(scheduler)))


def tiny_wan_i2v(*, seed: int = 0) -> WanImageToVideoPipeline:
    """Wan2.1 image to video: 36 channels in (16 latents, 4 mask, 16 condition), 16 out."""
    transformer = tiny_transformer(seed=seed, in_channels=36, out_channels=LATENT_CHANNELS)
    return _quiet(WanImageToVideoPipeline(transformer=transformer, **_shared_components()))


def tiny_wan_v2v(*, seed: int = 0) -> WanVideoToVideoPipeline:
    """The pipeline that gives its transformer no cache context at all."""
    return _quiet(WanVideoToVideoPipeline(transformer=tiny_transformer(seed=seed), **_shared_components()))


def tiny_wan_vace(*, seed: int = 0) -> WanVACEPipeline:
    return _quiet(WanVACEPipeline(transformer=tiny_vace_transformer(seed=seed), **_shared_components()))


def tiny_wan_two_experts(*, seed: int = 0, boundary_ratio: float = 0.875) -> WanPipeline:
    """Wan2.2 A14B: one transformer for the noisy steps, another for the rest."""
    pipe = WanPipeline(
        transformer=tiny_transformer(seed=seed),
        transformer_2=tiny_transformer(seed=seed + 1),
        boundary_ratio=boundary_ratio,
        **_shared_components(),
    )
    return _quiet(pipe)


def tiny_wan_5b(*, seed: int = 0) -> WanPipeline:
    """Wan2.2 TI2V-5B: 48 channels and one timestep per token."""
    transformer = tiny_transformer(seed=seed, in_channels=48, out_channels=48)
    components = _shared_components() | {"vae": tiny_vae(z_dim=48)}
    return _quiet(WanPipeline(transformer=transformer, expand_timesteps=True, **components))


TINY_PIPELINES = {
    "t2v": tiny_wan_t2v,
    "i2v": tiny_wan_i2v,
    "v2v": tiny_wan_v2v,
    "vace": tiny_wan_vace,
    "two_experts": tiny_wan_two_experts,
    "5b": tiny_wan_5b,
}


def call_arguments(pipe: Any, *, seed: int = 0, batch: int = 1, **changes: Any) -> dict[str, Any]:
    """Arguments of one seeded call of any pipeline of this file; the result is `.frames`, latents as a tensor."""
    generator = torch.Generator().manual_seed(1000 + seed)
    arguments: dict[str, Any] = {
        "prompt_embeds": torch.randn(batch, TEXT_LENGTH, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.randn(batch, TEXT_LENGTH, TEXT_DIM, generator=generator),
        "generator": torch.Generator().manual_seed(seed),
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 20,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }
    if isinstance(pipe, WanVideoToVideoPipeline):
        num_latent_frames = (changes.pop("num_frames", NUM_FRAMES) - 1) // 4 + 1
        size = (changes.get("height", HEIGHT) // 8, changes.get("width", WIDTH) // 8)
        shape = (batch, LATENT_CHANNELS, num_latent_frames, *size)
        arguments["latents"] = torch.randn(shape, generator=generator)
    else:
        arguments["num_frames"] = NUM_FRAMES
    if isinstance(pipe, WanImageToVideoPipeline):
        size = (changes.get("height", HEIGHT), changes.get("width", WIDTH))
        arguments["image"] = torch.rand(1, 3, *size, generator=generator)
    return arguments | changes


def tiny_student(wan_folder: Path, *, camera_dim: int | None = None) -> ContextForcingWanPipeline:
    """A random causal student with the VAE and the text encoder of `save_tiny_wan`.

    camera_dim: of one that is told of its camera and remembers frames that were encoded alone.
    """
    parts = WanPipeline.from_pretrained(wan_folder).components
    changes: dict[str, Any] = {} if camera_dim is None else {"camera_dim": camera_dim, "clean_pass": "frame"}
    transformer = CausalWanTransformer3DModel.from_config({**tiny_transformer().config, **changes})
    transformer.load_state_dict(tiny_transformer(seed=1).state_dict(), strict=camera_dim is None)
    if camera_dim is not None:
        generator = torch.Generator().manual_seed(1)
        for parameter in transformer.camera_embedder.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return ContextForcingWanPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        scheduler=tiny_scheduler("stochastic"),
        transformer=transformer,
        memory="slow-fast:3+3+6",
        num_inference_steps=2,
    )


def save_student(pipe: ContextForcingWanPipeline, folder: Path, *, height: int, width: int) -> Path:
    """Write a student to `folder` with the defaults that `vidaccel` reads beside it."""
    pipe.save_pretrained(folder)
    defaults = {"height": height, "width": width, "fps": FPS, "max_sequence_length": 16}
    (folder / "vidaccel.json").write_text(json.dumps({"defaults": defaults}))
    return folder


def save_tiny_wan(folder: str | Path, *, seed: int = 0, vocabulary: Sequence[str] = WORDS) -> Path:
    """Write a complete random `WanPipeline` (with text encoder and tokenizer) that `from_pretrained(folder)` loads."""
    folder = Path(folder)
    pipe = WanPipeline(
        transformer=tiny_transformer(seed=seed),
        tokenizer=tiny_tokenizer(vocabulary),
        text_encoder=tiny_text_encoder(seed=seed, vocabulary_size=len(vocabulary) + 3),
        vae=tiny_vae(seed=seed),
        scheduler=tiny_scheduler(),
    )
    pipe.save_pretrained(folder)
    return folder


def tiny_text_encoder(*, seed: int = 0, vocabulary_size: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config).eval()


def tiny_tokenizer(vocabulary: Sequence[str] = WORDS) -> Any:
    """One token per lower-case word; ids 0, 1, 2 are `<pad>`, `</s>` and `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def _transformer_config() -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }


def _shared_components(scheduler: str = "unipc") -> dict[str, Any]:
    return {"tokenizer": None, "text_encoder": None, "vae": tiny_vae(), "scheduler": tiny_scheduler(scheduler)}


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""Tiny random HunyuanVideo pipelines for the tests, without text encoders: pass embeddings, see `hunyuan_arguments`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

LATENT_CHANNELS = 4
TEXT_DIM = 16
POOLED_DIM = 8
TEXT_LENGTH = 6
SIZE = 16
NUM_FRAMES = 9


def tiny_hunyuan_t2v(*, seed: int = 0) -> HunyuanVideoPipeline:
    """Guidance-distilled text to video: one pass a step, two with `true_cfg_scale`."""
    transformer = _transformer(seed, in_channels=LATENT_CHANNELS, guidance_embeds=True)
    return _quiet(HunyuanVideoPipeline(transformer=transformer, **_shared_components()))


def tiny_hunyuan_i2v(*, seed: int = 0) -> HunyuanVideoImageToVideoPipeline:
    """Image to video by concatenated latents: latents, image latents and mask go in."""
    transformer = _transformer(
        seed, in_channels=2 * LATENT_CHANNELS + 1, guidance_embeds=False, image_condition_type="latent_concat"
    )
    components = _shared_components() | {"image_processor": None}
    return _quiet(HunyuanVideoImageToVideoPipeline(transformer=transformer, **components))


def hunyuan_arguments(pipe: Any, *, seed: int = 0, batch: int = 1, **changes: Any) -> dict[str, Any]:
    """Arguments of one seeded call, with both branches; the result is `.frames`, latents as a tensor."""
    generator = torch.Generator().manual_seed(1000 + seed)
    arguments: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(seed),
        "height": SIZE,
        "width": SIZE,
        "num_frames": NUM_FRAMES,
        "num_inference_steps": 20,
        "true_cfg_scale": 3.0,
        "output_type": "latent",
    }
    for prefix in ("", "negative_"):
        arguments |= {
            f"{prefix}prompt_embeds": torch.randn(batch, TEXT_LENGTH, TEXT_DIM, generator=generator),
            f"{prefix}pooled_prompt_embeds": torch.randn(batch, POOLED_DIM, generator=generator),
            f"{prefix}prompt_attention_mask": torch.ones(batch, TEXT_LENGTH),
        }
    if isinstance(pipe, HunyuanVideoImageToVideoPipeline):
        arguments["image"] = torch.rand(batch, 3, SIZE, SIZE, generator=generator)
    return arguments | changes


def _transformer(seed: int, **changes: Any) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(seed)
    return HunyuanVideoTransformer3DModel(
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(2, 4, 4),
        **changes,
    ).eval()


def _shared_components() -> dict[str, Any]:
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return {"vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0), **encoders}


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe

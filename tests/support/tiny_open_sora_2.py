"""A tiny random Open-Sora 2.0 with both text encoders and tokenizers, made without a download."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from vidaccel.pipelines.open_sora_2 import OpenSora2Pipeline

from tests.support.tiny_models import WORDS, tiny_tokenizer

TEXT_DIM, POOLED_DIM, LATENT_CHANNELS, HEAD_DIM = 16, 8, 16, 32
VOCABULARY = len(WORDS) + 3
SIZES: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "max_sequence_length": 12}


def tiny_flux(**changes: Any) -> FluxTransformer2DModel:
    config = {
        "in_channels": 2 * 4 * LATENT_CHANNELS + 4,
        "out_channels": 4 * LATENT_CHANNELS,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": 1,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED_DIM,
        "axes_dims_rope": (4, 14, 14),
    }
    torch.manual_seed(0)
    return FluxTransformer2DModel(**(config | changes)).eval()


def tiny_hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


def tiny_t5() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def tiny_clip() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=POOLED_DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return CLIPTextModel(config).eval()


def tiny_open_sora_2() -> OpenSora2Pipeline:
    pipe = OpenSora2Pipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_clip(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_2=tiny_t5(),
        vae=tiny_hunyuan_vae(),
        transformer=tiny_flux(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe

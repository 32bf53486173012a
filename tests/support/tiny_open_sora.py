"""A complete tiny random Open-Sora 1.2 for the tests, and a short seeded call of it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from vidaccel.pipelines.open_sora import OpenSoraPipeline

from tests.support.open_sora_fixtures import small_stdit3
from vidaccel.models.open_sora_vae import AutoencoderKLOpenSora
from vidaccel.random_models.tokenizers import t5_tokenizer

SMALL = {"height": 32, "width": 48, "num_frames": 17, "num_inference_steps": 3}
TEXT_SIZE = 32


def small_pipeline(*, seed: int = 0, transformer: Any = None) -> OpenSoraPipeline:
    """Random, complete with text encoder and tokenizer."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    text_config = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_SIZE, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_gated_act=True
    )
    vae = AutoencoderKLOpenSora(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=8,
        temporal_channels=(32, 32, 32, 32),
        temporal_res_blocks=1,
    )
    pipe = OpenSoraPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text_config).eval(),
        vae=vae.eval(),
        transformer=transformer or small_stdit3(hidden_size=32, num_heads=2, model_max_length=64),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, *, seed: int = 0, **changes: Any) -> Any:
    arguments: dict[str, Any] = {**SMALL, "prompt": "A calm sea.", "output_type": "latent", "max_sequence_length": 48}
    arguments["generator"] = torch.Generator().manual_seed(seed)
    return pipe(**(arguments | changes)).frames

"""A tiny untrained Wan pipeline that knows the words of the world, and a bank of trips whose latents are noise."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanPipeline

from vidaccel import world
from vidaccel.training.architecture import (
    TEXT_ENCODER_ARCHITECTURE,
    TRANSFORMER_ARCHITECTURE,
    VAE_ARCHITECTURE,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    new_vae,
)
from vidaccel.training.latents import caption_tokens
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank, clip_caption, trip_bank
from vidaccel.world.trip import latent_cameras
from vidaccel.world.trips import random_trip

_TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 3, "freq_dim": 32}
_TEXT = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}


def save_tiny_donor(folder: Path) -> str:
    """Write the pipeline to `folder`; its transformer has three layers."""
    torch.manual_seed(0)
    vae = new_vae({**VAE_ARCHITECTURE, "base_dim": 4, "dim_mult": [1, 1, 2, 2]})
    vae.register_to_config(latents_mean=[0.1] * 16, latents_std=[0.5] * 16)
    WanPipeline(
        tokenizer=new_tokenizer(world.vocabulary()),
        text_encoder=new_text_encoder({**TEXT_ENCODER_ARCHITECTURE, **_TEXT}, words=world.vocabulary()),
        vae=vae,
        scheduler=new_scheduler(),
        transformer=new_transformer({**TRANSFORMER_ARCHITECTURE, **_TRANSFORMER, "text_dim": 16}),
    ).save_pretrained(folder)
    return str(folder)


def noise_bank(*, num_clips: int = 4, num_chunks: int = 7, side: int = 4) -> TripBank:
    """A bank of trips whose latents are noise, with the cameras and captions of the trips."""
    clips = [random_trip(seed, num_chunks=num_chunks) for seed in range(num_clips)]
    draw = torch.Generator().manual_seed(1)
    shape = (num_clips, num_chunks * CHUNK_FRAMES)
    cameras = torch.tensor([latent_cameras(clip) for clip in clips], dtype=torch.float32) / 16
    texts = [clip_caption(clip, chunk) for clip in clips for chunk in range(num_chunks)]
    tensors = {
        "latents": torch.randn(*shape, 16, side, side, generator=draw).half(),
        "columns": cameras[:, 0],
        "motions": cameras[:, 1],
        "tokens": caption_tokens(new_tokenizer(world.vocabulary()), texts).view(num_clips, num_chunks, -1),
        "coverage": torch.rand(*shape, side, side, generator=draw).half(),
        "landmarks": torch.rand(*shape, side, side, generator=draw).half(),
    }
    return trip_bank(tensors, clips)

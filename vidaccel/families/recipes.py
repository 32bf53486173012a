"""Tiny versions of the parts that many families share: text and image encoders, VAEs, schedulers.

Each is a `Component`, so a row of data; a function where families need different sizes.
"""

from typing import Any

from vidaccel.families.family import Component

TEXT_DIM = 16
_TOKENIZERS = "vidaccel.families.tokenizers"

T5_TOKENIZER = Component(kind=f"{_TOKENIZERS}:t5_tokenizer")
CLIP_TOKENIZER = Component(kind=f"{_TOKENIZERS}:clip_tokenizer")
GEMMA_TOKENIZER = Component(kind=f"{_TOKENIZERS}:gemma_tokenizer")
QWEN2_TOKENIZER = Component(kind=f"{_TOKENIZERS}:qwen2_tokenizer", config={"marks": ("<|vision_start|>",)})
BYT5_TOKENIZER = Component(kind=f"{_TOKENIZERS}:byt5_tokenizer")


def t5_encoder(model: str = "T5EncoderModel", **changes: Any) -> Component:
    """A T5 text encoder, hidden size 16; also `UMT5EncoderModel`. The vocabulary fits `T5_TOKENIZER` and ByT5's."""
    config = {
        "vocab_size": 512,
        "d_model": TEXT_DIM,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return Component(kind=f"transformers:{model}", config=config | changes)


UMT5_ENCODER = t5_encoder("UMT5EncoderModel")


def flow_euler(**changes: Any) -> Component:
    """The Euler scheduler of flow matching."""
    return Component(kind="diffusers:FlowMatchEulerDiscreteScheduler", config={"shift": 3.0} | changes)


def flow_unipc(**changes: Any) -> Component:
    """The second-order scheduler of Wan and SkyReels-V2."""
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return Component(kind="diffusers:UniPCMultistepScheduler", config=config | changes)


def wan_vae(z_dim: int = 16, **changes: Any) -> Component:
    """The causal VAE of Wan2.1 with its strides: 4 in time, 8 in space."""
    config = {
        "base_dim": 4,
        "z_dim": z_dim,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * z_dim,
        "latents_std": [1.0] * z_dim,
    }
    return Component(kind="diffusers:AutoencoderKLWan", config=config | changes)


def gemma3_encoder() -> Component:
    """The text side of Gemma 3, hidden size 16, two layers; its vocabulary fits `GEMMA_TOKENIZER`."""
    text = {
        "vocab_size": 512,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    config = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, "image_token_index": 511}
    return Component(kind="transformers:Gemma3ForConditionalGeneration", config=config)


def qwen25_vl_encoder() -> Component:
    """The text side of Qwen2.5-VL, hidden size 16, two layers; its vocabulary fits `QWEN2_TOKENIZER`."""
    text = {
        "vocab_size": 512,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_DIM}
    return Component(
        kind="transformers:Qwen2_5_VLForConditionalGeneration",
        config={"text_config": text, "vision_config": vision},
    )

"""The Open-Sora families: version 1.2 on STDiT3 and a VAE of this package, version 2.0 on parts of diffusers."""

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.families.recipes import CLIP_TOKENIZER, T5_TOKENIZER, TEXT_DIM, clip_text, flow_euler, t5_encoder

_CALL = {
    "num_frames": 17,
    "height": 32,
    "width": 32,
    "num_inference_steps": 12,
    "guidance_scale": 7.0,
    "max_sequence_length": 64,
}
_VERSION_1_2 = {
    "tokenizer": T5_TOKENIZER,
    "text_encoder": t5_encoder(),
    "scheduler": flow_euler(shift=1.0),  # the pipeline shifts by itself
    "transformer": Component(
        kind="vidaccel.models.stdit3:STDiT3",
        config={
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 2,
            "caption_channels": TEXT_DIM,
            "model_max_length": _CALL["max_sequence_length"],
        },
    ),
    "vae": Component(
        kind="vidaccel.models.open_sora_vae:AutoencoderKLOpenSora",
        config={
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "temporal_channels": (32, 32, 32, 32),  # normalised in 32 groups
            "temporal_res_blocks": 1,
        },
    ),
}

_LATENT_CHANNELS = 4
_CALL_2_0 = _CALL | {"num_frames": 9, "guidance_scale": 7.5}
_VERSION_2_0 = {
    "tokenizer": CLIP_TOKENIZER,
    "text_encoder": clip_text(),
    "tokenizer_2": T5_TOKENIZER,
    "text_encoder_2": t5_encoder(),
    "scheduler": flow_euler(use_dynamic_shifting=True, time_shift_type="linear"),
    "transformer": Component(
        kind="diffusers:FluxTransformer2DModel",
        config={
            "in_channels": 2 * 4 * _LATENT_CHANNELS + 4,  # latents and condition in squares of 2x2, and a mask
            "out_channels": 4 * _LATENT_CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT_DIM,
            "pooled_projection_dim": 8,  # of `clip_text`
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "vae": Component(
        kind="diffusers:AutoencoderKLHunyuanVideo",
        config={
            "latent_channels": _LATENT_CHANNELS,
            "block_out_channels": (4, 4, 4, 4),
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
}

OPEN_SORA_FAMILIES: tuple[Family, ...] = (
    Family(
        name="open-sora-1.2",
        description="Open-Sora 1.2 text to video",
        pipeline="vidaccel.pipelines.open_sora:OpenSoraPipeline",
        components=_VERSION_1_2,
        defaults=_CALL,
    ),
    Family(
        name="open-sora-1.2-i2v",
        description="Open-Sora 1.2 image to video: some frames given, the others made",
        pipeline="vidaccel.pipelines.open_sora:OpenSoraPipeline",
        components=_VERSION_1_2,
        inputs=("image",),
        defaults=_CALL,
    ),
    Family(
        name="open-sora-2",
        description="Open-Sora 2.0 text to video",
        pipeline="vidaccel.pipelines.open_sora_2:OpenSora2Pipeline",
        components=_VERSION_2_0,
        defaults=_CALL_2_0,
    ),
    Family(
        name="open-sora-2-i2v",
        description="Open-Sora 2.0 image to video",
        pipeline="vidaccel.pipelines.open_sora_2:OpenSora2Pipeline",
        components=_VERSION_2_0,
        inputs=("image",),
        defaults=_CALL_2_0,
    ),
)

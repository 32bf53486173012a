"""Families with one or two pipelines each: Mochi, Allegro, Latte, SANA-Video, Kandinsky 5, EasyAnimate, Motif-Video."""

from typing import Any

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.families.recipes import (
    CLIP_TOKENIZER,
    GEMMA_TOKENIZER,
    T5_TOKENIZER,
    TEXT_DIM,
    clip_text,
    flow_euler,
    gemma,
    qwen2_tokenizer,
    qwen2_vl,
    siglip_images,
    t5_encoder,
    wan_vae,
)

_CALL = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 12,
    "guidance_scale": 5.0,
    "max_sequence_length": 64,
}
_MOCHI = {
    "tokenizer": T5_TOKENIZER,
    "text_encoder": t5_encoder(),
    "scheduler": Component(kind="diffusers:FlowMatchEulerDiscreteScheduler", config={"invert_sigmas": True}),
    "transformer": Component(
        kind="diffusers:MochiTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 12,
            "text_embed_dim": TEXT_DIM,
            "time_embed_dim": 4,
            "max_sequence_length": _CALL["max_sequence_length"],
        },
    ),
    "vae": Component(
        kind="diffusers:AutoencoderKLMochi",
        config={
            "encoder_block_out_channels": (32, 32, 32, 32),  # normalised in 32 groups
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
        },
    ),
}

_ALLEGRO = {
    "tokenizer": T5_TOKENIZER,
    "text_encoder": t5_encoder(d_model=24),
    "scheduler": Component(kind="diffusers:DDIMScheduler", config={"clip_sample": False}),
    "transformer": Component(
        kind="diffusers:AllegroTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_width": 16,
            "sample_height": 16,
            "sample_frames": 6,
            "caption_channels": 24,
        },
    ),
    "vae": Component(
        kind="vidaccel.random_models.parts:tiled_allegro_vae",
        config={
            "block_out_channels": (4, 4, 4, 4),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "sample_size": 128,  # a tile: 24 frames, and more than the 120 pixels that neighbours share
        },
    ),
}

_LATTE = {
    "tokenizer": T5_TOKENIZER,
    "text_encoder": t5_encoder(),
    "scheduler": Component(kind="diffusers:DDIMScheduler", config={"clip_sample": False}),
    "transformer": Component(
        kind="diffusers:LatteTransformer3DModel",
        config={
            "sample_size": 4,
            "video_length": 4,
            "num_layers": 2,
            "patch_size": 2,
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "cross_attention_dim": 24,
            "caption_channels": TEXT_DIM,
            "in_channels": 4,
            "out_channels": 8,  # noise and its variance
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
    ),
    "vae": Component(
        kind="diffusers:AutoencoderKL",
        config={
            "block_out_channels": (8, 8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "latent_channels": 4,
            "norm_num_groups": 2,
        },
    ),
}

_SANA = {
    "tokenizer": GEMMA_TOKENIZER,
    "text_encoder": gemma(),
    "vae": wan_vae(),
    "transformer": Component(
        kind="diffusers:SanaVideoTransformer3DModel",
        config={
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": TEXT_DIM,
            "rope_max_seq_len": 32,
            "sample_size": 4,
        },
    ),
}
_SANA_CALL = _CALL | {"use_resolution_binning": False, "complex_human_instruction": []}

_KANDINSKY5 = {
    "tokenizer": qwen2_tokenizer(),  # of the processor, whose image half needs torchvision
    "text_encoder": qwen2_vl(),
    "tokenizer_2": CLIP_TOKENIZER,
    "text_encoder_2": clip_text(),
    "scheduler": flow_euler(shift=5.0),
    "transformer": Component(
        kind="diffusers:Kandinsky5Transformer3DModel",
        config={
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": TEXT_DIM,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 16,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (2, 2, 4),
            "visual_cond": True,
        },
    ),
    "vae": Component(
        kind="diffusers:AutoencoderKLHunyuanVideo",
        config={
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8, 8),
            "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
    ),
}
# The longest the pipelines take: with a token a byte the words they put before the prompt are long.
_KANDINSKY5_CALL = _CALL | {"max_sequence_length": 1024, "negative_prompt": "blurred"}

_KANDINSKY6_TRANSFORMER: dict[str, Any] = dict(_KANDINSKY5["transformer"].config) | {
    "in_audio_dim": 4,
    "out_audio_dim": 4,
    "visual_token_type_num_embeddings": 2,  # of a video, and of an image's own frame
}
_KANDINSKY6 = _KANDINSKY5 | {
    "transformer": Component(kind="diffusers:Kandinsky6Transformer3DModel", config=_KANDINSKY6_TRANSFORMER),
    "audio_vae": Component(
        kind="diffusers:MMAudioVAE",
        config={"mel_bins": 8, "latent_channels": 4, "hidden_channels": 8, "channel_multipliers": (1, 1, 1)},
    ),
    "vocoder": Component(
        kind="diffusers:MMAudioVocoder",
        config={
            "num_mels": 8,
            "upsample_initial_channel": 16,
            "upsample_rates": (4, 4),
            "upsample_kernel_sizes": (8, 8),
            "resblock_kernel_sizes": (3,),
            "resblock_dilation_sizes": ((1,),),
        },
    ),
}

_EASYANIMATE = {
    "tokenizer": qwen2_tokenizer(),
    "text_encoder": Component(
        kind="transformers:Qwen2VLForConditionalGeneration",
        config={
            "text_config": qwen2_vl().config["text_config"],
            "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": TEXT_DIM},
        },
    ),
    "scheduler": flow_euler(shift=5.0),
    "transformer": Component(
        kind="diffusers:EasyAnimateTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT_DIM,
            "num_layers": 2,
            "patch_size": 2,
            "sample_width": 4,
            "sample_height": 4,
        },
    ),
    "vae": Component(
        kind="diffusers:AutoencoderKLMagvit",
        config={
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8, 8),
            "down_block_types": ("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
            "up_block_types": ("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "spatial_group_norm": False,
        },
    ),
}


_NO_BLOCKS = "diffusers names no blocks of this transformer to compile"
_LATE_GUIDANCE = "a guider that begins late fails in diffusers, for want of the negative text"


def _motif(**changes: Any) -> dict[str, Component]:
    text = dict(gemma().config) | {"max_position_embeddings": 128, "dropout_rate": 0.0}
    vision = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    transformer = {
        "in_channels": 33,  # noisy latents, image latents, mask
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "num_single_layers": 1,
        "patch_size": 2,
        "text_embed_dim": TEXT_DIM,
        "rope_axes_dim": (4, 4, 4),
    }
    return {
        "tokenizer": GEMMA_TOKENIZER,
        "text_encoder": Component(
            kind="transformers:T5Gemma2Encoder", config={"text_config": text, "vision_config": vision}
        ),
        "feature_extractor": siglip_images(),
        "guider": Component(kind="diffusers:AdaptiveProjectedGuidance"),
        "scheduler": flow_euler(shift=7.0),
        "transformer": Component(kind="diffusers:MotifVideoTransformer3DModel", config=transformer | changes),
        "vae": wan_vae(),
    }


OTHER_FAMILIES: tuple[Family, ...] = (
    Family(
        name="mochi",
        description="Mochi 1 text to video",
        pipeline="diffusers:MochiPipeline",
        components=_MOCHI,
        defaults=_CALL | {"num_frames": 7},
        untested={"compile": _NO_BLOCKS},
    ),
    Family(
        name="allegro-t2v",
        description="Allegro text to video",
        pipeline="diffusers:AllegroPipeline",
        components=_ALLEGRO,
        # One tile: the VAE leaves black what no tile fits into.
        defaults=_CALL | {"num_frames": 24, "height": 128, "width": 128, "clean_caption": False},
        untested={"compile": _NO_BLOCKS},
    ),
    Family(
        name="latte",
        description="Latte text to video",
        pipeline="diffusers:LattePipeline",
        components=_LATTE,
        defaults=_CALL | {"num_frames": 4, "clean_caption": False},
        untested={"frames": "the transformer has positions for its own number of frames", "compile": _NO_BLOCKS},
    ),
    Family(
        name="sana-video-t2v",
        description="SANA-Video text to video",
        pipeline="diffusers:SanaVideoPipeline",
        components=_SANA
        | {
            "scheduler": Component(
                kind="diffusers:DPMSolverMultistepScheduler",
                config={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0},
            )
        },
        defaults=_SANA_CALL,
        untested={"compile": _NO_BLOCKS},
    ),
    Family(
        name="sana-video-i2v",
        description="SANA-Video image to video",
        pipeline="diffusers:SanaImageToVideoPipeline",
        components=_SANA | {"scheduler": flow_euler(shift=8.0)},
        inputs=("image",),
        defaults=_SANA_CALL,
        untested={"compile": _NO_BLOCKS},
    ),
    Family(
        name="kandinsky5-t2v",
        description="Kandinsky 5 text to video",
        pipeline="diffusers:Kandinsky5T2VPipeline",
        components=_KANDINSKY5,
        defaults=_KANDINSKY5_CALL,
    ),
    Family(
        name="kandinsky5-i2v",
        description="Kandinsky 5 image to video",
        pipeline="diffusers:Kandinsky5I2VPipeline",
        components=_KANDINSKY5,
        inputs=("image",),
        defaults=_KANDINSKY5_CALL | {"num_frames": 17},  # the first frame is made like the four after it
        untested={"batch": "the pipeline makes the first frames like those that follow in the whole batch"},
    ),
    Family(
        name="kandinsky6-t2v",
        description="Kandinsky 6 text to video with sound",
        pipeline="diffusers:Kandinsky6TI2VAPipeline",
        components=_KANDINSKY6,
        defaults=_KANDINSKY5_CALL,
    ),
    Family(
        name="kandinsky6-i2v",
        description="Kandinsky 6 image to video with sound",
        pipeline="diffusers:Kandinsky6TI2VAPipeline",
        components=_KANDINSKY6,
        inputs=("image",),
        defaults=_KANDINSKY5_CALL,
    ),
    Family(
        name="easyanimate-t2v",
        description="EasyAnimate 5.1 text to video",
        pipeline="diffusers:EasyAnimatePipeline",
        components=_EASYANIMATE,
        defaults=_CALL | {"negative_prompt": "blurred"},
        untested={
            "batch": "diffusers repeats the prompts of a batch once more, and the transformer fails",
            "compile": _NO_BLOCKS,
        },
    ),
    Family(
        name="motif-video-t2v",
        description="Motif-Video text to video",
        pipeline="diffusers:MotifVideoPipeline",
        components=_motif(),
        defaults=_CALL,
        untested={"switch": _LATE_GUIDANCE},
    ),
    Family(
        name="motif-video-i2v",
        description="Motif-Video image to video",
        pipeline="diffusers:MotifVideoImage2VideoPipeline",
        components=_motif(image_embed_dim=8),
        inputs=("image",),
        defaults=_CALL,
        untested={"batch": "the pipeline takes one image and fails with more prompts", "switch": _LATE_GUIDANCE},
    ),
)

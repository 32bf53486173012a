"""The Wan families, and those that share their VAE and text encoder: SkyReels-V2 and Lucy Edit."""

from typing import Any

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.families.recipes import (
    CLIP_PROCESSOR,
    T5_TOKENIZER,
    TEXT_DIM,
    UMT5_ENCODER,
    clip_images,
    clip_vision,
    flow_unipc,
    wan_vae,
)

_SHARED = {"tokenizer": T5_TOKENIZER, "text_encoder": UMT5_ENCODER, "vae": wan_vae(), "scheduler": flow_unipc()}
_IMAGES = {"image_encoder": clip_vision(), "image_processor": clip_images()}
_CALL = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 12,
    "guidance_scale": 5.0,
    "max_sequence_length": 64,
}
_IMAGE_TOKENS = 5  # of `clip_vision`


def _transformer(model: str = "WanTransformer3DModel", **changes: Any) -> Component:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return Component(kind=f"diffusers:{model}", config=config | changes)


# Image to video: the latents, a mask of 4 frames and the image's latents side by side.
_IMAGE_TRANSFORMER = _transformer(in_channels=36)
_IMAGE_TRANSFORMER_2_1 = _transformer(in_channels=36, image_dim=8, added_kv_proj_dim=24)
# Wan2.2 5B: the VAE first folds squares of 2x2 pixels into channels, 16 pixels a latent in all.
_5B = {
    "vae": wan_vae(48, in_channels=12, out_channels=12, is_residual=True, patch_size=2, scale_factor_spatial=16),
    "transformer": _transformer(in_channels=48, out_channels=48),
}
_5B_CALL = _CALL | {"height": 64, "width": 64}


_WAN: tuple[Family, ...] = (
    Family(
        name="wan2.1-t2v",
        description="Wan2.1 text to video",
        pipeline="diffusers:WanPipeline",
        components=_SHARED | {"transformer": _transformer()},
        defaults=_CALL,
    ),
    Family(
        name="wan2.1-i2v",
        description="Wan2.1 image to video",
        pipeline="diffusers:WanImageToVideoPipeline",
        components=_SHARED | _IMAGES | {"transformer": _IMAGE_TRANSFORMER_2_1},
        inputs=("image",),
        defaults=_CALL,
    ),
    Family(
        name="wan2.1-flf2v",
        description="Wan2.1 first and last frame to video",
        pipeline="diffusers:WanImageToVideoPipeline",
        components=_SHARED
        | _IMAGES
        | {
            "transformer": _transformer(
                in_channels=36, image_dim=8, added_kv_proj_dim=24, pos_embed_seq_len=2 * _IMAGE_TOKENS
            )
        },
        inputs=("image", "last_image"),
        defaults=_CALL,
    ),
    Family(
        name="wan2.1-v2v",
        description="Wan2.1 video to video",
        pipeline="diffusers:WanVideoToVideoPipeline",
        components=_SHARED | {"transformer": _transformer()},
        inputs=("video",),
        defaults=_CALL,
    ),
    Family(
        name="wan2.1-vace",
        description="Wan2.1 VACE: parts of a video from its other parts",
        pipeline="diffusers:WanVACEPipeline",
        components=_SHARED
        | {"transformer": _transformer("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=96)},
        inputs=("video", "mask"),
        defaults=_CALL,
        untested={"batch": "the pipeline takes one prompt"},
    ),
    Family(
        name="wan2.2-t2v",
        description="Wan2.2 A14B text to video, two experts",
        pipeline="diffusers:WanPipeline",
        components=_SHARED | {"transformer": _transformer(), "transformer_2": _transformer()},
        settings={"boundary_ratio": 0.875},
        defaults=_CALL,
    ),
    Family(
        name="wan2.2-i2v",
        description="Wan2.2 A14B image to video, two experts",
        pipeline="diffusers:WanImageToVideoPipeline",
        components=_SHARED | {"transformer": _IMAGE_TRANSFORMER, "transformer_2": _IMAGE_TRANSFORMER},
        settings={"boundary_ratio": 0.9},
        inputs=("image",),
        defaults=_CALL,
    ),
    Family(
        name="wan2.2-ti2v-5b-t2v",
        description="Wan2.2 5B text to video, one timestep a token",
        pipeline="diffusers:WanPipeline",
        components=_SHARED | _5B,
        settings={"expand_timesteps": True},
        defaults=_5B_CALL,
    ),
    Family(
        name="wan2.2-ti2v-5b-i2v",
        description="Wan2.2 5B image to video, one timestep a token, the first frame kept",
        pipeline="diffusers:WanImageToVideoPipeline",
        components=_SHARED | _5B,
        settings={"expand_timesteps": True},
        inputs=("image",),
        defaults=_5B_CALL,
    ),
    Family(
        name="wan2.2-animate",
        description="Wan2.2 Animate: a character moves as a video shows",
        pipeline="diffusers:WanAnimatePipeline",
        components=_SHARED
        | _IMAGES
        | {
            "transformer": _transformer(
                "WanAnimateTransformer3DModel",
                in_channels=36,
                latent_channels=16,
                image_dim=8,
                added_kv_proj_dim=24,
                motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16, "32": 16},
                motion_encoder_size=32,
                motion_style_dim=8,
                motion_dim=4,
                motion_encoder_dim=16,
                face_encoder_hidden_dim=16,
                face_encoder_num_heads=2,
                inject_face_latents_blocks=2,
            )
        },
        inputs=("image", "pose_video", "face_video"),
        defaults=_CALL | {"guidance_scale": 1.0, "segment_frame_length": 9},
    ),
    Family(
        name="lucy-edit",
        description="Lucy Edit: a video changed as a text says, on the Wan2.2 5B transformer",
        pipeline="diffusers:LucyEditPipeline",
        components=_SHARED | {"vae": _5B["vae"], "transformer": _transformer(in_channels=96, out_channels=48)},
        settings={"expand_timesteps": True},
        inputs=("video",),
        defaults=_5B_CALL,
    ),
)

_FORCING_BATCH = (
    "diffusers gives the transformer of diffusion forcing the timesteps of one video, and it fails with two"
)

_SKYREELS = _SHARED | {"transformer": _transformer("SkyReelsV2Transformer3DModel")}
_FORCING = _SHARED | {
    "scheduler": flow_unipc(flow_shift=8.0),
    "transformer": _transformer("SkyReelsV2Transformer3DModel", inject_sample_info=True),
}

_SKYREELS_V2: tuple[Family, ...] = (
    Family(
        name="skyreels-v2-t2v",
        description="SkyReels-V2 text to video",
        pipeline="diffusers:SkyReelsV2Pipeline",
        components=_SKYREELS,
        defaults=_CALL,
    ),
    Family(
        name="skyreels-v2-i2v",
        description="SkyReels-V2 image to video",
        pipeline="diffusers:SkyReelsV2ImageToVideoPipeline",
        components=_SHARED
        | {"image_encoder": clip_vision("CLIPVisionModelWithProjection"), "image_processor": CLIP_PROCESSOR}
        | {"transformer": _transformer("SkyReelsV2Transformer3DModel", in_channels=36, image_dim=8)},
        inputs=("image",),
        defaults=_CALL,
    ),
    Family(
        name="skyreels-v2-df-t2v",
        description="SkyReels-V2 diffusion forcing, text to video, all frames at one noise level",
        pipeline="diffusers:SkyReelsV2DiffusionForcingPipeline",
        components=_FORCING,
        defaults=_CALL,
        untested={"batch": _FORCING_BATCH},
    ),
    Family(
        name="skyreels-v2-df-t2v-async",
        description="SkyReels-V2 diffusion forcing, text to video, later frames follow later",
        pipeline="diffusers:SkyReelsV2DiffusionForcingPipeline",
        components=_FORCING,
        defaults=_CALL | {"ar_step": 2, "causal_block_size": 1},
        untested={"batch": _FORCING_BATCH},
    ),
    Family(
        name="skyreels-v2-df-i2v",
        description="SkyReels-V2 diffusion forcing, image to video",
        pipeline="diffusers:SkyReelsV2DiffusionForcingImageToVideoPipeline",
        components=_FORCING,
        inputs=("image",),
        defaults=_CALL,
        untested={"batch": _FORCING_BATCH},
    ),
    Family(
        name="skyreels-v2-df-v2v",
        description="SkyReels-V2 diffusion forcing, a video continued in sections",
        pipeline="diffusers:SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        components=_FORCING,
        inputs=("video",),
        defaults=_CALL | {"num_frames": 17, "base_num_frames": 13, "overlap_history": 5},
        untested={"batch": _FORCING_BATCH},
    ),
)

WAN_FAMILIES: tuple[Family, ...] = (*_WAN, *_SKYREELS_V2)

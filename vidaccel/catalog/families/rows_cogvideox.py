"""CogVideoX, and ConsisID which is built on it. Latents are (B, F, C, H, W)."""

from typing import Any

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.families.recipes import T5_TOKENIZER, TEXT_DIM, t5_encoder

_CALL = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 12,
    "guidance_scale": 6.0,
    "max_sequence_length": 64,
}
_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": _CALL["max_sequence_length"],
}


def _components(scheduler: str = "CogVideoXDDIMScheduler", **changes: Any) -> dict[str, Component]:
    return {
        "tokenizer": T5_TOKENIZER,
        "text_encoder": t5_encoder(),
        "scheduler": Component(kind=f"diffusers:{scheduler}"),
        "transformer": Component(kind="diffusers:CogVideoXTransformer3DModel", config=_TRANSFORMER | changes),
        "vae": Component(
            kind="diffusers:AutoencoderKLCogVideoX",
            config={
                "block_out_channels": (8, 8, 8, 8),
                "latent_channels": 4,
                "layers_per_block": 1,
                "norm_num_groups": 2,
            },
        ),
    }


_CONSISID = Component(
    kind="diffusers:ConsisIDTransformer3DModel",
    config=_TRANSFORMER | {"in_channels": 8, "use_rotary_positional_embeddings": True, "is_train_face": False},
)

_UNTESTED = {"compile": "diffusers names no blocks of this transformer to compile"}

COGVIDEOX_FAMILIES: tuple[Family, ...] = (
    Family(
        name="cogvideox-t2v",
        description="CogVideoX 2B text to video",
        pipeline="diffusers:CogVideoXPipeline",
        components=_components(),
        defaults=_CALL,
        untested=_UNTESTED,
    ),
    Family(
        name="cogvideox-t2v-5b",
        description="CogVideoX 5B text to video: rotary positions and the second-order scheduler",
        pipeline="diffusers:CogVideoXPipeline",
        components=_components("CogVideoXDPMScheduler", use_rotary_positional_embeddings=True),
        defaults=_CALL,
        untested=_UNTESTED,
    ),
    Family(
        name="cogvideox-i2v",
        description="CogVideoX image to video",
        pipeline="diffusers:CogVideoXImageToVideoPipeline",
        components=_components("CogVideoXDPMScheduler", use_rotary_positional_embeddings=True, in_channels=8),
        inputs=("image",),
        defaults=_CALL,
        untested=_UNTESTED,
    ),
    Family(
        name="cogvideox-v2v",
        description="CogVideoX video to video",
        pipeline="diffusers:CogVideoXVideoToVideoPipeline",
        components=_components("CogVideoXDPMScheduler", use_rotary_positional_embeddings=True),
        inputs=("video",),
        defaults=_CALL,
        untested=_UNTESTED,
    ),
    Family(
        name="cogvideox-control",
        description="CogVideoX Fun, guided by a control video",
        pipeline="diffusers:CogVideoXFunControlPipeline",
        components=_components(in_channels=8),
        inputs=("control_video",),
        defaults=_CALL,
        untested=_UNTESTED,
    ),
    Family(
        name="consisid",
        description="ConsisID image to video; without its face part, which models outside of diffusers feed",
        pipeline="diffusers:ConsisIDPipeline",
        components=_components("CogVideoXDPMScheduler") | {"transformer": _CONSISID},
        inputs=("image",),
        defaults=_CALL,
        untested=_UNTESTED,
    ),
)

"""The Wan families, and SkyReels-V2 which shares their VAE and text encoder."""

from typing import Any

from vidaccel.families.family import Component, Family
from vidaccel.families.recipes import T5_TOKENIZER, TEXT_DIM, UMT5_ENCODER, flow_unipc, wan_vae

_SHARED = {"tokenizer": T5_TOKENIZER, "text_encoder": UMT5_ENCODER, "vae": wan_vae(), "scheduler": flow_unipc()}
_CALL = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 12,
    "guidance_scale": 5.0,
    "max_sequence_length": 64,
}


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


WAN_FAMILIES: tuple[Family, ...] = (
    Family(
        name="wan2.1-t2v",
        description="Wan2.1 text to video",
        pipeline="diffusers:WanPipeline",
        components=_SHARED | {"transformer": _transformer()},
        defaults=_CALL,
    ),
)

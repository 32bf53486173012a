"""What is published of Open-Sora, and the pipelines it becomes: rows for the conversion.

Names of files and keys are facts of the published repositories `hpcai-tech/OpenSora-STDiT-v3`,
`hpcai-tech/OpenSora-VAE-v1.2` and `hpcai-tech/Open-Sora-v2`.
"""

from __future__ import annotations

from types import MappingProxyType

from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.convert.folder import Recipe
from vidaccel.convert.formats import Format
from vidaccel.convert.open_sora_2_map import TRANSFORMER_RULES

STDIT3 = Format(
    title="Open-Sora 1.2's transformer (OpenSora-STDiT-v3)",
    marks=("spatial_blocks.0.attn.qkv.", "temporal_blocks.0.", "fps_embedder."),
    foreign=("x_embedder_cond",),
    target="vidaccel.models.stdit3:STDiT3",
    says=("STDiT3",),
)
VAE_1_2 = Format(
    title="Open-Sora 1.2's VAE (OpenSora-VAE-v1.2)",
    marks=("spatial_vae.module.", "temporal_vae."),
    target="vidaccel.models.open_sora_vae:AutoencoderKLOpenSora",
    says=("VideoAutoencoderPipeline", "OpenSoraVAE_V1_2", "AutoencoderKLOpenSora"),
)
MMDIT_2 = Format(
    title="Open-Sora 2.0's transformer (Open_Sora_v2.safetensors)",
    marks=("double_blocks.0.img_attn.q_proj.", "single_blocks.0.v_mlp.", "cond_in."),
    target="diffusers:FluxTransformer2DModel",
    settings=MappingProxyType({"in_channels": 132, "out_channels": 64}),
    says=("FluxTransformer2DModel",),
    rules=TRANSFORMER_RULES,
)
HUNYUAN_VAE = Format(
    title="Open-Sora 2.0's VAE (hunyuan_vae.safetensors)",
    marks=("encoder.mid_block.attentions.0.to_q.", "decoder.up_blocks.0.resnets.0.conv1.conv.", "post_quant_conv."),
    target="diffusers:AutoencoderKLHunyuanVideo",
    says=("AutoencoderKLHunyuanVideo",),
)
T5_ENCODER = Format(
    title="the T5 text encoder",
    marks=("shared.", "encoder.block.0.layer.0.SelfAttention."),
    target="transformers:T5EncoderModel",
    dropped=("decoder.", "encoder.embed_tokens.", "lm_head."),
)
CLIP_TEXT = Format(
    title="the CLIP text encoder",
    marks=("embeddings.token_embedding.", "embeddings.position_embedding.", "encoder.layers.0.self_attn."),
    target="transformers:CLIPTextModel",
    prefix="text_model.",
    dropped=(
        "vision_model.",
        "visual_projection.",
        "text_projection.",
        "logit_scale",
        "text_model.embeddings.position_ids",
    ),
)
REFUSED = (
    Format(
        title="Open-Sora 1.3's transformer (OpenSora-STDiT-v4)",
        marks=("spatial_blocks.0.", "x_embedder_cond"),
        refusal="version 1.3 is another network; take OpenSora-STDiT-v3 (1.2) or Open-Sora-v2 (2.0)",
    ),
    Format(
        title="a transformer of Open-Sora 1.0 or 1.1",
        marks=("blocks.0.attn_temp.",),
        refusal="those versions are other networks; take OpenSora-STDiT-v3 (1.2) or Open-Sora-v2 (2.0)",
    ),
    Format(
        title="a transformer of FLUX.1",
        marks=("double_blocks.0.img_attn.qkv.",),
        refusal="it makes images; take Open_Sora_v2.safetensors",
    ),
)

VERSION_1_2 = Recipe(
    name="Open-Sora",
    version="1.2",
    pipeline="OpenSoraPipeline",
    parts=MappingProxyType({"transformer": STDIT3, "vae": VAE_1_2, "text_encoder": T5_ENCODER}),
    tokenizers=MappingProxyType({"tokenizer": "text_encoder"}),
    scheduler=MappingProxyType({}),
    defaults=GenerationDefaults(
        num_frames=51, height=480, width=854, fps=24, guidance_scale=7.0, num_inference_steps=30
    ),
)
VERSION_2_0 = Recipe(
    name="Open-Sora",
    version="2.0",
    pipeline="OpenSora2Pipeline",
    parts=MappingProxyType(
        {"transformer": MMDIT_2, "vae": HUNYUAN_VAE, "text_encoder": CLIP_TEXT, "text_encoder_2": T5_ENCODER}
    ),
    tokenizers=MappingProxyType({"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}),
    scheduler=MappingProxyType({"use_dynamic_shifting": True, "time_shift_type": "linear"}),
    defaults=GenerationDefaults(
        num_frames=129, height=192, width=336, fps=24, guidance_scale=7.5, num_inference_steps=50
    ),
)
RECIPES = (VERSION_1_2, VERSION_2_0)

"""How classes of transformers and pipelines differ: one row a class, no code a model.

A row holds for subclasses too, unless they have one of their own. A transformer without a row gets the common layout:
one tensor `hidden_states` in and out, channels in dimension 1 of (B, C, F, H, W) or the last one of (B, L, C). Its
batch is decided as a whole, since nothing says which of its other arguments follow the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

GUIDANCE_CONTEXT = "cond_uncond"  # how pipelines of diffusers name a call with both branches in one batch
USUAL_GUIDANCE = ("uncond", "cond")

AttentionMask = Literal["none", "keys", "pairs", "bias"]
FrameRule = Literal["first and groups", "groups", "own"]


@dataclass(frozen=True, kw_only=True)
class TransformerTraits:
    """One transformer class.

    streams: arguments that are denoised, in the order of the outputs; all of them decide together.
    channel_dim: dimension of the channels; None for 1, or the last one of a (B, L, C) tensor.
    holds_rest: the output has further channels behind the prediction (a learned variance) that no solver depends on;
        a reused step repeats them.
    unbatched: tensor arguments whose first dimension is not the batch.
    folded: tensor arguments that may have several rows for each of the batch, one after the other.
    nested: tuples and lists of tensors that follow the batch; tensors inside of others are the same for all rows.
    moving: arguments that change from step to step by themselves, so that they tell of no other condition.
    splits_batch: the arguments are known well enough to run some samples of a batch without the others.
    refusal: why its steps cannot be reused, or None.
    attention_mask: what its attention is given besides query, key and value: nothing (also FramePack, for one video at
        a time), a boolean for every key (B, 1, 1, L), for every pair (B, 1, L, L), or a number added (B, N, 1, L).
    """

    streams: tuple[str, ...] = ("hidden_states",)
    channel_dim: int | None = None
    holds_rest: bool = False
    unbatched: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()
    moving: tuple[str, ...] = ()
    splits_batch: bool = True
    refusal: str | None = None
    attention_mask: AttentionMask = "none"


@dataclass(frozen=True, kw_only=True)
class PipelineTraits:
    """One pipeline class: what no signature says about its call. The defaults are what most do.

    batched_guidance: the branches it puts into one batch, in order, where it does so without diffusers' name for it.
    several_loops: a call goes through its steps more than once: for every section, window or size.
    left_out_steps: how many steps at the end of its schedule it leaves out.
    fewest_steps: the smallest `num_inference_steps`; the schedule of fewer is undefined.
    frame_rule: latent frames are the first frame and equal groups of the others, equal groups alone, or the pipeline
        takes any number and makes whole sections of it.
    pads_patches: the transformer fills up its last patches, so that only the VAE's stride counts.
    needs_negative_prompt: guides against a negative prompt and has none of its own.
    output_type: how frames are asked for; "np" where tensors come back as the VAE leaves them, in [-1, 1].
    tiles_vae: the VAE decodes no other way than in tiles.
    vae_in_bfloat16: on a CPU that calculates in bfloat16 the VAE is better off in it, beside float32 for the rest.
    """

    batched_guidance: tuple[str, ...] = ()
    several_loops: bool = False
    left_out_steps: int = 0
    fewest_steps: int = 1
    frame_rule: FrameRule = "first and groups"
    pads_patches: bool = False
    needs_negative_prompt: bool = False
    output_type: Literal["pt", "np"] = "pt"
    tiles_vae: bool = False
    vae_in_bfloat16: bool = False


_FIRST_AND_LAST = ("encoder_hidden_states_image",)  # Wan's image embeddings of both frames
_PACKED_FRAMES = tuple(f"indices_latents{part}" for part in ("", "_clean", "_history_2x", "_history_4x"))
_HISTORY = ("indices_hidden_states", *(f"indices_latents_history_{part}" for part in ("short", "mid", "long")))

TRANSFORMERS: Mapping[str, TransformerTraits] = MappingProxyType(
    {
        "AllegroTransformer3DModel": TransformerTraits(),
        "AnyFlowTransformer3DModel": TransformerTraits(channel_dim=2, folded=_FIRST_AND_LAST, moving=("r_timestep",)),
        "ChronoEditTransformer3DModel": TransformerTraits(folded=_FIRST_AND_LAST),
        "CogVideoXTransformer3DModel": TransformerTraits(channel_dim=2),
        "ConsisIDTransformer3DModel": TransformerTraits(channel_dim=2, splits_batch=False),  # lists of face features
        "Cosmos3OmniTransformer": TransformerTraits(refusal="it denoises lists of vision, sound and action tokens"),
        "CosmosTransformer3DModel": TransformerTraits(
            unbatched=("padding_mask",), nested=("encoder_hidden_states", "block_controlnet_hidden_states")
        ),
        "EasyAnimateTransformer3DModel": TransformerTraits(),
        "FluxTransformer2DModel": TransformerTraits(unbatched=("img_ids", "txt_ids")),  # Open-Sora 2.0
        "HeliosTransformer3DModel": TransformerTraits(unbatched=_HISTORY),
        "HunyuanVideo15Transformer3DModel": TransformerTraits(attention_mask="pairs"),
        "HunyuanVideoFramepackTransformer3DModel": TransformerTraits(unbatched=_PACKED_FRAMES),
        "HunyuanVideoTransformer3DModel": TransformerTraits(attention_mask="keys"),
        "Kandinsky5Transformer3DModel": TransformerTraits(channel_dim=-1, unbatched=("text_rope_pos",)),
        "Kandinsky6Transformer3DModel": TransformerTraits(
            streams=("hidden_states", "audio_hidden_states"), channel_dim=-1
        ),
        "LTX2VideoTransformer3DModel": TransformerTraits(
            streams=("hidden_states", "audio_hidden_states"),
            moving=("audio_timestep", "sigma", "audio_sigma"),
            attention_mask="bias",
        ),
        "LTXVideoTransformer3DModel": TransformerTraits(unbatched=("rope_interpolation_scale",), attention_mask="bias"),
        "LatteTransformer3DModel": TransformerTraits(holds_rest=True),
        "MochiTransformer3DModel": TransformerTraits(),
        "MotifVideoTransformer3DModel": TransformerTraits(attention_mask="keys"),
        "STDiT3": TransformerTraits(holds_rest=True, attention_mask="keys"),  # Open-Sora 1.2
        "SanaVideoTransformer3DModel": TransformerTraits(attention_mask="bias"),
        "SkyReelsV2Transformer3DModel": TransformerTraits(folded=_FIRST_AND_LAST),
        "WanAnimateTransformer3DModel": TransformerTraits(folded=_FIRST_AND_LAST),
        "WanTransformer3DModel": TransformerTraits(folded=_FIRST_AND_LAST),
        "WanVACETransformer3DModel": TransformerTraits(
            unbatched=("control_hidden_states_scale",), folded=_FIRST_AND_LAST
        ),
    }
)

_EASY_ANIMATE = PipelineTraits(batched_guidance=USUAL_GUIDANCE, needs_negative_prompt=True)
_HELIOS = PipelineTraits(several_loops=True, frame_rule="own")
_OPEN_SORA = PipelineTraits(several_loops=True, frame_rule="own", pads_patches=True)
_BATCHED = PipelineTraits(batched_guidance=USUAL_GUIDANCE)
_SEVERAL_LOOPS = PipelineTraits(several_loops=True)
_WAN = PipelineTraits(vae_in_bfloat16=True)

PIPELINES: Mapping[str, PipelineTraits] = MappingProxyType(
    {
        "AllegroPipeline": PipelineTraits(batched_guidance=USUAL_GUIDANCE, frame_rule="groups", tiles_vae=True),
        "AnyFlowFARPipeline": _SEVERAL_LOOPS,
        "AnyFlowPipeline": _BATCHED,
        "ConsisIDPipeline": _BATCHED,
        "Cosmos2_5_TransferPipeline": _SEVERAL_LOOPS,
        "EasyAnimateControlPipeline": _EASY_ANIMATE,
        "EasyAnimateInpaintPipeline": _EASY_ANIMATE,
        "EasyAnimatePipeline": _EASY_ANIMATE,
        "HeliosModularPipeline": _SEVERAL_LOOPS,
        "HeliosPipeline": _HELIOS,
        "HeliosPyramidModularPipeline": _SEVERAL_LOOPS,
        "HeliosPyramidPipeline": _HELIOS,
        "HunyuanVideoFramepackPipeline": PipelineTraits(several_loops=True, frame_rule="own"),
        "Kandinsky6SRPipeline": _SEVERAL_LOOPS,
        "LTX2DFRPipeline": _SEVERAL_LOOPS,
        "LTX2DFRTemporalRefinePipeline": _SEVERAL_LOOPS,
        "LTXI2VLongMultiPromptPipeline": PipelineTraits(several_loops=True, left_out_steps=1, output_type="np"),
        "LattePipeline": _BATCHED,
        "MochiPipeline": PipelineTraits(fewest_steps=2),
        "OpenSora2Pipeline": _OPEN_SORA,
        "OpenSoraPipeline": _OPEN_SORA,
        "SanaImageToVideoPipeline": _BATCHED,
        "SanaVideoPipeline": _BATCHED,
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": _SEVERAL_LOOPS,
        "SkyReelsV2DiffusionForcingPipeline": _SEVERAL_LOOPS,
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _SEVERAL_LOOPS,
        "WanAnimatePipeline": PipelineTraits(several_loops=True, frame_rule="own", vae_in_bfloat16=True),
        "WanImageToVideoPipeline": _WAN,
        "WanPipeline": _WAN,
        "WanVACEPipeline": _WAN,
        "WanVideoToVideoPipeline": _WAN,
    }
)

"""How transformers differ where step reuse touches them: one row a class, no code a model.

A transformer without a row gets the common layout: one tensor `hidden_states` in and out, channels in dimension 1 of
(B, C, F, H, W) or the last one of (B, L, C). Its batch is decided as a whole, since nothing says which of its other
arguments follow the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

Row = TypeVar("Row")
GUIDANCE_CONTEXT = "cond_uncond"  # how pipelines of diffusers name a call with both branches in one batch


@dataclass(frozen=True, kw_only=True)
class Traits:
    """One transformer class.

    streams: arguments that are denoised, in the order of the outputs; all of them decide together.
    channel_dim: dimension of the channels; None for 1, or the last one of a (B, L, C) tensor.
    holds_rest: the output has further channels behind the prediction (a learned variance) that no solver depends on;
        a reused step repeats them.
    unbatched: tensor arguments whose first dimension is not the batch.
    folded: tensor arguments that may have several rows for each of the batch, one after the other.
    nested: tuples and lists of tensors that follow the batch; tensors inside of others are the same for all rows.
    splits_batch: the arguments are known well enough to run some samples of a batch without the others.
    refusal: why its steps cannot be reused, or None.
    """

    streams: tuple[str, ...] = ("hidden_states",)
    channel_dim: int | None = None
    holds_rest: bool = False
    unbatched: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()
    splits_batch: bool = True
    refusal: str | None = None


UNKNOWN = Traits(splits_batch=False)
_FIRST_AND_LAST = ("encoder_hidden_states_image",)  # Wan's image embeddings of both frames
_PACKED_FRAMES = tuple(f"indices_latents{part}" for part in ("", "_clean", "_history_2x", "_history_4x"))
_HISTORY = ("indices_hidden_states", *(f"indices_latents_history_{part}" for part in ("short", "mid", "long")))

TRAITS: Mapping[str, Traits] = MappingProxyType(
    {
        "AllegroTransformer3DModel": Traits(),
        "AnyFlowTransformer3DModel": Traits(channel_dim=2, folded=_FIRST_AND_LAST),
        "ChronoEditTransformer3DModel": Traits(folded=_FIRST_AND_LAST),
        "CogVideoXTransformer3DModel": Traits(channel_dim=2),
        "ConsisIDTransformer3DModel": Traits(channel_dim=2, splits_batch=False),  # lists of face features
        "Cosmos3OmniTransformer": Traits(refusal="it denoises lists of vision, sound and action tokens"),
        "CosmosTransformer3DModel": Traits(
            unbatched=("padding_mask",), nested=("encoder_hidden_states", "block_controlnet_hidden_states")
        ),
        "EasyAnimateTransformer3DModel": Traits(),
        "FluxTransformer2DModel": Traits(unbatched=("img_ids", "txt_ids")),  # Open-Sora 2.0
        "HeliosTransformer3DModel": Traits(unbatched=_HISTORY),
        "HunyuanVideo15Transformer3DModel": Traits(),
        "HunyuanVideoFramepackTransformer3DModel": Traits(unbatched=_PACKED_FRAMES),
        "HunyuanVideoTransformer3DModel": Traits(),
        "Kandinsky5Transformer3DModel": Traits(channel_dim=-1, unbatched=("text_rope_pos",)),
        "Kandinsky6Transformer3DModel": Traits(streams=("hidden_states", "audio_hidden_states"), channel_dim=-1),
        "LTX2VideoTransformer3DModel": Traits(streams=("hidden_states", "audio_hidden_states")),
        "LTXVideoTransformer3DModel": Traits(unbatched=("rope_interpolation_scale",)),
        "LatteTransformer3DModel": Traits(holds_rest=True),
        "MochiTransformer3DModel": Traits(),
        "MotifVideoTransformer3DModel": Traits(),
        "STDiT3": Traits(holds_rest=True),  # Open-Sora 1.2
        "SanaVideoTransformer3DModel": Traits(),
        "SkyReelsV2Transformer3DModel": Traits(folded=_FIRST_AND_LAST),
        "WanAnimateTransformer3DModel": Traits(folded=_FIRST_AND_LAST),
        "WanTransformer3DModel": Traits(folded=_FIRST_AND_LAST),
        "WanVACETransformer3DModel": Traits(unbatched=("control_hidden_states_scale",), folded=_FIRST_AND_LAST),
    }
)

_USUAL = ("uncond", "cond")

# Pipelines that put both branches into one batch without diffusers' name for it.
BATCHED_GUIDANCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "AllegroPipeline": _USUAL,
        "AnyFlowPipeline": _USUAL,
        "ConsisIDPipeline": _USUAL,
        "EasyAnimatePipeline": _USUAL,
        "EasyAnimateControlPipeline": _USUAL,
        "EasyAnimateInpaintPipeline": _USUAL,
        "LattePipeline": _USUAL,
        "SanaImageToVideoPipeline": _USUAL,
        "SanaVideoPipeline": _USUAL,
    }
)

# Pipelines that end their loops before the end of the schedule: how many steps they leave out.
_LEFT_OUT_STEPS: Mapping[str, int] = MappingProxyType({"LTXI2VLongMultiPromptPipeline": 1})


def left_out_steps_of(pipe: Any) -> int:
    """How many steps at the end of its schedule a pipeline leaves out."""
    return _row_of(pipe, _LEFT_OUT_STEPS, 0)


# Pipelines of diffusers whose call goes through its steps more than once: for every section, window or size.
SEVERAL_LOOPS = frozenset(
    {
        "AnyFlowFARPipeline",
        "Cosmos2_5_TransferPipeline",
        "HeliosPipeline",
        "HeliosPyramidPipeline",
        "HunyuanVideoFramepackPipeline",
        "Kandinsky6SRPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
        "LTXI2VLongMultiPromptPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        "WanAnimatePipeline",
    }
)


def has_several_loops(pipe: Any) -> bool:
    """Whether a call may go through its steps more than once: true of those above and of calls not from diffusers."""
    caller = next((kind for kind in type(pipe).__mro__ if "__call__" in vars(kind)), type(pipe))
    return caller.__name__ in SEVERAL_LOOPS or not caller.__module__.startswith("diffusers.pipelines.")


def batched_guidance_of(pipe: Any, *, is_named: bool) -> tuple[str, ...]:
    """The branches that a pipeline puts into one batch, in order; empty if it calls the model for each on its own.

    What the pipeline says itself (`batched_guidance`) comes first, then its row. `is_named`: the call is marked with
    diffusers' name for both branches in one batch, where all pipelines of diffusers put the unconditional one first.
    """
    own = getattr(pipe, "batched_guidance", None)
    if own is not None:
        return tuple(own)
    return _row_of(pipe, BATCHED_GUIDANCE, _USUAL if is_named else ())


def traits_of(transformer: Any) -> Traits:
    """The row of a transformer's class or of the nearest base class that has one, else `UNKNOWN`."""
    return _row_of(transformer, TRAITS, UNKNOWN)


def _row_of(owner: Any, table: Mapping[str, Row], otherwise: Row) -> Row:
    """The row of the class of `owner` or of its nearest base class that has one."""
    names = (kind.__name__ for kind in type(owner).__mro__)
    return next((table[name] for name in names if name in table), otherwise)

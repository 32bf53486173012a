"""Names and sizes of Wan's own transformer, as causal students keep them, for diffusers' `WanTransformer3DModel`.

The names are facts of the published model (Wan2.1 and its causal forms have the same); every size is read from the
shapes of the tensors. What no shape tells is the number of heads, see `measured_settings`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from vidaccel.convert.checkpoint import Checkpoint
from vidaccel.convert.formats import Config, Format, Rule
from vidaccel.errors import UserError

_BLOCKS = "num_layers"
_SAYS = ("WanModel", "CausalWanModel", "WanTransformer3DModel", "CausalWanTransformer3DModel")
_HEAD_DIM = 128  # of every published Wan transformer
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_ATTENTION = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
_INSIDE = {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}  # the norm before cross-attention
_SIZES = ("patch_embedding.weight", "head.head.weight", "text_embedding.0.weight", "time_embedding.0.weight")
_FEED_FORWARD = "blocks.0.ffn.0.weight"


def _rules() -> Iterator[Rule]:
    for old, new in _OUTSIDE.items():
        yield Rule(f"{new}.{{part}}", f"{old}.{{part}}")
    yield Rule("scale_shift_table", "head.modulation")
    yield Rule("blocks.{block}.scale_shift_table", "blocks.{block}.modulation", blocks=_BLOCKS)
    for old, new in _INSIDE.items():
        yield Rule(f"blocks.{{block}}.{new}.{{part}}", f"blocks.{{block}}.{old}.{{part}}", blocks=_BLOCKS)
    for old, new in _ATTENTION.items():
        at, to = f"blocks.{{block}}.{old}", f"blocks.{{block}}.{new}"
        for part, name in _PROJECTIONS.items():
            yield Rule(f"{to}.{name}.{{part}}", f"{at}.{part}.{{part}}", blocks=_BLOCKS)
        for name in ("norm_q", "norm_k"):
            yield Rule(f"{to}.{name}.weight", f"{at}.{name}.weight", blocks=_BLOCKS)


def measured_settings(checkpoint: Checkpoint, settings: Config) -> Config:
    """The settings of `WanTransformer3DModel` that the shapes tell: sizes, channels, patches, blocks.

    Heads: `num_heads` or `num_attention_heads` of a `config.json` beside the weights, else heads of
    `attention_head_dim` channels of `settings`, else of 128 as in every published Wan transformer. `num_layers` of
    such a file or of `settings` comes before the number of blocks that are there, so that a missing block is seen.
    Raises `UserError` for shapes that are none of such a transformer.
    """
    shapes = {name: checkpoint.tensors[name].shape for name in (*_SIZES, _FEED_FORWARD) if name in checkpoint.tensors}
    absent = [name for name in (*_SIZES, _FEED_FORWARD) if name not in shapes]
    if absent:
        raise UserError(f"{checkpoint.path} lacks {absent[0]}; it is incomplete or of another model.")
    for name, shape in shapes.items():
        if len(shape) != (5 if name == _SIZES[0] else 2) or 0 in shape:
            raise UserError(f"{checkpoint.path} has {name} {list(shape)}, which is none of a Wan transformer.")
    width, in_channels, *patch = shapes[_SIZES[0]]
    heads, head_dim = _heads(checkpoint, settings, width)
    blocks = [int(found[1]) for name in checkpoint.tensors if (found := _BLOCK.match(name))]
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": shapes[_SIZES[1]][0] // math.prod(patch),
        "text_dim": shapes[_SIZES[2]][1],
        "freq_dim": shapes[_SIZES[3]][1],
        "ffn_dim": shapes[_FEED_FORWARD][0],
        "qk_norm": "rms_norm_across_heads",
        _BLOCKS: settings.get(_BLOCKS, max(blocks) + 1),
    }


def _heads(checkpoint: Checkpoint, settings: Config, width: int) -> tuple[int, int]:
    """Number and size of the heads whose channels together are the width."""
    given: dict[str, Any] = checkpoint.config()
    own = given.get("num_heads") if given.get("_class_name", _SAYS[0]) in _SAYS else None
    heads = settings.get("num_attention_heads", own)
    if heads is not None:
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise UserError(f"{checkpoint.folder / 'config.json'} says {heads!r} heads, and the width is {width}.")
        return heads, width // heads
    head_dim = settings.get("attention_head_dim", _HEAD_DIM)
    if width % head_dim:
        raise UserError(
            f"{checkpoint.path} is {width} channels wide, which are no heads of {head_dim}; put a config.json with "
            "`num_heads` beside it."
        )
    return width // head_dim, head_dim


STUDENT = Format(
    title="a causal Wan transformer",
    marks=("patch_embedding.", "time_projection.1.", "blocks.0.self_attn.q.", "blocks.0.cross_attn.q.", "head.head."),
    foreign=("img_emb.", "vace_blocks.", "blocks.0.cross_attn.k_img."),
    target="vidaccel.models.causal_wan:CausalWanTransformer3DModel",
    says=_SAYS,
    measured=measured_settings,
    rules=tuple(_rules()),
    dropped=("_cls_pred_branch.", "_register_tokens.", "_gan_ca_blocks."),  # a discriminator's, see Self-Forcing
)
REFUSED = (
    Format(
        title="a Wan transformer of image to video",
        marks=("patch_embedding.", "img_emb."),
        refusal="a causal student of text to video is wanted",
    ),
    Format(title="a VACE transformer", marks=("vace_blocks.",), refusal="a causal student of text to video is wanted"),
    Format(
        title="a Wan transformer under diffusers' names",
        marks=("condition_embedder.", "blocks.0.attn1.to_q."),
        refusal="there is nothing to convert; `CausalWanTransformer3DModel.from_pretrained` loads its folder",
    ),
)

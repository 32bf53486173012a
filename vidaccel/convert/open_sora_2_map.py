"""From the names of Open-Sora 2.0's published transformer to those of diffusers' `FluxTransformer2DModel`.

Three things differ in substance (facts of the published code, `opensora/models/mmdit`):

* Rotary positions turn the halves of a head against each other there, and neighbours here, so the rows of queries and
  keys are put in another order within each head.
* The condition has a projection of its own, whose result is added to that of the latents; here both are one projection
  of the channels side by side.
* The last modulation gives shift, then scale; here scale comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidaccel.convert.formats import Config, Rule


def interleaved(tensors: Sequence[Tensor], config: Config) -> Tensor:
    """Rows of all heads, or one norm's scales, with each head's halves (first, second) dealt out in turn."""
    rows = tensors[0].unflatten(0, (-1, 2, config["attention_head_dim"] // 2))
    return rows.transpose(1, 2).flatten(0, 2)


def side_by_side(tensors: Sequence[Tensor], config: Config) -> Tensor:
    """Projections of two inputs as the projection of both."""
    return torch.cat(list(tensors), dim=1)


def added(tensors: Sequence[Tensor], config: Config) -> Tensor:
    """The sum of two biases, in float32."""
    return (tensors[0].float() + tensors[1].float()).to(tensors[0].dtype)


def halves_swapped(tensors: Sequence[Tensor], config: Config) -> Tensor:
    """The second half of the rows, then the first."""
    first, second = tensors[0].chunk(2)
    return torch.cat([second, first])


def first_rows(tensors: Sequence[Tensor], config: Config) -> Tensor:
    """The rows of the values, which come before those of the feed-forward part."""
    return tensors[0][: config["num_attention_heads"] * config["attention_head_dim"]]


def other_rows(tensors: Sequence[Tensor], config: Config) -> Tensor:
    """The rows of the feed-forward part."""
    return tensors[0][config["num_attention_heads"] * config["attention_head_dim"] :]


def _stream(published: str, attention: str, names: Sequence[str], norm: str, feed_forward: str) -> tuple[Rule, ...]:
    """The rules of one of the two streams (image, text) of a double block."""
    old, new, blocks = f"double_blocks.{{block}}.{published}", "transformer_blocks.{block}", "num_layers"
    query, key, value, out = names
    return (
        Rule(f"{new}.{norm}.linear.{{part}}", f"{old}_mod.lin.{{part}}", blocks=blocks),
        Rule(f"{new}.attn.{query}.{{part}}", f"{old}_attn.q_proj.{{part}}", interleaved, blocks),
        Rule(f"{new}.attn.{key}.{{part}}", f"{old}_attn.k_proj.{{part}}", interleaved, blocks),
        Rule(f"{new}.attn.{value}.{{part}}", f"{old}_attn.v_proj.{{part}}", blocks=blocks),
        Rule(f"{new}.attn.{out}.{{part}}", f"{old}_attn.proj.{{part}}", blocks=blocks),
        Rule(f"{new}.attn.{attention}_q.weight", f"{old}_attn.norm.query_norm.scale", interleaved, blocks),
        Rule(f"{new}.attn.{attention}_k.weight", f"{old}_attn.norm.key_norm.scale", interleaved, blocks),
        Rule(f"{new}.{feed_forward}.net.0.proj.{{part}}", f"{old}_mlp.0.{{part}}", blocks=blocks),
        Rule(f"{new}.{feed_forward}.net.2.{{part}}", f"{old}_mlp.2.{{part}}", blocks=blocks),
    )


_SINGLE, _OLD_SINGLE, _SINGLES = "single_transformer_blocks.{block}", "single_blocks.{block}", "num_single_layers"

TRANSFORMER_RULES: tuple[Rule, ...] = (
    Rule("x_embedder.weight", ("img_in.weight", "cond_in.weight"), side_by_side),
    Rule("x_embedder.bias", ("img_in.bias", "cond_in.bias"), added),
    Rule("context_embedder.{part}", "txt_in.{part}"),
    Rule("time_text_embed.timestep_embedder.linear_1.{part}", "time_in.in_layer.{part}"),
    Rule("time_text_embed.timestep_embedder.linear_2.{part}", "time_in.out_layer.{part}"),
    Rule("time_text_embed.text_embedder.linear_1.{part}", "vector_in.in_layer.{part}"),
    Rule("time_text_embed.text_embedder.linear_2.{part}", "vector_in.out_layer.{part}"),
    *_stream("img", "norm", ("to_q", "to_k", "to_v", "to_out.0"), "norm1", "ff"),
    *_stream(
        "txt", "norm_added", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), "norm1_context", "ff_context"
    ),
    Rule(f"{_SINGLE}.norm.linear.{{part}}", f"{_OLD_SINGLE}.modulation.lin.{{part}}", blocks=_SINGLES),
    Rule(f"{_SINGLE}.attn.to_q.{{part}}", f"{_OLD_SINGLE}.q_proj.{{part}}", interleaved, _SINGLES),
    Rule(f"{_SINGLE}.attn.to_k.{{part}}", f"{_OLD_SINGLE}.k_proj.{{part}}", interleaved, _SINGLES),
    Rule(f"{_SINGLE}.attn.to_v.{{part}}", f"{_OLD_SINGLE}.v_mlp.{{part}}", first_rows, _SINGLES),
    Rule(f"{_SINGLE}.proj_mlp.{{part}}", f"{_OLD_SINGLE}.v_mlp.{{part}}", other_rows, _SINGLES),
    Rule(f"{_SINGLE}.attn.norm_q.weight", f"{_OLD_SINGLE}.norm.query_norm.scale", interleaved, _SINGLES),
    Rule(f"{_SINGLE}.attn.norm_k.weight", f"{_OLD_SINGLE}.norm.key_norm.scale", interleaved, _SINGLES),
    Rule(f"{_SINGLE}.proj_out.{{part}}", f"{_OLD_SINGLE}.linear2.{{part}}", blocks=_SINGLES),
    Rule("norm_out.linear.{part}", "final_layer.adaLN_modulation.1.{part}", halves_swapped),
    Rule("proj_out.{part}", "final_layer.linear.{part}"),
)

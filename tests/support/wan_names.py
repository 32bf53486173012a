"""A diffusers transformer of Wan under the names of the published weights."""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
# The inverse of the conversion, read off the two published models and independent of its rules: diffusers' words and
# Wan's, in an order in which no word hides another.
WORDS = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".norm2.", ".norm3."),
    ("proj_out", "head.head"),
)


def wan_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    for new, old in WORDS:
        name = name.replace(new, old)
    return name.replace("scale_shift_table", "modulation")


def wan_tensors(model: torch.nn.Module) -> Tensors:
    return {wan_name(name): value.clone() for name, value in model.state_dict().items()}

"""Attention of a chunk to its memory, the keys in equal parts: more, shorter pieces of work fill a GPU evenly.

A chunk has few queries and many keys, and kernels divide the work by queries and heads: 4 rounds are begun for 3.4
rounds of work. With n parts the rounds are n times shorter, so that less of the last one is lost. The parts are merged
by their log-sum-exp (Flash-Decoding; FlashAttention, arXiv 2205.14135, section 3.1), which is exact up to rounding.
Kernels are called as they are, without the copies of keys and values that diffusers' cuDNN backend makes.
Axes: B batch, L queries, S keys, N heads, D head size.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["cudnn", "flash", "cpu"]


@dataclass(frozen=True, kw_only=True)
class KeySplit:
    """How the keys of a chunk are divided.

    kernel: "cudnn", "flash" (both CUDA), or "cpu".
    num_parts: keys are divided where their number allows it and the batch is 1; larger batches fill a GPU by
        themselves.

    Raises ValueError for an unknown kernel and for no parts.
    """

    kernel: Kernel
    num_parts: int = 1

    def __post_init__(self) -> None:
        if self.kernel not in get_args(Kernel) or self.num_parts < 1:
            raise ValueError(
                f"Keys can be split for {', '.join(get_args(Kernel))} in at least 1 part; got {self.kernel!r} and "
                f"{self.num_parts}."
            )


def use_split_attention(transformer: Any, split: KeySplit | None) -> None:
    """Let the self-attention of a `CausalWanTransformer3DModel` over a memory use `split`; None: diffusers' backend."""
    for block in transformer.blocks:
        block.attn1.processor.split = split


def split_attention(query: Tensor, keys: Tensor, values: Tensor, split: KeySplit) -> Tensor:
    """Attention of (B, L, N, D) to (B, S, N, D), (B, L, N, D)."""
    inputs = in_parts(query, keys, values, split.num_parts)
    attended, log_sums = attention_with_log_sums(*inputs, split.kernel)
    return attended if len(attended) == len(query) else merge_parts(attended, log_sums)


def in_parts(query: Tensor, keys: Tensor, values: Tensor, num_parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values in parts beside each other in the batch, and the queries for each; as they are for one."""
    if num_parts == 1 or query.shape[0] > 1 or keys.shape[1] % num_parts:
        return query, keys, values
    keys, values = (side.unflatten(1, (num_parts, -1)).flatten(0, 1) for side in (keys, values))
    return query.expand(num_parts, -1, -1, -1).contiguous(), keys, values


def merge_parts(attended: Tensor, log_sums: Tensor) -> Tensor:
    """One result (1, L, N, D) of those of the parts (parts, L, N, D) and their log-sums (parts, N, L)."""
    shares = log_sums.softmax(0).transpose(1, 2).unsqueeze(-1)
    return (attended.float() * shares).sum(0, keepdim=True).type_as(attended)


@torch.library.custom_op("vidaccel::attention_with_log_sums", mutates_args=())
def attention_with_log_sums(query: Tensor, keys: Tensor, values: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Attention (B, L, N, D) and the logarithms of the sums of its weights (B, N, L), float32."""
    rows = [side.transpose(1, 2) for side in (query, keys, values)]
    if kernel == "cudnn":
        attended, log_sums = torch.ops.aten._scaled_dot_product_cudnn_attention(*rows, None, True)[:2]
    elif kernel == "flash":
        attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention(*rows)[:2]
    else:
        attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows)
    batch_size, length, heads, _ = query.shape
    return attended.transpose(1, 2).contiguous(), log_sums.float().reshape(batch_size, heads, length).contiguous()


@attention_with_log_sums.register_fake
def _shapes(query: Tensor, keys: Tensor, values: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    batch_size, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch_size, heads, length), dtype=torch.float32)

"""Layers of a Wan transformer joined for inference: one product for queries, keys and values, GELU within its product.

The products write what follows them at once, so that less goes through a GPU's memory. Parameters stay where they are.
"""

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.errors import UserError


def fuse_layers(transformer: Any) -> None:
    """Join the projections of attention and the feed-forward layers' first product with its GELU, in place.

    Joined and single projections share their weights, so that what is merged into one (LoRA) is in the other too.
    `unfuse_layers` takes it back. Raises UserError for layers that are no plain products (LoRA, quantized), which would
    lose what was put into them.
    """
    layers = [module for block in transformer.blocks for module in block.modules()]
    for layer in layers:
        products = [layer.proj] if isinstance(layer, GELU) else []
        products += _projections(layer) if isinstance(layer, WanAttention) else []
        for product in products:
            if type(product) is not nn.Linear:
                raise UserError(
                    f"A {type(product).__name__} cannot be joined with other layers; fuse LoRA weights first, and "
                    "leave quantized models as they are."
                )
    transformer.fuse_qkv_projections()
    for layer in layers:
        if isinstance(layer, WanAttention):
            _share_weights(layer)
    for block in transformer.blocks:
        if isinstance(block.ffn.net[0], GELU):
            block.ffn.net[0] = FusedGELU(block.ffn.net[0])


def _projections(attn: Any) -> list[Any]:
    """The projections that diffusers joins: keys and values, and of self-attention queries."""
    return [attn.to_k, attn.to_v] if attn.is_cross_attention else [attn.to_q, attn.to_k, attn.to_v]


def _share_weights(attn: Any) -> None:
    joined = attn.to_kv if attn.is_cross_attention else attn.to_qkv
    sizes = [part.out_features for part in _projections(attn)]
    for name in ("weight", "bias"):
        pieces = getattr(joined, name).data.split(sizes)
        for part, piece in zip(_projections(attn), pieces, strict=True):
            getattr(part, name).data = piece


def unfuse_layers(transformer: Any) -> None:
    """Take back `fuse_layers`; what was put into the layers meanwhile (LoRA) stays in them."""
    for layer in transformer.modules():
        if isinstance(layer, WanAttention) and getattr(layer, "fused_projections", False):
            for part in _projections(layer):  # what holds adapters holds its product inside
                for parameter in part.parameters():
                    parameter.data = parameter.data.clone()
    transformer.unfuse_qkv_projections()
    for block in transformer.blocks:
        if isinstance(fused := block.ffn.net[0], FusedGELU):
            fused.original.proj = fused.proj
            block.ffn.net[0] = fused.original


def separate_adapted_layers(transformer: Any) -> None:
    """Take layers apart that were joined before adapters or other weights came into them, which would not count."""
    if any(_is_outdated(layer) for layer in transformer.modules()):
        unfuse_layers(transformer)


def _is_outdated(layer: Any) -> bool:
    if isinstance(layer, FusedGELU):
        return type(layer.proj) is not nn.Linear
    if not isinstance(layer, WanAttention) or not getattr(layer, "fused_projections", False):
        return False
    joined = layer.to_kv if layer.is_cross_attention else layer.to_qkv
    parts = _projections(layer)
    is_shared = parts[0].weight.data_ptr() == joined.weight.data_ptr()
    return any(type(part) is not nn.Linear for part in parts) or not is_shared


class FusedGELU(nn.Module):
    """A product and GELU in its tanh form as one kernel, without gradients; names of parameters are the original's."""

    def __init__(self, layer: GELU) -> None:
        super().__init__()
        if layer.approximate != "tanh" or layer.proj.bias is None:
            raise UserError("Only GELU in its tanh form behind a product with a bias can be fused.")
        self.proj = layer.proj
        self._original = (layer,)  # not a submodule: its parameters are in the state dict once

    @property
    def original(self) -> GELU:
        """The layer that this stands for."""
        return self._original[0]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return linear_gelu(hidden_states, self.proj.weight, self.proj.bias)


@torch.library.custom_op("vidaccel::linear_gelu", mutates_args=())
def linear_gelu(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh form) of a linear layer's result."""
    if hidden_states.device.type != "cuda":
        return F.gelu(F.linear(hidden_states, weight, bias), approximate="tanh")
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*hidden_states.shape[:-1], -1)


@linear_gelu.register_fake
def _shape(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return hidden_states.new_empty((*hidden_states.shape[:-1], weight.shape[0]))

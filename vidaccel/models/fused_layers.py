"""Layers of a Wan transformer joined for inference: one product for queries, keys and values, GELU within its product.

The products write what follows them at once, so that less goes through a GPU's memory. Parameters stay where they are.
"""

from typing import Any

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.errors import UserError


def fuse_layers(transformer: Any) -> None:
    """Join the projections of attention and the feed-forward layers' first product with its GELU, in place.

    The weights of joined projections are kept twice. `unfuse_layers` takes it back. Raises UserError for layers that
    are no plain products (LoRA, quantized), which would lose what was put into them.
    """
    layers = [module for block in transformer.blocks for module in block.modules()]
    for layer in layers:
        if isinstance(layer, GELU) and type(layer.proj) is not nn.Linear:
            raise UserError(
                f"A {type(layer.proj).__name__} cannot be joined with its activation; fuse LoRA weights first, and "
                "leave quantized models as they are."
            )
    transformer.fuse_qkv_projections()
    for block in transformer.blocks:
        if isinstance(block.ffn.net[0], GELU):
            block.ffn.net[0] = FusedGELU(block.ffn.net[0])


def unfuse_layers(transformer: Any) -> None:
    """Take back `fuse_layers`."""
    transformer.unfuse_qkv_projections()
    for block in transformer.blocks:
        if isinstance(block.ffn.net[0], FusedGELU):
            block.ffn.net[0] = block.ffn.net[0].original


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

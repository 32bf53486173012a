"""Which LoRA adapters a model runs with, and where its weights lie: host values only."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


def adapters_of(model: Any) -> Hashable:
    """Equal for equal adapters: of every adapted layer those that are active, merged or disabled, and their scales.

    Weights exchanged in place under the same name (hotswap) do not show.
    """
    if not getattr(model, "peft_config", None):
        return ()
    adapted = (layer for layer in model.modules() if hasattr(type(layer), "merged_adapters"))
    return tuple(
        (
            layer.disable_adapters,
            tuple(layer.active_adapters),
            tuple(layer.merged_adapters),
            tuple(getattr(layer, "scaling", {}).items()),
        )
        for layer in adapted
    )


def weight_places(model: Any) -> Hashable:
    """Equal while all weights lie where they lay: work that was captured reads them there."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())

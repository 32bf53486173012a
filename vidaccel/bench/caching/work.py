"""How much of a transformer's blocks really ran: floating-point operations counted beneath every cache.

Caches inside the model save whole blocks, or only their attention or feed-forward parts. Counting the linear layers
of the blocks, and the two products of attention with them, puts all of them on one scale: executed work, with
attention, as a share of a plain run's. What lies outside the blocks (embeddings, the last projection) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class BlockWork:
    """Operations (multiply and add are two) of the blocks of `transformers`, while `watch` is entered.

    The blocks are the direct children of a transformer that are lists of modules. Raises ValueError where there are
    none.
    """

    def __init__(self, transformers: Sequence[nn.Module]) -> None:
        self.operations = 0
        self._blocks = [
            block
            for transformer in transformers
            for child in transformer.children()
            if isinstance(child, nn.ModuleList)
            for block in child
        ]
        if not self._blocks:
            raise ValueError("The transformer has no list of blocks whose work could be counted.")

    @contextmanager
    def watch(self) -> Iterator[BlockWork]:
        """Count inside the block, from zero."""
        self.operations = 0
        parts = [part for block in self._blocks for part in block.modules()]
        handles = [part.register_forward_pre_hook(self._linear) for part in parts if isinstance(part, nn.Linear)]
        for part in parts:
            if isinstance(part, nn.Module) and {"to_q", "to_k", "to_v"} <= dict(part.named_children()).keys():
                handles += self._watch_attention(part)
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _linear(self, layer: nn.Linear, arguments: tuple[Any, ...]) -> None:
        self.operations += 2 * arguments[0].numel() * layer.out_features

    def _watch_attention(self, attention: nn.Module) -> list[Any]:
        """The products queries x keys and weights x values: 4 x queries x keys x width, once per call."""
        num_queries = 0

        def see_queries(layer: nn.Linear, arguments: tuple[Any, ...]) -> None:
            nonlocal num_queries
            num_queries = arguments[0].shape[-2]

        def see_keys(layer: nn.Linear, arguments: tuple[Any, ...]) -> None:
            num_rows = arguments[0].numel() // arguments[0].shape[-1]  # keys of all samples
            self.operations += 4 * num_queries * num_rows * layer.out_features

        return [
            attention.get_submodule("to_q").register_forward_pre_hook(see_queries),
            attention.get_submodule("to_k").register_forward_pre_hook(see_keys),
        ]

"""Which layer's remembered keys and values a layer reads: its own, or those of an earlier one.

Stochastic KV routing (arXiv 2604.22782) trains a transformer whose layers read, by chance, the keys and values of
earlier layers; afterwards those of a few layers are enough, and the others' are never stored. Here only what is
*remembered* is shared: keys and values of the chunk being made are always a layer's own, which departs from the paper.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vidaccel.errors import check_count


@dataclass(frozen=True)
class DepthMap:
    """The leader of every layer: the layer whose remembered keys and values it reads, itself or an earlier one.

    Raises ValueError for no layer, and for a leader that is none of them or comes later.
    """

    leaders: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.leaders, tuple) or not self.leaders:
            raise ValueError(f"`leaders` must be a tuple with a leader for every layer; got {self.leaders!r}.")
        for layer, leader in enumerate(self.leaders):
            if type(leader) is not int or not 0 <= leader <= layer:
                raise ValueError(
                    f"Layer {layer} can read what is remembered of layers 0 to {layer} only; got leader {leader!r}."
                )

    @classmethod
    def every(cls, every: int, num_layers: int) -> DepthMap:
        """Every `every`-th layer is kept, the first among them, and read by the layers up to the next; 1: all are.

        Raises UserError for counts below 1, and for groups of more layers than there are.
        """
        check_count("num_layers", num_layers, minimum=1)
        check_count("depth_every", every, minimum=1, maximum=num_layers, limit=", the number of layers")
        return cls(tuple(layer - layer % every for layer in range(num_layers)))

    @classmethod
    def drawn(cls, probability: float, num_layers: int, draw: random.Random) -> DepthMap:
        """Every layer reads its own, or with `probability` any of the earlier ones; the first layer has none."""
        return cls(
            tuple(
                draw.randrange(layer) if layer and draw.random() < probability else layer for layer in range(num_layers)
            )
        )

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that are read by one, in order: the others' keys and values need not be stored."""
        return tuple(sorted(set(self.leaders)))

    @property
    def is_own(self) -> bool:
        """Whether every layer reads its own."""
        return self.leaders == tuple(range(len(self.leaders)))

    def followers(self, leader: int) -> tuple[int, ...]:
        """The other layers that read what is remembered of `leader`."""
        return tuple(layer for layer, read in enumerate(self.leaders) if read == leader != layer)

    def check_stored(self) -> None:
        """Raise ValueError where a layer that is kept reads another one's: in a memory a kept layer reads its own."""
        for leader in self.kept:
            if self.leaders[leader] != leader:
                raise ValueError(
                    f"A memory is shared by groups of layers, and layer {leader} is read by "
                    f"{list(self.followers(leader))} but reads layer {self.leaders[leader]}; use `DepthMap.every`."
                )

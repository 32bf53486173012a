"""Buffers that several layers share: a chunk's keys and values are every layer's own, what is remembered is not.

Layers run one after the other, so that all layers of a group can write the chunk into the places of their leader behind
the remembered frames. What the leader wrote there is to be remembered: it is set aside before the first of the others
begins, and put back when the pass is over. Keys before rotation are the leader's alone; those of the others go where
nobody reads them.
Shapes: sides of a chunk (B, tokens, heads, D).
"""

from __future__ import annotations

from torch import Tensor

from vidaccel.memory.depth import DepthMap


class SharedDepth:
    """Where layers find their buffers, and what leaders wrote while others write over it.

    rows: of every layer, which of the buffers. Without layers that share, this does nothing and takes no bytes.
    """

    def __init__(self, depth: DepthMap, *, like: Tensor) -> None:
        """`like`: room of one chunk in every buffer, (kept layers, B, tokens, heads, D).

        Raises ValueError for a map in which a kept layer reads another one's.
        """
        depth.check_stored()
        self.rows = tuple(depth.kept.index(leader) for leader in depth.leaders)
        self._follows = [leader != layer for layer, leader in enumerate(depth.leaders)]
        groups = {row: depth.followers(leader) for row, leader in enumerate(depth.kept)}
        self._shared = [row for row, others in groups.items() if others]
        self._first = {groups[row][0]: place for place, row in enumerate(self._shared)}
        self._aside = like.new_zeros(2, len(self._shared), *like.shape[1:])  # rotated keys and values of leaders
        self._unread = like.new_zeros(like.shape[1:]) if self._shared else None

    @property
    def nbytes(self) -> int:
        """Bytes that sharing takes."""
        return self._aside.nbytes + (0 if self._unread is None else self._unread.nbytes)

    def begin(self, layer: int, keys: Tensor, values: Tensor) -> Tensor | None:
        """To be called before `layer` writes `keys` and `values`, the chunk's places in its buffers.

        Returns where it writes keys before rotation, None for its buffers.
        """
        if (place := self._first.get(layer)) is not None:
            for aside, side in zip(self._aside[:, place], (keys, values), strict=True):
                aside[:, : side.shape[1]].copy_(side)
        return self._unread[:, : keys.shape[1]] if self._follows[layer] and self._unread is not None else None

    def put_back(self, keys: Tensor, values: Tensor) -> None:
        """Let `keys` and `values`, the chunk's places in all buffers, hold what the leaders wrote."""
        for aside, side in zip(self._aside, (keys, values), strict=True):
            for place, row in enumerate(self._shared):
                side[row].copy_(aside[place, :, : side.shape[2]])

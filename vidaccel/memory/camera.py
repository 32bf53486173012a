"""Where the camera of a chunk stands and how it moves, for students that are told: the unit is a patch column.

A column is what one patch covers of the picture's width. Positions place the keys of a frame beside those of frames
that were taken elsewhere; motions tell the network what changes within a frame.
"""

from typing import NamedTuple

from torch import Tensor


class Camera(NamedTuple):
    """Of T latent frames: the camera's left edge, and how far it moved since the latent frame before; (B, T) float32.

    A latent frame stands for several pixel frames; its position is their mean. Both grow to the right.
    """

    columns: Tensor
    motions: Tensor

    def repeated(self, copies: int) -> "Camera":
        """Every sample `copies` times in a row."""
        return Camera(*(part.repeat_interleave(copies, 0) for part in self))

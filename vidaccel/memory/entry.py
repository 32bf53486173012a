"""One frame that a chunk attends to, and where it is remembered."""

from __future__ import annotations

from typing import Literal, NamedTuple

Part = Literal["sink", "slow", "fast", "current"]
Source = int | Literal["clean"]


class Entry(NamedTuple):
    """One latent frame that a chunk attends to.

    frame: index of the frame in the video.
    part: where it is remembered; "current" is the chunk that is being made.
    is_copy: whether it is a copy that a pass put into slow memory ("official" mode only).
    source: which pass over its chunk its keys and values are from: 0, 1, ... a denoising pass, "clean" the pass over
        the finished chunk, None a pass that has not run yet.
    """

    frame: int
    part: Part
    is_copy: bool = False
    source: Source | None = "clean"

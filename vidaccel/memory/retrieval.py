"""Which frames that left the memory come back: those that show what the next chunk will show.

Only the keys and values of a few frames are in reach, but of every frame of a shot it stays known where its camera
stood and how its keys were in the mean; its latents stay outside (main memory, disk), and one clean pass over them
gives back its keys. With a camera a view is compared with the views of the past, before anything of it is visible
(as Context as Memory, arXiv 2506.03141, finds frames by their overlapping fields of view); without one the mean keys of
the last chunk with those of earlier chunks (the similarity of Context Forcing, arXiv 2602.06028, equation 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vidaccel.errors import UserError, check_choice, check_count

RetrieveBy = Literal["view", "keys"]


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How frames are found that come back.

    by: "view", frames whose camera saw what the coming chunk will see, or "keys", frames of earlier chunks that the
        last chunk resembles.
    num_frames: at most so many come back for a chunk. depth: what is coming shall be in so many frames of the memory.
    threshold: of "keys", similarity from which on a chunk shows the same.
    Raises UserError for values outside these.
    """

    by: RetrieveBy
    num_frames: int
    depth: int = 1
    threshold: float = 0.95

    def __post_init__(self) -> None:
        check_choice("by", self.by, get_args(RetrieveBy))
        check_count("num_frames", self.num_frames, minimum=1)
        check_count("depth", self.depth, minimum=1)
        if not is_threshold(self.threshold):
            raise UserError(f"`threshold` must be a similarity above -1 and up to 1, got {self.threshold!r}.")


def is_threshold(value: object) -> bool:
    """Whether a cosine similarity can be compared with it: a number above -1 and up to 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 < value <= 1


def check_can_retrieve(retrieval: Retrieval | None, *, has_camera: bool) -> None:
    """Raise UserError for views of a student that is not told of its camera."""
    if retrieval is not None and retrieval.by == "view" and not has_camera:
        raise UserError(
            "This student is not told of a camera, and frames cannot come back by what it saw (view-retrieval); take "
            "key-retrieval."
        )

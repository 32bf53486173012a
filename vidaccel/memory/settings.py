"""Sizes and rules of the bounded memory of a causal student: which frames stay in reach while a video goes on.

Paper: Context Forcing, arXiv 2602.06028, section 3.3. Sizes are in latent frames. With its defaults a student attends
to at most 21 frames: the first 3 of the video (sink), 12 single frames of its past (slow), and the last 6 (fast), the
chunk that is being made among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vidaccel.errors import check_choice, check_count
from vidaccel.memory.retrieval import RetrieveBy, is_threshold

KeyframeRule = Literal["similarity", "uniform", "none"]
Mode = Literal["clean", "official"]
Prefill = Literal["none", "linear"]
Retrieve = Literal["none"] | RetrieveBy

_SIZES = ("sink_frames", "slow_frames", "fast_frames")


@dataclass(frozen=True, kw_only=True)
class SlowFastSettings:
    """The fields of `MemoryConfig`, which explains them. Raises ValueError for values outside its choices."""

    sink_frames: int = 3
    slow_frames: int = 12
    fast_frames: int = 6
    chunk_frames: int = 3
    keyframe_rule: KeyframeRule = "similarity"
    similarity_threshold: float = 0.95
    keyframe_interval: int = 6
    mode: Mode = "clean"
    prefill: Prefill = "none"
    keyframe_frames: int = 1
    max_frames: int | None = None
    depth_every: int = 1
    retrieve_by: Retrieve = "none"
    retrieved_frames: int | None = None

    def __post_init__(self) -> None:
        check_choice("keyframe_rule", self.keyframe_rule, get_args(KeyframeRule))
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("prefill", self.prefill, get_args(Prefill))
        check_choice("retrieve_by", self.retrieve_by, ("none", *get_args(RetrieveBy)))
        check_count("chunk_frames", self.chunk_frames, minimum=1)
        for name in _SIZES:
            check_count(name, getattr(self, name), minimum=0)
        check_count(
            "keyframe_frames",
            self.keyframe_frames,
            minimum=1,
            maximum=self.chunk_frames,
            limit=" (`chunk_frames`)",
        )
        check_count("keyframe_interval", self.keyframe_interval, minimum=1 if self.keyframe_rule == "uniform" else 0)
        check_count("max_frames", self.max_frames, minimum=1, optional=True)
        check_count("depth_every", self.depth_every, minimum=1)
        _check_threshold(self.similarity_threshold)
        self._check_sizes()
        self._check_retrieval()

    def _check_sizes(self) -> None:
        if self.fast_frames < self.chunk_frames:
            raise ValueError(
                f"`fast_frames` must be at least `chunk_frames` ({self.chunk_frames}), because it holds the chunk that "
                f"is being made; got {self.fast_frames}."
            )
        if self.mode == "clean" and self.total_frames % self.chunk_frames:
            raise ValueError(
                f"`sink_frames` + `slow_frames` + `fast_frames` must be divisible by `chunk_frames` "
                f"({self.chunk_frames}); got {self.sink_frames} + {self.slow_frames} + {self.fast_frames} = "
                f"{self.total_frames}."
            )

    def _check_retrieval(self) -> None:
        if self.retrieve_by == "none":
            if self.retrieved_frames is not None:
                raise ValueError(
                    f"`retrieved_frames` {self.retrieved_frames!r} are for what comes back, and `retrieve_by` is "
                    "'none'; leave them out."
                )
            return
        limit = " (`slow_frames`), whose places they take"
        if not self.slow_frames:
            raise ValueError("Frames come back into slow memory (`retrieve_by`), and there are 0 `slow_frames`.")
        check_count(
            "retrieved_frames", self.retrieved_frames, minimum=1, maximum=self.slow_frames, optional=True, limit=limit
        )
        if self.retrieve_by == "keys" and self.keyframe_rule == "none":
            raise ValueError(
                "By keys comes back what was before the last keyframe, and the `keyframe_rule` is 'none'; take another."
            )
        if self.mode != "clean":
            raise ValueError("Frames come back in the clean mode only; the official one writes noisy passes.")

    @property
    def most_retrieved(self) -> int:
        """Places of slow memory that frames which come back may take."""
        return self.retrieved_frames or max(1, self.slow_frames // 2)

    @property
    def total_frames(self) -> int:
        """Most frames a student attends to, the chunk that is being made included (M)."""
        return self.sink_frames + self.slow_frames + self.fast_frames


def _check_threshold(value: object) -> None:
    if not is_threshold(value):
        raise ValueError(
            f"`similarity_threshold` must be a number above -1 (hardly ever a keyframe) and up to 1 (nearly always); "
            f"got {value!r}."
        )

"""Sizes and rules of the bounded memory of a causal student: which frames stay in reach while a video goes on.

Paper: Context Forcing, arXiv 2602.06028, section 3.3. Sizes are in latent frames. With its defaults a student attends
to at most 21 frames: the first 3 of the video (sink), 12 single frames of its past (slow), and the last 6 (fast), the
chunk that is being made among them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

KeyframeRule = Literal["similarity", "uniform", "none"]
Mode = Literal["clean", "official"]
Prefill = Literal["none", "linear"]

_SIZES = ("sink_frames", "slow_frames", "fast_frames")
_NUMBER = re.compile(r"[01](\.[0-9]{1,12})?")
_FORMS = (
    "slow-fast, slow-fast:3+12+6, slow-fast:3+12+6@0.99 (with the similarity threshold), sink+window:3+9, window:21 or "
    "full:240 (latent frames)"
)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Which frames a causal student can look back to; all sizes in latent frames.

    sink_frames: first frames of the video, kept for good (Ns).
    slow_frames: places for keyframes of the past; the oldest leaves when there is one too many (Nc).
    fast_frames: last frames, the chunk that is being made included, so at least `chunk_frames` (Nl). 0 is allowed
        without slow memory and means: the first frames only. The chunk being made then has the last places, so that
        it is the same as `sink_frames - chunk_frames` and `fast_frames = chunk_frames`, and is kept as such.
    chunk_frames: frames that are made together (F).
    keyframe_rule: a chunk is a keyframe if its keys are less similar to the previous chunk's than the threshold
        ("similarity"), at every `keyframe_interval`-th frame ("uniform"), or never ("none"). No chunk is one that
        begins before frame `fast_frames`, nor without slow memory.
    similarity_threshold: cosine similarity below which a chunk is a keyframe; one that is equal is none.
    keyframe_interval: frames between keyframes of the "uniform" rule. It is counted in whole chunks: a chunk is one if
        its number times `chunk_frames` is divisible, so that a short first chunk (an image) moves nothing.
    mode: "clean" (default) keeps the parts disjoint and in order of time and remembers what the clean pass wrote;
        "official" is the bookkeeping of the released code, see `vidaccel.memory.official`.
    prefill: with "linear" the places of slow memory extend the fast one as long as no keyframe needs them: nothing is
        forgotten in the first `total_frames` frames, and afterwards frames that are no keyframes leave first. The
        "official" mode fills its memory linearly anyway.
    keyframe_frames: frames that are kept of a keyframe chunk: its first ones.
    max_frames: longest video; a chunk beyond is refused. None for any length.

    Raises ValueError for a value outside these choices.
    """

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

    def __post_init__(self) -> None:
        _check_choice("keyframe_rule", self.keyframe_rule, get_args(KeyframeRule))
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("prefill", self.prefill, get_args(Prefill))
        _check_count("chunk_frames", self.chunk_frames, least=1)
        for name in _SIZES:
            _check_count(name, getattr(self, name), least=0)
        _check_count("keyframe_frames", self.keyframe_frames, least=1, most=self.chunk_frames)
        _check_count("keyframe_interval", self.keyframe_interval, least=1 if self.keyframe_rule == "uniform" else 0)
        if self.max_frames is not None:
            _check_count("max_frames", self.max_frames, least=1)
        _check_threshold(self.similarity_threshold)
        self._check_sizes()

    def _check_sizes(self) -> None:
        if self.fast_frames == self.slow_frames == 0 and self.sink_frames >= self.chunk_frames:
            object.__setattr__(self, "sink_frames", self.sink_frames - self.chunk_frames)
            object.__setattr__(self, "fast_frames", self.chunk_frames)
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

    @property
    def total_frames(self) -> int:
        """Most frames a student attends to, the chunk that is being made included (M)."""
        return self.sink_frames + self.slow_frames + self.fast_frames

    @classmethod
    def sliding_window(cls, window_frames: int, chunk_frames: int = 3) -> MemoryConfig:
        """The last `window_frames` frames and nothing else (Self-Forcing: 21)."""
        return cls(
            sink_frames=0,
            slow_frames=0,
            fast_frames=window_frames,
            chunk_frames=chunk_frames,
            keyframe_rule="none",
        )

    @classmethod
    def sink_and_window(cls, sink_frames: int = 3, window_frames: int = 9, chunk_frames: int = 3) -> MemoryConfig:
        """The first and the last frames (LongLive: 3 and 9, the chunk being made included)."""
        return cls(
            sink_frames=sink_frames,
            slow_frames=0,
            fast_frames=window_frames,
            chunk_frames=chunk_frames,
            keyframe_rule="none",
        )

    @classmethod
    def full(cls, num_frames: int, chunk_frames: int = 3) -> MemoryConfig:
        """Every frame of a video of at most `num_frames` frames; a chunk beyond them is refused."""
        _check_count("chunk_frames", chunk_frames, least=1)
        _check_count("num_frames", num_frames, least=1)
        return cls(
            sink_frames=0,
            slow_frames=0,
            fast_frames=math.ceil(num_frames / chunk_frames) * chunk_frames,
            chunk_frames=chunk_frames,
            keyframe_rule="none",
            max_frames=num_frames,
        )

    @classmethod
    def parse(cls, text: str, chunk_frames: int = 3) -> MemoryConfig:
        """The memory that a word of the command line means, for a student that makes `chunk_frames` at once.

        "slow-fast" and "sink+window" (usual sizes), "slow-fast:3+12+6" (sink, slow, fast), "slow-fast:3+12+6@0.99" (and
        the similarity threshold), "sink+window:3+9", "window:21", "full:240". Everything else about it is changed with
        `dataclasses.replace`. Raises ValueError.
        """
        sizes, at, threshold = text.partition("@")
        if at and sizes.startswith("slow-fast") and _NUMBER.fullmatch(threshold):
            return replace(cls.parse(sizes, chunk_frames), similarity_threshold=float(threshold))
        kind, colon, rest = text.partition(":")
        words = rest.split("+") if colon else []
        if all(word.isascii() and word.isdigit() for word in words):
            match kind, [int(word) for word in words]:
                case "slow-fast", []:
                    return cls(chunk_frames=chunk_frames)
                case "slow-fast", [sink, slow, fast]:
                    return cls(sink_frames=sink, slow_frames=slow, fast_frames=fast, chunk_frames=chunk_frames)
                case "sink+window", []:
                    return cls.sink_and_window(chunk_frames=chunk_frames)
                case "sink+window", [sink, window]:
                    return cls.sink_and_window(sink, window, chunk_frames)
                case "window", [window]:
                    return cls.sliding_window(window, chunk_frames)
                case "full", [num_frames]:
                    return cls.full(num_frames, chunk_frames)
        raise ValueError(f"A memory must be {_FORMS}; got {text!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryConfig:
        """The settings of `to_dict`; what is not in `values` is usual. Raises ValueError, for an unknown name too."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise ValueError(f"The settings of a memory must be names with values; got {values!r}.")
        unknown = sorted(str(name) for name in values if name not in names)
        if unknown:
            raise ValueError(f"A memory has no setting {unknown[0]!r}; it has {', '.join(names)}.")
        return cls(**values)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}.")


def _check_count(name: str, value: object, *, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most} (`chunk_frames`)"
        raise ValueError(f"`{name}` must be a whole number {limit}; got {value!r}.")


def _check_threshold(value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1 < value <= 1:
        raise ValueError(
            f"`similarity_threshold` must be a number above -1 (hardly ever a keyframe) and up to 1 (nearly always); "
            f"got {value!r}."
        )

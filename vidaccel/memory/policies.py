"""The memory policies that can be named: one row for each, read when a name is looked up.

A text such as `slow-fast:3+12+6@0.997` is a name and, behind a colon, what the policy makes of the rest. Before an @
the colon may be left out: `slow-fast@0.99` has the usual sizes. `3+12x3+6` are the same places, with up to 3 frames of
a keyframe where there is room. A `%2` at its end keeps every second layer only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from vidaccel.errors import check_count
from vidaccel.memory.config import MemoryConfig
from vidaccel.memory.policy import MemoryPolicy
from vidaccel.memory.retrieval import RetrieveBy

_NAME = re.compile(r"([^:@]*):?(.*)", re.DOTALL)
_EVERY = re.compile(r"[1-9][0-9]{0,3}")
_SLOW_FAST = re.compile(r"(\d+\+\d+)x(\d+)(\+\d+)", re.ASCII)
_THRESHOLD = re.compile(r"[01](\.[0-9]{1,12})?")


class PolicyRow(NamedTuple):
    """One policy on the command line.

    form: examples of how it is written, for messages and help.
    read: the policy of what stands behind the name (without the colon) and the frames of a chunk; None where it means
        nothing. May raise ValueError for values out of range.
    """

    form: str
    read: Callable[[str, int], MemoryPolicy | None]


def parse_memory(text: str, chunk_frames: int = 3) -> MemoryPolicy:
    """The memory that a text of the command line means, for a student that makes `chunk_frames` at once.

    Raises ValueError for an unknown name or sizes that cannot be.
    """
    sizes, percent, every = text.partition("%")
    found = _NAME.fullmatch(sizes)
    row = POLICIES.get(found[1]) if found else None
    is_complete = found is not None and (bool(found[2]) or ":" not in sizes)  # nothing is missing behind a colon
    policy = row.read(found[2], chunk_frames) if found is not None and row is not None and is_complete else None
    if policy is None or (percent and not (isinstance(policy, MemoryConfig) and _EVERY.fullmatch(every))):
        raise ValueError(f"A memory must be {memory_forms()} (latent frames); got {text!r}.")
    return replace(cast(MemoryConfig, policy), depth_every=int(every)) if percent else policy


def memory_forms() -> str:
    """How memories are written, one example after another, for messages and help."""
    *forms, last = (row.form for row in POLICIES.values())
    return f"{', '.join(forms)} or {last}"


def parse_slow_fast(text: str, chunk_frames: int = 3) -> MemoryConfig:
    """As `parse_memory`, for what works with sink, slow and fast memory only. Raises ValueError."""
    policy = parse_memory(text, chunk_frames)
    if not isinstance(policy, MemoryConfig):
        raise ValueError(f"This needs a memory of sink, slow and fast frames such as slow-fast:3+12+6; got {text!r}.")
    return policy


def sizes_of(text: str) -> list[int] | None:
    """The numbers of "3+12+6", none of ""; None for anything else."""
    words = text.split("+") if text else []
    return [int(word) for word in words] if all(word.isascii() and word.isdigit() for word in words) else None


def _slow_fast(text: str, chunk_frames: int) -> MemoryConfig | None:
    sizes, at, threshold = text.partition("@")
    several = _SLOW_FAST.fullmatch(sizes)
    frames = int(several[2]) if several else 1
    if not 1 <= frames <= chunk_frames:
        raise ValueError(f"Of a keyframe's chunk a memory holds 1 to {chunk_frames} latent frames; got {sizes}.")
    match sizes_of(several[1] + several[3] if several else sizes):
        case []:
            config = MemoryConfig(chunk_frames=chunk_frames)
        case [sink, slow, fast] as parts:
            _check_parts(parts, chunk_frames)
            config = MemoryConfig(
                sink_frames=sink,
                slow_frames=slow,
                fast_frames=fast,
                chunk_frames=chunk_frames,
                keyframe_frames=frames,
            )
        case _:
            return None
    if not at:
        return config
    return replace(config, similarity_threshold=float(threshold)) if _THRESHOLD.fullmatch(threshold) else None


def _retrieving(by: RetrieveBy) -> Callable[[str, int], MemoryConfig | None]:
    """As slow-fast memory, into which frames come back."""

    def read(text: str, chunk_frames: int) -> MemoryConfig | None:
        config = _slow_fast(text, chunk_frames)
        return config and replace(config, retrieve_by=by)

    return read


def _of_sizes(make: Callable[..., MemoryConfig], counts: Sequence[int]) -> Callable[[str, int], MemoryConfig | None]:
    def read(text: str, chunk_frames: int) -> MemoryConfig | None:
        sizes = sizes_of(text)
        if sizes is None or len(sizes) not in counts:
            return None
        _check_parts(sizes, chunk_frames)
        return make(*sizes, chunk_frames=chunk_frames)

    return read


def _full(text: str, chunk_frames: int) -> MemoryConfig | None:
    match sizes_of(text):
        case [num_frames]:
            return MemoryConfig.full(num_frames, chunk_frames)
    return None


def _check_parts(sizes: Sequence[int], chunk_frames: int) -> None:
    """Raise ValueError for what the parts of a memory cannot be, in words of how they are written."""
    check_count("chunk_frames", chunk_frames, minimum=1)
    written, total = "+".join(map(str, sizes)), sum(sizes)
    if sizes and sizes[-1] < chunk_frames:
        raise ValueError(
            f"The last part of a memory holds the chunk that is being made and must have at least its {chunk_frames} "
            f"latent frames; got {written}."
        )
    if total % chunk_frames:
        least, of = total - total % chunk_frames, "" if len(sizes) == 1 else f"{written} = "
        raise ValueError(
            f"The latent frames of a memory must be divisible by `chunk_frames` ({chunk_frames}), those of a chunk; "
            f"got {of}{total}, and {least} or {least + chunk_frames} would do."
        )


POLICIES: dict[str, PolicyRow] = {
    "slow-fast": PolicyRow(
        "slow-fast, slow-fast:3+12+6 (sink, slow, fast), slow-fast:3+12x3+6 (up to 3 frames of a keyframe), "
        "slow-fast:3+12+6@0.99 (with the similarity threshold), "
        "slow-fast:3+12+6%2 (of every 2nd layer)",
        _slow_fast,
    ),
    "view-retrieval": PolicyRow("view-retrieval:3+12x3+6 (what the camera saw comes back)", _retrieving("view")),
    "key-retrieval": PolicyRow("key-retrieval:3+12x3+6 (what resembles the present does)", _retrieving("keys")),
    "sink+window": PolicyRow("sink+window:3+9", _of_sizes(MemoryConfig.sink_and_window, (0, 2))),
    "window": PolicyRow("window:21", _of_sizes(MemoryConfig.sliding_window, (1,))),
    "full": PolicyRow("full:240", _full),
}

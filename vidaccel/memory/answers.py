"""Whether what a memory policy says can be: a policy of somebody else that errs is told so, in one line of its own.

The frames that a policy names decide where keys and values are copied from. One that it never had, or has forgotten,
would otherwise end in an error of the buffers, or in a video that attends to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NoReturn, cast, get_args

from vidaccel.errors import UserError
from vidaccel.memory.entry import Entry, Part
from vidaccel.memory.index import MemoryIndex
from vidaccel.memory.policy import MemoryPolicy
from vidaccel.memory.retrieval import Retrieval

_PARTS = tuple(part for part in get_args(Part) if part != "current")


def check_policy(policy: Any) -> None:
    """Raise UserError for what is no memory policy, and for one whose sizes cannot be."""
    if MemoryPolicy not in type(policy).__mro__:
        raise UserError(
            f"`memory` must be a text such as slow-fast:3+12+6, or a MemoryPolicy such as MemoryConfig(); got "
            f"{_short(policy)}."
        )
    _check_size(policy, "chunk_frames", policy.chunk_frames)
    parts: Any = policy.part_frames
    if not isinstance(parts, Mapping) or not set(parts) <= set(_PARTS):
        _refuse(policy, "part_frames", f"is {parts!r}; it must give frames for some of {', '.join(_PARTS)}")
    for part, count in parts.items():
        _check_size(policy, f"part_frames[{part!r}]", count, minimum=0)
    _check_size(policy, "total_frames", policy.total_frames, minimum=policy.chunk_frames)
    if policy.max_frames is not None:
        _check_size(policy, "max_frames", policy.max_frames)
    retrieval: Any = policy.retrieval
    if retrieval is not None and not isinstance(retrieval, Retrieval):
        _refuse(policy, "retrieval", f"is {_short(retrieval)}; it must be a `Retrieval`, or None")
    settings: Any = policy.to_dict()
    if not isinstance(settings, Mapping):
        _refuse(policy, "to_dict", f"gives {settings!r}; it must give names with plain values")


def check_entries(index: MemoryIndex, frames: Set[int], *, num_seen: int = 0) -> None:
    """Raise UserError where no pass can attend to what a sample keeps.

    frames: those whose keys and values there are, the chunk being made among them. num_seen: so many first frames of
        the video may come back without.
    """
    policy, entries, current = index.policy, cast(Any, index.entries), index.current
    if not isinstance(entries, tuple | list) or not all(isinstance(entry, Entry) for entry in entries):
        _refuse(policy, "entries", f"gives {_short(entries)}; it must give a tuple of `Entry`")
    past, own = entries[: len(entries) - len(current)], entries[len(entries) - len(current) :]
    if [(entry.frame, entry.part) for entry in own] != [(frame, "current") for frame in current]:
        _refuse(policy, "entries", f'must end with the chunk being made, frames {current} in "current"')
    if wrong := [entry.part for entry in past if entry.part not in _PARTS]:
        _refuse(policy, "entries", f"has a frame of the past in {wrong[0]!r}; it must be in {', '.join(_PARTS)}")
    seen = range(num_seen)
    known = [type(entry.frame) is int and (entry.frame in frames or entry.frame in seen) for entry in past]
    if lost := [entry.frame for entry, is_known in zip(past, known, strict=True) if not is_known]:
        _refuse(policy, "entries", f"has frame {lost[0]!r}, which was forgotten before or does not exist yet")
    if len({(entry.frame, entry.source if entry.is_copy else None) for entry in entries}) < len(entries):
        _refuse(policy, "entries", f"has a frame twice that is no copy: {_short([entry.frame for entry in entries])}")
    if len(entries) > policy.total_frames:
        room = f"`total_frames` is {policy.total_frames}"
        _refuse(policy, "begin", f"leaves {len(past)} frames beside the {len(own)} of the chunk; {room}")
    _check_positions(policy, index.positions, len(entries))


def _check_positions(policy: MemoryPolicy, positions: Any, count: int) -> None:
    fits = isinstance(positions, tuple | list) and len(positions) == count
    if not fits or not all(type(place) is int and 0 <= place < policy.total_frames for place in positions):
        _refuse(
            policy,
            "positions",
            f"gives {_short(positions)}; it must give {count} whole numbers from 0 to "
            f"{policy.total_frames - 1}, one for each of `entries`",
        )


def _check_size(policy: MemoryPolicy, name: str, value: object, minimum: int = 1) -> None:
    if type(value) is not int or value < minimum:
        _refuse(policy, name, f"is {value!r}; it must be a whole number of at least {minimum} frames")


def _refuse(policy: MemoryPolicy, name: str, complaint: str) -> NoReturn:
    raise UserError(f"The memory policy {type(policy).__name__} cannot be used: its `{name}` {complaint}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

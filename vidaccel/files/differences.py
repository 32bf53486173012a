"""Where recorded settings and those asked for differ, in words for an error line."""

from collections.abc import Iterator
from typing import Any


def differences(stored: Any, given: Any, name: str = "") -> Iterator[str]:
    """One phrase for each value of nested settings that is not the same: its dotted name, both values."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted({*stored, *given}):
            place = f"{name}.{key}" if name else key
            if key not in given:
                yield f"{place} is {stored[key]!r} there and was not asked for"
            elif key not in stored:
                yield f"{place} is not set there, asked for {given[key]!r}"
            else:
                yield from differences(stored[key], given[key], place)
    elif stored != given:
        yield f"{name} is {stored!r} there, asked for {given!r}"

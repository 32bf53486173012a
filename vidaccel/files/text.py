"""Strict JSON and text, written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_write


def json_number(value: float) -> float | str:
    """`value` as strict JSON can hold it: infinity and nan become "inf", "-inf", "nan"; `float()` reads all back."""
    return value if math.isfinite(value) else str(float(value))


def plain_values(value: Any) -> Any:
    """Nested values as strict JSON holds them: lists for tuples, infinities and NaN as strings."""
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return json_number(value) if isinstance(value, float) else value


def read_text(path: str | Path, what: str) -> str:
    """The text of a file of the user, UTF-8; `what` it is begins the line of UserError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # editors on Windows write a mark first
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} cannot be read: there is no such file.") from error
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} cannot be read: it is no UTF-8 text.") from error


def read_prompt_file(path: str | Path) -> tuple[str, ...]:
    """The prompts of a file, one a line; `#` starts a comment line. Raises UserError where there are none."""
    lines = read_text(path, "The prompt file").split("\n")
    found = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not found:
        raise UserError(f"The prompt file {path} has no prompts; write one on each line.")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")

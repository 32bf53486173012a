"""What comes from a page is checked here: a request can hold anything, whatever the fields of the page allow."""

from __future__ import annotations

import math

from vidaccel.errors import UserError
from vidaccel.rollout.camera import CameraPath

MOST_CHARACTERS = 500
MOST_SEED = 2**63 - 1


def checked_prompt(value: object) -> str:
    """The prompt without blanks around it. Raises UserError for none, and for one that is too long or no text."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise UserError("There is no prompt; say in a few words what the video shows.")
    _check_length("A prompt", text)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("The prompt has characters that are none (surrogates); write it anew.")
    return text


def checked_camera(value: object) -> CameraPath:
    """The moves of a camera, none where the text is empty. Raises UserError for what is no text of moves."""
    if value is None or value == "":
        return CameraPath()
    if not isinstance(value, str):
        raise UserError(f"The camera must be a text, got {_short(value)}.")
    _check_length("The camera", value)
    return CameraPath.parse(value)


def checked_number(name: str, value: object, *, least: float, most: float) -> float:
    """A number between two others. Raises UserError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a number, got {_short(value)}.")
    if not least <= value <= most:
        raise UserError(f"{name} must be from {least:g} to {most:g}, got {value:g}.")
    return value


def checked_count(name: str, value: object, *, least: int, most: int) -> int:
    """A whole number between two others. Raises UserError for anything else."""
    number = value
    if isinstance(value, float) and value.is_integer():
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise UserError(f"{name} must be a whole number from {least} to {most}, got {_short(value)}.")
    return number


def _check_length(name: str, text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{name} has at most {MOST_CHARACTERS} characters; this one has {len(text)}.")


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

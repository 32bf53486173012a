"""The one error that is the user's to solve; the command line prints it as one line and exits with code 2.

Below it the checks that settings share.
"""

import math
from typing import Any


class UserError(ValueError):
    """A wrong value, file or machine: the message names what was got, what is accepted and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or its class name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def check_count(
    name: str, value: Any, *, minimum: int, maximum: int | None = None, optional: bool = False, limit: str = ""
) -> None:
    """Raise UserError where `value` is no whole number in these bounds; `optional`: None will do.

    limit: what the maximum is, for the message.
    """
    if value is None and optional:
        return
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < minimum
        or (maximum is not None and value > maximum)
    ):
        bounds = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}{limit}"
        raise UserError(f"`{name}` must be a whole number {bounds}{' or None' if optional else ''}; got {value!r}.")


def check_amount(name: str, value: float | None, *, is_zero_allowed: bool = False, optional: bool = False) -> None:
    """Raise UserError where `value` is no finite number above 0; `is_zero_allowed`: 0 will do, `optional`: None."""
    if value is None and optional:
        return
    if value is None or not (0 < value < math.inf or (is_zero_allowed and value == 0)):
        bound = "of at least" if is_zero_allowed else "above"
        raise UserError(f"`{name}` must be a finite number {bound} 0, got {value}.")


def check_share(name: str, value: float) -> None:
    """Raise UserError where `value` is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise UserError(f"`{name}` must be from 0 to 1, got {value}.")


def check_seed(value: int) -> None:
    """Raise UserError where `value` is no seed that PyTorch takes."""
    if not 0 <= value < 2**63:
        raise UserError(f"`seed` must be from 0 to 2**63 - 1, got {value}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...], *, function_allowed: bool = False) -> None:
    """Raise UserError where `value` is none of `choices`; `function_allowed`: a function will do."""
    if (function_allowed and callable(value)) or (isinstance(value, str) and value in choices):
        return
    also = " or a function" if function_allowed else ""
    raise UserError(f"`{name}` must be one of {', '.join(choices)}{also}; got {value!r}.")

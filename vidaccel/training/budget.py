"""How much of a training round is done, by the clock or by counting steps."""

import time
from collections.abc import Callable

from vidaccel.errors import UserError, check_amount


def check_length(what: str, **given: float | None) -> None:
    """Raise UserError unless one of the `given` lengths, by their names, is there, and is an end of `what`."""
    lengths = {name: length for name, length in given.items() if length is not None}
    if len(lengths) != 1:
        names = " and ".join(f"`{name}`" for name in given)
        raise UserError(f"Give exactly one of {names} as the length of {what}.")
    for name, length in lengths.items():
        check_amount(name, length)


class Budget:
    """A round of `seconds` or of `steps`, of which the share `start` was used before.

    Only a round counted in steps gives the same weights every time.
    """

    def __init__(
        self,
        *,
        seconds: float | None,
        steps: int | None,
        start: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self.steps, self.start, self._clock = seconds, steps, start, clock
        self._began = clock()

    def elapsed(self) -> float:
        """Seconds since this budget was made."""
        return self._clock() - self._began

    def fraction(self, round_step: int) -> float:
        """Share of the round that is done, `round_step` steps into it; 1 or more is the end."""
        if self.steps is not None:
            return round_step / self.steps
        assert self.seconds is not None
        return self.start + self.elapsed() / max(self.seconds, 1e-3)

"""Results as markdown, for people; the JSON beside it holds everything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vidaccel.bench.shared.statistics import share_interval
from vidaccel.machine.environment import hardware_line

Content = Mapping[str, Any]


def captions(content: Content) -> str:
    """One line for each place the records were measured in, with the command."""
    return "  \n".join(
        f"{hardware_line(environment)}; `{environment['command']}`" for environment in content["environments"]
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    cells = [list(header), ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def share_text(values: Sequence[bool]) -> str:
    """How many are true, with Wilson's 95 % interval."""
    low, high = share_interval(sum(values), len(values))
    return f"{sum(values) / len(values):.1%} [{low:.0%}, {high:.0%}]"


def number_text(value: float, form: str) -> str:
    """A number for people; infinity is a word."""
    return "inf" if math.isinf(value) else format(value, form)

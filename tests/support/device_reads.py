"""Counts what EasyCache reads from the device: each read makes a GPU wait."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode

import vidaccel.easycache

READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "equal", "nonzero"}
HOOKS = Path(vidaccel.easycache.__file__).parent
PLACES = (str(HOOKS),)


class ReadsByVidaccel(TorchFunctionMode):
    """Writes an R for every call of the hooks and the rule that needs a tensor's value on the host."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS and sys._getframe(1).f_code.co_filename.startswith(PLACES):
            self.events.append("R")
        return func(*args, **(kwargs or {}))

"""Bars of other libraries, which would stand between the lines of a command."""

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """For the block, no bars that count parts and tensors; bars of downloads stay."""
    shown = [
        module for module in (diffusers.utils.logging, transformers.utils.logging) if module.is_progress_bar_enabled()
    ]
    for setting in shown:
        setting.disable_progress_bar()
    try:
        yield
    finally:
        for setting in shown:
            setting.enable_progress_bar()

"""A student whose layers read what other layers remember: drawn anew in training, or always the same.

Stochastic KV routing (arXiv 2604.22782), of remembered frames alone: see `DepthMap`. What is read is chosen in front of
the blocks, so that compiled ones serve for every map.
"""

import random
from collections.abc import Callable
from typing import Any

from vidaccel.memory import DepthMap
from vidaccel.models.causal_blocks import History
from vidaccel.training.architecture import Transformer


class ReadingStudent:
    """A student whose blocks find what `change` makes of all that it remembers; else it is `student`."""

    def __init__(self, student: Transformer, change: Callable[[History], History]) -> None:
        self._student, self._change = student, change

    def remember(self, *inputs: Any, **choices: Any) -> History:
        """As the student's, changed."""
        return self._change(self._student.remember(*inputs, **choices))

    def __call__(self, *inputs: Any, **choices: Any) -> Any:
        return self._student(*inputs, **choices)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._student, name)


def reading(student: Transformer, depth: DepthMap) -> Transformer:
    """The student with blocks that read the memory of their leaders; itself where all read their own."""
    return student if depth.is_own else ReadingStudent(student, lambda history: history.read_by(depth))


def drawn_reading(student: Transformer, draw: random.Random, *, kv_routing: float, depth_every: int) -> Transformer:
    """The student as it reads in one step of training.

    kv_routing: probability with which a layer reads a random earlier one's memory; with 0 nothing is drawn, and groups
        of `depth_every` layers share one.
    """
    num_layers = student.config.num_layers
    if kv_routing > 0:
        return reading(student, DepthMap.drawn(kv_routing, num_layers, draw))
    return reading(student, DepthMap.every(depth_every, num_layers))

"""Reuse on a schedule that is fixed beforehand: what the decisions of EasyCache are worth is measured against it."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from vidaccel.easycache.apply import apply_easycache, remove_easycache
from vidaccel.easycache.config import EasyCacheConfig


@contextmanager
def scheduled_reuse(pipe: Any, computed_steps: Collection[int], *, predictor: str) -> Iterator[None]:
    """Compute only `computed_steps` (counted from 0) of a call of `pipe` inside the block and reuse the others.

    A reused step returns what EasyCache with this `predictor` would. The first two computed steps must be 0 and 1:
    without two evaluations there is nothing to reuse, and EasyCache computes whatever the schedule says.
    """
    apply_easycache(pipe, EasyCacheConfig(predictor=predictor), schedule=computed_steps)
    try:
        yield
    finally:
        remove_easycache(pipe)


def random_schedule(num_steps: int, num_computed: int, *, warmup_steps: int, seed: str) -> tuple[int, ...]:
    """`num_computed` of `num_steps` steps: the warm-up, the last one, and the rest drawn evenly in between by `seed`.

    Where warm-up and last step are more than `num_computed` they are all that is computed.
    """
    kept = {*range(min(warmup_steps, num_steps)), num_steps - 1}
    free = [step for step in range(num_steps) if step not in kept]
    num_drawn = min(len(free), max(0, num_computed - len(kept)))
    return tuple(sorted({*kept, *random.Random(seed).sample(free, num_drawn)}))

"""Reuse on a schedule that is fixed beforehand: what the decisions of EasyCache are worth is measured against it."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vidaccel.easycache import EasyCacheConfig
from vidaccel.hooks import apply_easycache, remove_easycache
from vidaccel.report import StepDecision


@contextmanager
def scheduled_reuse(pipe: Any, computed_steps: Collection[int], *, predictor: str) -> Iterator[None]:
    """Compute only `computed_steps` (counted from 0) of a call of `pipe` inside the block and reuse the others.

    A reused step returns what EasyCache with this `predictor` would. The first two computed steps must be 0 and 1:
    without two evaluations there is nothing to reuse, and EasyCache computes whatever the schedule says.
    """
    config = EasyCacheConfig(threshold=math.inf, warmup_steps=2, tail_steps=0, predictor=predictor)

    def arrange_next(decision: StepDecision) -> None:
        """At an infinite threshold a step is computed exactly where it counts as warm-up, so that is what decides."""
        following = decision.step_index + 1
        warmup_steps = following + 1 if following in computed_steps else 0
        run.controller(decision.transformer).config = replace(config, warmup_steps=warmup_steps)

    run = apply_easycache(pipe, config, on_step=arrange_next)
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

"""Reuse on a schedule that is fixed beforehand: what the decisions of EasyCache are worth is measured against it."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

from vidaccel.errors import UserError
from vidaccel.hooks.install import find_transformers
from vidaccel.reuse import Evaluation, Predictor, find_predictor, wants_previous

_HOOK_NAME = "vidaccel_scheduled_reuse"


@contextmanager
def scheduled_reuse(pipe: Any, computed_steps: Collection[int], *, predictor: str) -> Iterator[None]:
    """Compute only `computed_steps` (counted from 0) of a call of `pipe` inside the block and reuse the others.

    A reused step returns what EasyCache with this `predictor` would. The first step of a branch is computed whatever
    the schedule says. For pipelines that name their steps to the transformer, as `WanPipeline` does; a call of any
    other raises UserError.
    """
    registries = [
        HookRegistry.check_if_exists_or_initialize(transformer) for transformer in find_transformers(pipe).values()
    ]
    for registry in registries:
        registry.register_hook(_ScheduledReuse(frozenset(computed_steps), find_predictor(predictor)), _HOOK_NAME)
    try:
        yield
    finally:
        for registry in registries:
            registry.remove_hook(_HOOK_NAME, recurse=False)


class _Branch(BaseState):
    """The last evaluations of one guidance branch, at most two, the newest last."""

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []

    def reset(self) -> None:
        self.evaluations = []


class _ScheduledReuse(ModelHook):
    _is_stateful = True

    def __init__(self, computed_steps: frozenset[int], predict: Predictor) -> None:
        super().__init__()
        state_class: Any = _Branch  # diffusers' annotation asks for an instance
        self.state_manager = StateManager(state_class)
        self._computed_steps = computed_steps
        self._predict: Any = predict
        self._wants_previous = wants_previous(predict)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = self.state_manager._context
        if context is None or context.step_index is None or kwargs.get("return_dict", True):
            raise UserError("A random choice of steps needs a pipeline that says its steps, which is WanPipeline.")
        latents, known = kwargs["hidden_states"], self.state_manager.get_state().evaluations
        if known and context.step_index not in self._computed_steps:
            previous = (known[-2] if len(known) > 1 else None,) if self._wants_previous else ()
            return (self._predict(latents, known[-1], *previous),)
        original: Any = self.fn_ref.original_forward
        output = original(*args, **kwargs)
        known.append(Evaluation(step_index=context.step_index, latents=latents.clone(), output=output[0].clone()))
        del known[:-2]
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.state_manager.reset()
        return module


def random_schedule(num_steps: int, num_computed: int, *, warmup_steps: int, seed: str) -> tuple[int, ...]:
    """`num_computed` of `num_steps` steps: the warm-up, the last one, and the rest drawn evenly in between by `seed`.

    Where warm-up and last step are more than `num_computed` they are all that is computed.
    """
    kept = {*range(min(warmup_steps, num_steps)), num_steps - 1}
    free = [step for step in range(num_steps) if step not in kept]
    num_drawn = min(len(free), max(0, num_computed - len(kept)))
    return tuple(sorted({*kept, *random.Random(seed).sample(free, num_drawn)}))

"""The one place where EasyCache touches a model: a diffusers `ModelHook` around the forward of a whole transformer.

A reused call runs no part of the transformer. The hook lies outside anything that may be compiled, so
`compile_repeated_blocks(fullgraph=True)` keeps whole graphs.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, cast

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vidaccel.catalog.table import transformer_traits
from vidaccel.easycache.batch import Batch, select_rows
from vidaccel.easycache.conditions import conditions_among
from vidaccel.easycache.layout import Matching, Pieces, join_outputs, match_channels, pack, split_outputs, unpack
from vidaccel.easycache.run import EasyCacheRun, GroupSplit
from vidaccel.easycache.steps import Call
from vidaccel.machine.adapters import adapters_of
from vidaccel.machine.private_names import cache_config, is_compiled
from vidaccel.machine.timing import moment

logger = logging.getLogger(__name__)

HOOK_NAME = "vidaccel_easycache"
TIMESTEP_ARGUMENT = "timestep"


class _ContextReceiver(StateManager):
    """Receives the cache context of the pipeline; holds no state of its own, see `EasyCacheRun`."""

    def __init__(self) -> None:
        super().__init__(cast(Any, BaseState))

    @property
    def current(self) -> CacheContext | None:
        return self._context


class EasyCacheHook(ModelHook):
    """Asks the run about every call of one transformer and computes, or returns a predicted output.

    installed, guard: the forward that leads here, and the handle of the check that it is still in place.

    `HookRegistry.remove_hook` wires a forward past the hook above the one it removes: of a hook with a `new_forward`,
    such as this one, only `pre_forward` and `post_forward` are still called. Group offloading comes off and on whenever
    adapters are loaded, so every call first puts that right, see `keep_in_place`.
    """

    _is_stateful = True

    def __init__(self, run: EasyCacheRun, transformer: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = run
        self.transformer = transformer
        self.contexts = _ContextReceiver()
        self.installed: Any = None
        self.guard: RemovableHandle | None = None
        self._forward: Any = None
        self._matchings: tuple[Matching, ...] | None = None
        self._output_type: type | None = None
        self._warned = False

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self._signature = inspect.signature(type(unwrap_module(module)).forward)
        self._traits = transformer_traits(unwrap_module(module))
        self._find_adapters = partial(adapters_of, unwrap_module(module))
        parameters = self._signature.parameters.values()
        self._names = frozenset(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
        self._required = frozenset(each.name for each in parameters if each.default is each.empty) - {"self"}
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.keep_in_place()
        return args, kwargs

    def keep_in_place(self) -> None:
        """Have calls lead to `new_forward` again, and from there to what was wired in its place."""
        reference: Any = self.fn_ref
        if self._forward is None:
            self._forward = reference.forward
        if reference.forward is not self._forward:
            reference.original_forward, reference.forward = reference.forward, self._forward

    def reset_state(self, module: nn.Module) -> nn.Module:
        """diffusers calls this at the end of a pipeline call."""
        self.run.finish()
        return module

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "A transformer with EasyCache cannot be copied or pickled: the copy would run the original's weights. "
            "Call remove_easycache first, copy, then apply_easycache to both."
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = cast(Any, self.fn_ref).original_forward
        if torch.is_grad_enabled() or module.training:
            self._warn_that_it_stays_away(module)
            return forward(*args, **kwargs)
        if is_compiled(module):
            raise RuntimeError(
                f"{type(module).__name__} was compiled as a whole beneath EasyCache, which would leave it uncompiled; "
                "use compile_repeated_blocks(fullgraph=True) instead of compile()."
            )
        if (other := cache_config(module)) is not None:
            raise RuntimeError(
                f"{type(module).__name__} has {type(other).__name__} enabled beside EasyCache; "
                "call disable_cache() or remove_easycache, one cache at a time."
            )
        arguments = self._named(module, args, kwargs)
        call = self._call(module, arguments)
        with self._undone_if_interrupted():  # `on_step` may raise
            split = self.run.enter(self.transformer, call)
        if not split.reused:
            return self._compute(forward, args, kwargs, call=call, split=split)
        if split.computed:
            bound = self._signature.bind(module, *args, **kwargs)
            return self._compute_some(module, forward, bound, call=call, split=split)
        return self._packed(self.run.predict(call, split), split, arguments)

    def _named(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; a call that names them all, as pipelines do, is spared what `bind` costs."""
        if not args and self._required <= kwargs.keys() <= self._names:
            return kwargs
        return self._signature.bind(module, *args, **kwargs).arguments

    def _warn_that_it_stays_away(self, module: nn.Module) -> None:
        """Only training mode and gradients together are training; either alone is likely an oversight."""
        if module.training == torch.is_grad_enabled():
            return
        where, remedy = (
            ("in training mode", ".eval()") if module.training else ("run with gradients", "torch.no_grad()")
        )
        words = f"{type(module).__name__} is {where}, where EasyCache stays out of the way; use {remedy} to reuse steps"
        self.run.stay_away(words)
        if not self._warned:
            self._warned = True
            logger.warning("%s.", words)

    def _compute(self, forward: Any, args: Any, kwargs: Any, *, call: Call, split: GroupSplit) -> Any:
        with self._undone_if_interrupted():
            start = moment(call.source.device)
            result = forward(*args, **kwargs)
            span = start, moment(call.source.device)
            outputs = unpack(result, self._traits)
            matchings = self._learn(call, result, outputs)
            call = self._matched(call, matchings)
            pieces = dict(enumerate(split_outputs(outputs, matchings, split.batch)))
            self.run.record(call, split, pieces, span)
        return result

    def _compute_some(
        self, module: nn.Module, forward: Any, bound: inspect.BoundArguments, *, call: Call, split: GroupSplit
    ) -> Any:
        """Run the model for some samples of the batch and predict the others.

        Compiled blocks run for the whole batch: another size would have them compiled again, which costs more.
        """
        assert self._matchings is not None
        with self._undone_if_interrupted():
            some, part = (bound, split.batch) if _is_compiled(module) else self._selected(bound, split)
            predicted = self.run.predict(call, split)
            start = moment(call.source.device)
            outputs = unpack(forward(*some.args[1:], **some.kwargs), self._traits)
            span = start, moment(call.source.device)
            pieces = split_outputs(outputs, self._matchings, part)
            groups = range(part.num_groups) if part is split.batch else split.computed
            computed = {group: piece for group, piece in zip(groups, pieces, strict=True) if group in split.computed}
            self.run.record(call, split, computed, span)
        return self._packed({**predicted, **computed}, split, bound.arguments)

    def _selected(self, bound: inspect.BoundArguments, split: GroupSplit) -> tuple[inspect.BoundArguments, Batch]:
        """The arguments for the samples to compute, and their batch."""
        rows, num_rows = split.batch.rows(split.computed), split.batch.num_rows
        chosen = select_rows(bound.arguments, rows, num_rows=num_rows, traits=self._traits)
        return inspect.BoundArguments(self._signature, OrderedDict(chosen)), split.batch.part(split.computed)

    def _packed(self, pieces: Pieces, split: GroupSplit, arguments: dict[str, Any]) -> Any:
        assert self._matchings is not None
        return pack(join_outputs(pieces, self._matchings, split.batch), arguments, self._output_type)

    @contextmanager
    def _undone_if_interrupted(self) -> Iterator[None]:
        """An interrupted step leaves nothing behind."""
        try:
            yield
        except BaseException:
            self.run.reset()
            raise

    def _learn(self, call: Call, result: Any, outputs: list[Tensor]) -> tuple[Matching, ...]:
        """How inputs and outputs fit together, and in which form outputs come."""
        if isinstance(result, BaseOutput):
            self._output_type = type(result)
        self._matchings = tuple(
            match_channels(source, output, self._traits) for source, output in zip(call.sources, outputs, strict=True)
        )
        return self._matchings

    def _call(self, module: nn.Module, arguments: dict[str, Any]) -> Call:
        sources = tuple(arguments[name] for name in self._traits.streams)
        others = {name: value for name, value in arguments.items() if value is not module}
        for name in (*self._traits.streams, TIMESTEP_ARGUMENT, "return_dict"):
            others.pop(name, None)
        given, settings = conditions_among(others, moving=self._traits.moving)
        call = Call(
            streams=sources,
            sources=sources,
            timestep=arguments.get(TIMESTEP_ARGUMENT),
            conditions={name: value for name, value in others.items() if isinstance(value, Tensor)},
            given=given,
            settings=settings,
            context=self.contexts.current,
            splits_batch=self._traits.splits_batch,
            find_adapters=self._find_adapters,
        )
        return call if self._matchings is None else self._matched(call, self._matchings)

    @staticmethod
    def _matched(call: Call, matchings: Sequence[Matching]) -> Call:
        """The call with its sources taken apart: what is denoised, and what is given with it on further channels."""
        if all(matching.dim is None for matching in matchings):
            return call  # inputs and outputs of one shape
        pairs = list(zip(matchings, call.sources, strict=True))
        behind = {f"channels {index}": matching.behind(source) for index, (matching, source) in enumerate(pairs)}
        found = {name: tensor for name, tensor in behind.items() if tensor is not None}
        streams = tuple(matching.narrow(source) for matching, source in pairs)
        return replace(call, streams=streams, given={**call.given, **found})


def _is_compiled(module: nn.Module) -> bool:
    """Whether any part of the model is compiled, as `compile_repeated_blocks` does with its blocks."""
    return any(is_compiled(part) for part in module.modules())

"""Where in a generation a call of the transformer is: which step, which branch, and whether a new generation began.

Pipelines tell this in different ways, so three sources are used, best first:

1. the cache context's `step_index` (`WanPipeline`): exact, on the host;
2. the scheduler of the pipeline EasyCache was applied to: every call makes a new `timesteps` tensor, every step moves
   `step_index`; both are host values. A pipeline whose own present timestep stays while its scheduler has moved on was
   aborted, and another one with another scheduler is calling;
3. values, where the hook was put on a bare transformer whose pipeline gives no `step_index`, or another pipeline
   drives a shared one: a timestep that does not fall starts a new generation, equal timesteps and latents are the next
   branch of a step. Timesteps are taken to fall during a generation. The comparison is done on the device and read
   together with the statistics of the decision, so that a step still has one read.

Nothing is counted in calls and nothing relies on the end of the last generation: an exception at any point is safe.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

TEXT_ARGUMENT = "encoder_hidden_states"

Kind = Literal["generation", "step", "branch"]
Identity = tuple[Callable[[], Any], int]


@dataclass(frozen=True, kw_only=True)
class Place:
    """kind: what the call opens: a new generation, a new step, or only a further branch of the step.

    rises: the generation was opened because the timestep rose.
    repeats: the generation is another window with the schedule of the one before.
    """

    kind: Kind
    step_index: int
    branch: str
    rises: bool = False
    repeats: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the transformer as the hook sees it.

    streams: what is denoised, one tensor a stream: the part of the inputs that the outputs are matched with, for
        instance (B, C, F, H, W) or (B, L, C).
    sources: the same tensors as the caller gave them, which may have more channels.
    conditions: the other tensors given, by argument name.
    context: diffusers' `CacheContext`, or None.
    splits_batch: whether the model can be run for some samples of the batch, see `TransformerTraits`.
    find_adapters: tells which adapters the model runs with, see `adapters_of`.
    """

    streams: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    timestep: Any
    conditions: Mapping[str, Tensor]
    context: Any
    splits_batch: bool = False
    find_adapters: Callable[[], Hashable] = tuple

    @property
    def latents(self) -> Tensor:
        """The first stream."""
        return self.streams[0]

    @property
    def source(self) -> Tensor:
        """The first stream as the caller gave it."""
        return self.sources[0]


class PlaceTracker:
    """Finds the place of every call; one for all transformers of a pipeline, which share their steps."""

    def __init__(self, find_pipe: Callable[[], Any]) -> None:
        """`find_pipe` returns the pipeline EasyCache was applied to, or None."""
        self._find_pipe = find_pipe
        self._timesteps = getattr(self.scheduler, "timesteps", None)
        self.forget()

    @property
    def scheduler(self) -> Any:
        """The scheduler of the pipeline, or None."""
        return getattr(self._find_pipe(), "scheduler", None)

    def forget(self) -> None:
        """The next call starts a new generation."""
        self.step_index = -1
        self.num_steps: int | None = None
        self.scheduler_is_live = False
        self.pipe_is_live = False
        self._branches: list[str] = []
        self._scheduler_index: int | None = None
        self._pipe_timestep: Callable[[], Any] | None = None
        self._source: Identity | None = None
        self._time: Identity | None = None
        self._conditions: dict[str, Identity | None] = {}
        self._text: Callable[[], Any] | None = None
        self._timestep: Tensor | None = None
        self._fingerprint: Tensor | None = None

    def locate(self, call: Call, find_previous_latents: Callable[[], Tensor | None]) -> Place | Tensor:
        """The place of the call, or questions: a tensor of 0 and 1 on the device whose values `answer` takes."""
        context = call.context
        if context is not None and context.step_index is not None:
            return self._locate_by_index(context)
        name = None if context is None else context.name
        scheduler = self.scheduler
        if self.step_index < 0 or getattr(scheduler, "timesteps", None) is not self._timesteps:
            return self._open("generation", 0, name)
        if self.scheduler_is_live and _scheduler_index(scheduler) != self._scheduler_index:
            if self._pipe_timestep_unchanged():
                return self._open("generation", 0, name)
            return self._open("step", self.step_index + 1, name)
        if self.scheduler_is_live and self._scheduler_index is None and self._has_moved(name):
            if self.num_steps is not None and self.step_index + 1 >= self.num_steps:
                return replace(self._open("generation", 0, name), repeats=True)  # SkyReels-V2
            return self._open("step", self.step_index + 1, name)
        if name is not None and name not in self._branches:
            return self._open("branch", self.step_index, name)
        if name is None and self._is_same(call):
            return self._open("branch", self.step_index, None)
        return self._questions(call, find_previous_latents())

    def answer(self, call: Call, answers: Sequence[float]) -> Place:
        """The place of a call that could not be located on the host."""
        name = None if call.context is None else call.context.name
        falls, is_equal, same_latents, same_conditions = (bool(value) for value in answers)
        if falls:
            return self._open("step", self.step_index + 1, name)
        stands_still = self.scheduler_is_live and self._pipe_timestep_unchanged()
        if name is None and is_equal and (stands_still or (same_latents and not same_conditions)):
            return self._open("branch", self.step_index, None)
        rises = self._timestep is not None and not is_equal
        return replace(self._open("generation", 0, name), rises=rises)

    def enter(self, place: Place, call: Call) -> None:
        """Take the call in as the present place."""
        if place.kind == "generation":
            timesteps = getattr(self.scheduler, "timesteps", None)
            live = timesteps is not None and (timesteps is not self._timesteps or place.repeats)
            self.forget()
            self._timesteps, self.scheduler_is_live = timesteps, live
            self.pipe_is_live = live and is_view(self._present_timestep(), timesteps)
        if place.kind != "branch":
            self._branches = []
            self._scheduler_index = _scheduler_index(self.scheduler)
            self._pipe_timestep = weakref.ref(self._present_timestep()) if self.pipe_is_live else None
            self._source, self._time = _identity(call.source), _identity(call.timestep)
            self._conditions = {name: _identity(value) for name, value in call.conditions.items()}
            text = call.conditions.get(TEXT_ARGUMENT)
            self._text = None if text is None else weakref.ref(text)
            self._keep_values(call)
        self.step_index = place.step_index
        self._branches.append(place.branch)
        if call.context is not None and call.context.num_inference_steps is not None:
            self.num_steps = call.context.num_inference_steps

    def is_through(self) -> bool:
        """Whether the generation has reached its last step, as far as its number of steps is known."""
        return self.step_index >= 0 and self.num_steps in (None, self.step_index + 1)

    def has_same_text(self, call: Call) -> bool:
        """Whether the call got the very text embeddings of the step before: another loop of the same pipeline call."""
        return self._text is not None and self._text() is call.conditions.get(TEXT_ARGUMENT)

    def has_same_latents(self, call: Call) -> bool:
        """Whether the call got the very tensor that the deciding call of this step got, unchanged since."""
        return _is_identical(self._source, call.source)

    def _present_timestep(self) -> Any:
        return getattr(self._find_pipe(), "_current_timestep", None)

    def _pipe_timestep_unchanged(self) -> bool:
        """The pipeline that drove this generation has not gone on since the last step: it is not the one calling."""
        return self._pipe_timestep is not None and self._pipe_timestep() is self._present_timestep()

    def _has_moved(self, name: str | None) -> bool:
        """Whether a new step began, of a pipeline whose scheduler does not count them.

        The pipeline's present timestep tells it (DDIM), or a branch that is here again (a scheduler for every frame).
        """
        if self.pipe_is_live:
            return not self._pipe_timestep_unchanged()
        return name in self._branches

    def _open(self, kind: Kind, step_index: int, name: str | None) -> Place:
        number = len(self._branches) if kind == "branch" else 0
        return Place(kind=kind, step_index=step_index, branch=f"#{number}" if name is None else name)

    def _locate_by_index(self, context: Any) -> Place:
        index, total = context.step_index, context.num_inference_steps
        if self.step_index >= 0 and total == self.num_steps:
            if index == self.step_index and context.name not in self._branches:
                return self._open("branch", index, context.name)
            if index == self.step_index + 1:
                return self._open("step", index, context.name)
        return self._open("generation", index, context.name)

    def _is_same(self, call: Call) -> bool:
        """Another branch of the step, by the identity of the tensors: latents and timestep as before, conditions not.

        The same conditions too would be the first call once more, after an interruption, unless a live scheduler
        says that no call has begun since: both branches may be given the very same prompt. Then the latents may differ
        as well: some image-to-video pipelines put other conditions into those of the unconditional branch. Pipelines of
        blocks show no present timestep and make the argument anew for every branch.
        """
        if not _is_identical(self._time, call.timestep):
            return self.scheduler_is_live and not self.pipe_is_live and self.has_same_latents(call)
        if not self.has_same_latents(call):
            return self.scheduler_is_live and self.pipe_is_live
        repeated = all(_is_identical(self._conditions.get(name), value) for name, value in call.conditions.items())
        return self.scheduler_is_live or not repeated

    def _keep_values(self, call: Call) -> None:
        """What a later call is compared with if it has to be located by values: two numbers on the device."""
        if call.context is not None and call.context.step_index is not None:
            return
        self._timestep = _mean_timestep(call)
        self._fingerprint = _fingerprint(call)

    def _questions(self, call: Call, previous_latents: Tensor | None) -> Tensor:
        device = call.latents.device
        if self._timestep is None or self._fingerprint is None:
            return torch.zeros(4, device=device)
        now, before = _mean_timestep(call), self._timestep.to(device)
        same_latents = torch.zeros((), dtype=torch.bool, device=device)
        if previous_latents is not None and previous_latents.shape == call.latents.shape:
            same_latents = (previous_latents == call.latents).all()
        same_conditions = _fingerprint(call) == self._fingerprint.to(device)
        return torch.stack([now < before, now == before, same_latents, same_conditions]).float()


def is_view(value: Any, base: Any) -> bool:
    """Whether both are tensors and share their memory."""
    if not isinstance(value, Tensor) or not isinstance(base, Tensor):
        return False
    return value.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _scheduler_index(scheduler: Any) -> int | None:
    return getattr(scheduler, "step_index", None)


def _mean_timestep(call: Call) -> Tensor:
    """The timestep, or the mean of those of all tokens or frames: a scalar on the device of the latents."""
    timestep = 0.0 if call.timestep is None else call.timestep
    return torch.as_tensor(timestep, device=call.latents.device).float().mean()


def _fingerprint(call: Call) -> Tensor:
    """A number that tells the conditions of two named or unnamed branches apart; equal for equal conditions."""
    total = torch.zeros((), device=call.latents.device)
    if call.context is not None:  # a name tells them apart already
        return total
    for position, name in enumerate(sorted(call.conditions), start=1):
        values = call.conditions[name].flatten().to(total)
        # Weighted, because a plain sum of normalized embeddings is 0 for every prompt.
        total = total + position * (values * torch.linspace(1, 2, values.numel(), device=values.device)).sum()
    return total


def _identity(value: Any) -> Identity | None:
    """A weak reference to a tensor with its version; None for what cannot be followed."""
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return weakref.ref(value), value._version


def _is_identical(identity: Identity | None, value: Any) -> bool:
    """Whether the value is the very tensor that was seen, not changed in place since."""
    if identity is None or not isinstance(value, Tensor):
        return False
    reference, version = identity
    return reference() is value and value._version == version

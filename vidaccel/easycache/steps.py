"""Where in a generation a call of the transformer is: which step, which branch, and whether a new generation began.

Pipelines tell this in different ways. Three classes each know one of them, and `PlaceTracker.locate` asks them in turn:

1. `ByIndex`: the cache context's `step_index` (`WanPipeline`): exact, on the host;
2. `ByScheduler`: the scheduler of the pipeline EasyCache was applied to. Every call of the pipeline makes a new
   `timesteps` tensor, every step moves `step_index`, both on the host;
3. `ByValues`: timestep, latents and conditions, where EasyCache was put on a bare transformer whose pipeline gives no
   `step_index`, or another pipeline drives a shared one. What the identity of the tensors does not tell is compared on
   the device and read together with the statistics of the decision, so that a step still has one read.

Nothing is counted in calls and nothing relies on the end of the last generation: an exception at any point is safe.

A guided call of two steps as each of them sees it, and the start of the next call:

    pass      context    scheduler.timesteps, step_index    timestep, latents, text    place
    cond      0 of 2     a new tensor, None                 999, x0, "cat"             generation, step 0, "cond"
    uncond    0 of 2     the same, None                     999, x0, ""                branch of step 0
    cond      1 of 2     the same, 1                        500, x1, "cat"             step 1
    uncond    1 of 2     the same, 1                        500, x1, ""                branch of step 1
    cond      0 of 2     a new tensor, None                 999, x0, "dog"             generation, step 0
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vidaccel.catalog.table import pipeline_traits
from vidaccel.easycache.conditions import Identity, fingerprint, identity_of, is_equal, is_identical
from vidaccel.machine.private_names import current_timestep, num_timesteps

TEXT_ARGUMENT = "encoder_hidden_states"

Kind = Literal["generation", "step", "branch"]


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
    given, settings: the tensors and plain values, in lists and mappings too, that stay the same unless the caller
        changes a condition: all but those of `TransformerTraits.moving`, and the further channels of the sources.
    context: diffusers' `CacheContext`, or None.
    splits_batch: whether the model can be run for some samples of the batch, see `TransformerTraits`.
    find_adapters: tells which adapters the model runs with, see `adapters_of`.
    """

    streams: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    timestep: Any
    conditions: Mapping[str, Tensor]
    given: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    context: Any = None
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

    @property
    def name(self) -> str | None:
        """The name of the branch, if the pipeline gives one."""
        return None if self.context is None else self.context.name


@dataclass(kw_only=True)
class Position:
    """Where the last call was: its step (-1: none yet), how many there are, the branches of the step so far."""

    step_index: int = -1
    num_steps: int | None = None
    branches: list[str] = field(default_factory=list)

    def open(self, kind: Kind, step_index: int, name: str | None) -> Place:
        """The place of a call that opens this; branches without names are numbered."""
        number = len(self.branches) if kind == "branch" else 0
        return Place(kind=kind, step_index=step_index, branch=f"#{number}" if name is None else name)

    def next_step(self, name: str | None) -> Place:
        """The place of a call that opens the step after this one."""
        return self.open("step", self.step_index + 1, name)


class ByIndex:
    """By the step that the pipeline names itself."""

    def locate(self, call: Call, at: Position) -> Place | None:
        """The place, or None where the pipeline names none."""
        context = call.context
        if context is None or context.step_index is None:
            return None
        index, total = context.step_index, context.num_inference_steps
        if at.step_index >= 0 and total == at.num_steps:
            if index == at.step_index and context.name not in at.branches:
                return at.open("branch", index, context.name)
            if index == at.step_index + 1:
                return at.open("step", index, context.name)
        return at.open("generation", index, context.name)


class ByScheduler:
    """By the scheduler of the pipeline EasyCache was applied to.

    A pipeline whose own present timestep stays while its scheduler has moved on was aborted, and another one with
    another scheduler is calling.

    is_live: the scheduler drives the generation under way; pipe_is_live: and the pipeline shows its present timestep.
    """

    def __init__(self, find_pipe: Callable[[], Any]) -> None:
        self._find_pipe = find_pipe
        self._timesteps = getattr(self.scheduler, "timesteps", None)
        self.forget()

    @property
    def scheduler(self) -> Any:
        """The scheduler of the pipeline, or None."""
        return getattr(self._find_pipe(), "scheduler", None)

    def forget(self) -> None:
        """No generation is under way."""
        self.is_live = self.pipe_is_live = False
        self._index: int | None = None
        self._pipe_timestep: Callable[[], Any] | None = None

    def locate(self, call: Call, at: Position) -> Place | None:
        """The place, or None where the scheduler has not moved since the last call, or does not drive this one."""
        scheduler = self.scheduler
        if at.step_index < 0 or getattr(scheduler, "timesteps", None) is not self._timesteps:
            return at.open("generation", 0, call.name)
        if not self.is_live:
            return None
        if getattr(scheduler, "step_index", None) != self._index:
            return at.open("generation", 0, call.name) if self.stands_still() else at.next_step(call.name)
        if self._index is None and self._has_moved(call.name, at):
            if at.num_steps is not None and at.step_index + 1 >= at.num_steps:
                return replace(at.open("generation", 0, call.name), repeats=True)  # SkyReels-V2
            return at.next_step(call.name)
        return None

    def enter(self, place: Place) -> None:
        """Take a call in as the present place."""
        if place.kind == "generation":
            timesteps = getattr(self.scheduler, "timesteps", None)
            self.is_live = timesteps is not None and (timesteps is not self._timesteps or place.repeats)
            self.pipe_is_live = self.is_live and is_view(self._present_timestep(), timesteps)
            self._timesteps = timesteps
        if place.kind != "branch":
            self._index = getattr(self.scheduler, "step_index", None)
            self._pipe_timestep = weakref.ref(self._present_timestep()) if self.pipe_is_live else None

    def planned_steps(self, call: Call) -> int | None:
        """How many steps the generation that this call opens will have; None where the scheduler does not drive it.

        A shortened schedule (`strength`) shows in where the first timestep lies in the scheduler's tensor of them.
        """
        if not self.is_live:
            return None
        scheduler, pipe = self.scheduler, self._find_pipe()
        timesteps = scheduler.timesteps
        of_pipe = num_timesteps(pipe, len(timesteps))
        if self.pipe_is_live:
            return of_pipe - pipeline_traits(pipe).left_out_steps
        if is_view(call.timestep, timesteps):
            return len(timesteps) - int(call.timestep.storage_offset() - timesteps.storage_offset())
        begin: int | None = getattr(scheduler, "begin_index", None)
        # Without: a schedule of its own, such as a row of timesteps for every frame.
        return of_pipe if begin is None else len(timesteps) - begin

    def stands_still(self) -> bool:
        """Whether the pipeline that drove this generation shows the same timestep as at the last step."""
        return self._pipe_timestep is not None and self._pipe_timestep() is self._present_timestep()

    def _present_timestep(self) -> Any:
        return current_timestep(self._find_pipe())

    def _has_moved(self, name: str | None, at: Position) -> bool:
        """Whether a new step began, of a pipeline whose scheduler does not count them.

        The pipeline's present timestep tells it (DDIM), or a branch that is here again (a scheduler for every frame).
        """
        return not self.stands_still() if self.pipe_is_live else name in at.branches


class ByValues:
    """By timestep, latents and conditions: their identity where that is enough, else their values.

    Timesteps are taken to fall during a generation. A timestep that rises starts a new one. An equal one is the next
    branch if the latents are equal too, else the second evaluation of a step (Heun); at the first step, which has only
    one, it is a new generation.
    """

    def __init__(self, scheduler: ByScheduler) -> None:
        self._scheduler = scheduler
        self.forget()

    def forget(self) -> None:
        """No generation is under way."""
        self._source: Identity | None = None
        self._time: Identity | None = None
        self._conditions: dict[str, Identity | None] = {}
        self._timestep: Tensor | None = None
        self._prints: list[Tensor] = []
        self._seen: tuple[dict[str, Identity | None], Tensor | None] = ({}, None)

    def locate(self, call: Call, at: Position) -> Place | Tensor:
        """The place, or questions: a tensor of 0 and 1 on the device whose values `answer` takes."""
        if call.name is not None and call.name not in at.branches:
            return at.open("branch", at.step_index, call.name)
        if call.name is None and self._is_same(call):
            return at.open("branch", at.step_index, None)
        if self._timestep is None:
            return torch.zeros(4, device=call.latents.device)
        now, before = _mean_timestep(call), self._timestep.to(call.latents.device)
        same = [is_equal(*each).float() for each in zip(self._prints_of(call), self._prints, strict=True)]
        return torch.stack([(now < before).float(), (now == before).float(), *same])

    def answer(self, call: Call, at: Position, answers: Sequence[float]) -> Place:
        """The place of a call that could not be located on the host."""
        falls, is_equal, same_latents, same_conditions = (bool(value) for value in answers)
        if falls:
            return at.next_step(call.name)
        stands_still = self._scheduler.is_live and self._scheduler.stands_still()
        if is_equal and call.name is None and (stands_still or (same_latents and not same_conditions)):
            return at.open("branch", at.step_index, None)
        if is_equal and not same_latents and at.step_index > 0:
            return at.next_step(call.name)
        rises = self._timestep is not None and not is_equal
        return replace(at.open("generation", 0, call.name), rises=rises)

    def enter(self, place: Place, call: Call) -> None:
        """Take a call in as the present place."""
        if place.kind == "branch":
            return
        self._source, self._time = identity_of(call.source), identity_of(call.timestep)
        self._conditions = {name: identity_of(value) for name, value in call.conditions.items()}
        self.keep_values(call)

    def keep_values(self, call: Call) -> None:
        """What a later call is compared with if it has to be located by values: a few numbers on the device."""
        if call.context is None or call.context.step_index is None:
            self._timestep, self._prints = _mean_timestep(call), self._prints_of(call)

    def has_same_latents(self, call: Call) -> bool:
        """Whether the call got the very tensor that the deciding call of this step got, unchanged since."""
        return is_identical(self._source, call.source)

    def _is_same(self, call: Call) -> bool:
        """Another branch of the step, by the identity of the tensors: latents and timestep as before, conditions not.

        - The same conditions too would be the first call once more, after an interruption, unless a live scheduler
          says that no call has begun since: both branches may be given the very same prompt.
        - Then the latents may differ as well: some image-to-video pipelines put other conditions into those of the
          unconditional branch.
        - Pipelines of blocks show no present timestep and make the argument anew for every guidance pass.
        """
        live, pipe_is_live = self._scheduler.is_live, self._scheduler.pipe_is_live
        if not is_identical(self._time, call.timestep):
            return live and not pipe_is_live and self.has_same_latents(call)
        if not self.has_same_latents(call):
            return live and pipe_is_live
        repeated = all(is_identical(self._conditions.get(name), value) for name, value in call.conditions.items())
        return live or not repeated

    def _prints_of(self, call: Call) -> list[Tensor]:
        """Of the latents, and of the conditions unless a name tells branches apart already."""
        return [
            fingerprint(call.latents),
            self._print_of_conditions({} if call.context is not None else call.conditions, call.latents.device),
        ]

    def _print_of_conditions(self, conditions: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """One for all; that of the very tensors seen last is taken from there."""
        seen, found = self._seen
        same = seen.keys() == conditions.keys() and all(is_identical(seen[name], conditions[name]) for name in seen)
        if found is None or not same or found.device != device:
            whole = [fingerprint(conditions[name]).to(device) * (2 + k) for k, name in enumerate(sorted(conditions))]
            found = torch.stack(whole).sum(0) if whole else torch.zeros(2, device=device)
            self._seen = {name: identity_of(value) for name, value in conditions.items()}, found
        return found


class PlaceTracker:
    """Finds the place of every call; one for all transformers of a pipeline, which share their steps."""

    def __init__(self, find_pipe: Callable[[], Any]) -> None:
        """`find_pipe` returns the pipeline EasyCache was applied to, or None."""
        self.index, self.scheduler = ByIndex(), ByScheduler(find_pipe)
        self.values = ByValues(self.scheduler)
        self.at = Position()
        self._text: Callable[[], Any] | None = None

    def locate(self, call: Call) -> Place | Tensor:
        """The place of the call, or questions whose answers, once read, `answer` takes."""
        found = self.index.locate(call, self.at) or self.scheduler.locate(call, self.at)
        return self.values.locate(call, self.at) if found is None else found

    def answer(self, call: Call, answers: Sequence[float]) -> Place:
        """The place of a call that could not be located on the host."""
        return self.values.answer(call, self.at, answers)

    def enter(self, place: Place, call: Call) -> None:
        """Take the call in as the present place."""
        if place.kind == "generation":
            self.forget()
        self.scheduler.enter(place)
        self.values.enter(place, call)
        if place.kind != "branch":
            self.at.branches = []
            text = call.conditions.get(TEXT_ARGUMENT)
            self._text = None if text is None else weakref.ref(text)
        self.at.step_index = place.step_index
        self.at.branches.append(place.branch)
        if call.context is not None and call.context.num_inference_steps is not None:
            self.at.num_steps = call.context.num_inference_steps

    def forget(self) -> None:
        """The next call starts a new generation."""
        self.at, self._text = Position(), None
        self.scheduler.forget()
        self.values.forget()

    def is_through(self) -> bool:
        """Whether the generation has reached its last step, as far as its number of steps is known."""
        return self.at.step_index >= 0 and self.at.num_steps in (None, self.at.step_index + 1)

    def has_same_text(self, call: Call) -> bool:
        """Whether the call got the very text embeddings of the step before: another loop of the same pipeline call."""
        return self._text is not None and self._text() is call.conditions.get(TEXT_ARGUMENT)


def is_view(value: Any, base: Any) -> bool:
    """Whether both are tensors and share their memory."""
    if not isinstance(value, Tensor) or not isinstance(base, Tensor):
        return False
    return value.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _mean_timestep(call: Call) -> Tensor:
    """The timestep, or the mean of those of all tokens or frames: a scalar on the device of the latents."""
    timestep = 0.0 if call.timestep is None else call.timestep
    return torch.as_tensor(timestep, device=call.latents.device).float().mean()

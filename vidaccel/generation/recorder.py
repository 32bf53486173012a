"""What is seen of a running pipeline from outside: its steps, the forwards that really ran, and the clock."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vidaccel.easycache.report import StepDecision
from vidaccel.machine.components import denoisers
from vidaccel.machine.private_names import execution_device
from vidaccel.machine.timing import Moment, moment, seconds_between


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """One finished denoising step: `seconds` since the first transformer call, by the host's clock.

    A video made of several sections goes on counting: `num_steps` are those of the sections begun so far.
    """

    step_index: int
    num_steps: int
    computed: bool
    seconds: float


class Recorder:
    """Counts the transformer forwards that run, reads the clock, and passes finished steps on; one per call.

    Steps are what the pipeline reports; where it has no callback, a step ends when its scheduler has moved on.
    parameters: of the pipeline's call.
    """

    def __init__(
        self, pipe: Any, *, parameters: Mapping[str, Any], on_step: Callable[[StepProgress], None] | None
    ) -> None:
        self.pipe = pipe
        self.parameters = parameters
        self.reports_steps = "callback_on_step_end" in parameters
        self.on_step = on_step
        self.num_forwards = 0
        self.computed = True
        self.first: float | None = None
        self.last: float | None = None
        self._num_finished = 0
        self._num_earlier = 0
        self._place: Any = None
        self._span: tuple[Moment, Moment] | None = None

    def denoising_seconds(self, finished: float) -> float:
        """Seconds of the loop; `finished` stands in for the end where nothing was seen of it."""
        if self._span is not None:
            return seconds_between(*self._span)
        last = finished if self.last is None else self.last
        return 0.0 if self.first is None else last - self.first

    def decide(self, decision: StepDecision) -> None:
        """Take a decision of EasyCache, made before the step runs."""
        self.computed = decision.computed

    def callback_arguments(self) -> dict[str, Any]:
        """Keyword arguments that make the pipeline report its steps, if it can."""
        if not self.reports_steps:
            return {}
        wanted = {"callback_on_step_end": self._end_step, "callback_on_step_end_tensor_inputs": []}
        return {name: value for name, value in wanted.items() if name in self.parameters}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the transformers: their first call starts the clock, their first layer counts what really runs."""
        handles = []
        for model in denoisers(self.pipe):
            handles.append(model.register_forward_pre_hook(self._start))
            handles.append(first_layer(model).register_forward_pre_hook(self._count))
            if not self.reports_steps:
                handles.append(model.register_forward_hook(self._end_call))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._span is not None:
            self._finish_step(self._total_steps(), self._span[1].host)

    def _start(self, *_: Any) -> None:
        if self.first is None:
            self.first = now(self.pipe)
        if self.reports_steps:
            return
        if self._span is None:
            start = moment(execution_device(self.pipe))
            self._span = start, start
        scheduler = getattr(self.pipe, "scheduler", None)
        place = id(getattr(scheduler, "timesteps", None)), getattr(scheduler, "step_index", None) or 0
        if self._place is not None and place != self._place:
            self._finish_step(self._total_steps(), self._span[1].host)
        self._place = place

    def _count(self, *_: Any) -> None:
        self.num_forwards += 1

    def _end_call(self, *_: Any) -> None:
        if self._span is not None:  # any call may be the last one, so that the device is not waited for
            self._span = self._span[0], moment(execution_device(self.pipe))

    def _end_step(self, pipe: Any, step_index: int, *_: Any) -> dict[str, Any]:
        num_steps = self._total_steps()
        self.last = now(pipe) if step_index == num_steps - 1 else time.perf_counter()
        if step_index < self._num_finished - self._num_earlier:
            self._num_earlier = self._num_finished
        self._finish_step(num_steps, self.last)
        return {}

    def _total_steps(self) -> int:
        own = getattr(self.pipe, "num_timesteps", None)
        return own if isinstance(own, int) else len(self.pipe.scheduler.timesteps)

    def _finish_step(self, num_steps: int, ended: float) -> None:
        self._num_finished += 1
        if self.on_step is None:
            return
        start = ended if self.first is None else self.first
        self.on_step(
            StepProgress(
                step_index=self._num_finished - 1,
                num_steps=self._num_earlier + num_steps,
                computed=self.computed,
                seconds=ended - start,
            )
        )


def first_layer(model: torch.nn.Module) -> torch.nn.Module:
    """The first child with weights: the patch embedding, which runs once in every forward and is never compiled."""
    return next(child for child in model.children() if any(True for _ in child.parameters()))


def now(pipe: Any) -> float:
    """Seconds of the host's clock once the device has done all its work."""
    device = execution_device(pipe)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

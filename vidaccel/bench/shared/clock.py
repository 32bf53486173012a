"""Times of the denoising loop: of every step and of every transformer call, by CUDA events or the host's clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_READS = frozenset(
    {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__", "__float__", "__int__", "__index__"}
)


@dataclass(frozen=True, kw_only=True)
class LoopTimes:
    """Milliseconds of one denoising loop, from its first transformer call to the end of its last step.

    steps: whole steps, guidance and scheduler included. calls: transformer calls of each step.
    num_forwards: transformer forwards that really ran, counted at one of the transformer's own layers.
    reads: how often the host read the device's memory in the transformer calls of each step; empty if not counted.
    """

    total: float
    steps: tuple[float, ...]
    calls: tuple[tuple[float, ...], ...]
    num_forwards: int
    reads: tuple[int, ...] = ()


class DeviceClock:
    """Points in time on a device's own time line: CUDA events, or the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        """The point at which the work that is queued so far is done."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds between two points that have passed."""
        return begin.elapsed_time(end) if self._device.type == "cuda" else 1000 * (end - begin)

    def synchronise(self) -> None:
        """Wait until all queued work is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _HostReads(TorchFunctionMode):
    """Counts the operations that bring values of one device to the host, where the host waits for the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device_type = device.type
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if isinstance(source, torch.Tensor) and source.device.type == self._device_type:
            moved = isinstance(result, torch.Tensor) and result.device.type != self._device_type
            self.count += moved or getattr(func, "__name__", "") in _READS
        return result


class LoopClock:
    """Watches one call of a diffusers pipeline; a step ends where the scheduler's step does."""

    def __init__(self, pipe: Any, device: torch.device, *, counted: str, reads_from: int | None = None) -> None:
        """`counted` names a part of the transformer that runs in every forward.

        reads_from: count reads of device memory from this step on, which must be reused ones, as nothing that is
        compiled may run under the counter.
        """
        self._transformer: torch.nn.Module = pipe.transformer
        self._scheduler = pipe.scheduler
        self._counted = counted
        self._device = device
        self._clock = DeviceClock(device)
        self._calls: list[list[Any]] = [[]]
        self._ends: list[Any] = []
        self._num_forwards = 0
        self._reads_from = reads_from
        self._reads = [0]
        self._counter: _HostReads | None = None

    @contextmanager
    def watch(self) -> Iterator[LoopClock]:
        """Record inside the block; the device is idle when it begins."""
        handles = [
            self._transformer.register_forward_pre_hook(self._begin_call),
            self._transformer.register_forward_hook(self._end_call),
            self._transformer.get_submodule(self._counted).register_forward_pre_hook(self._count),
        ]
        scheduler_step = self._scheduler.step

        def step(*arguments: Any, **options: Any) -> Any:
            result = scheduler_step(*arguments, **options)
            self._ends.append(self._clock.now())
            self._calls.append([])
            self._reads.append(0)
            return result

        self._scheduler.step = step
        self._clock.synchronise()
        try:
            yield self
        finally:
            del self._scheduler.step
            for handle in handles:
                handle.remove()

    def times(self) -> LoopTimes:
        """The finished loop's times."""
        self._clock.synchronise()
        calls = self._calls[:-1]
        start = calls[0][0]
        begins = [start, *self._ends[:-1]]
        return LoopTimes(
            total=self._clock.between(start, self._ends[-1]),
            steps=tuple(self._clock.between(*pair) for pair in zip(begins, self._ends, strict=True)),
            calls=tuple(
                tuple(self._clock.between(*pair) for pair in zip(marks[::2], marks[1::2], strict=True))
                for marks in calls
            ),
            num_forwards=self._num_forwards,
            reads=() if self._reads_from is None else tuple(self._reads[self._reads_from : -1]),
        )

    def _begin_call(self, *_: Any) -> None:
        self._calls[-1].append(self._clock.now())
        if self._reads_from is not None and len(self._ends) >= self._reads_from:
            self._counter = _HostReads(self._device)
            self._counter.__enter__()

    def _end_call(self, *_: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._reads[-1] += self._counter.count
            self._counter = None
        self._calls[-1].append(self._clock.now())

    def _count(self, *_: Any) -> None:
        self._num_forwards += 1

"""Times of the denoising loop: of every step and of every transformer call, by CUDA events or the host's clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class LoopTimes:
    """Milliseconds of one denoising loop, from its first transformer call to the end of its last step.

    steps: whole steps, guidance and scheduler included. calls: transformer calls of each step.
    num_forwards: transformer forwards that really ran, counted at the transformer's first layer.
    """

    total: float
    steps: tuple[float, ...]
    calls: tuple[tuple[float, ...], ...]
    num_forwards: int


class LoopClock:
    """Watches one call of a Wan pipeline; give `callback` to the pipeline as `callback_on_step_end`."""

    def __init__(self, transformer: torch.nn.Module, device: torch.device) -> None:
        self._transformer = transformer
        self._device = device
        self._calls: list[list[Any]] = [[]]
        self._ends: list[Any] = []
        self._num_forwards = 0

    @contextmanager
    def watch(self) -> Iterator[LoopClock]:
        """Record inside the block; the device is idle when it begins."""
        first_layer = self._transformer.get_submodule("patch_embedding")
        handles = [
            self._transformer.register_forward_pre_hook(self._mark_call),
            self._transformer.register_forward_hook(self._mark_call),
            first_layer.register_forward_pre_hook(self._count),
        ]
        self._synchronise()
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def callback(self, pipe: Any, step_index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """End of a step."""
        self._ends.append(self._now())
        self._calls.append([])
        return {}

    def times(self) -> LoopTimes:
        """The finished loop's times."""
        self._synchronise()
        calls = self._calls[:-1]
        start = calls[0][0]
        begins = [start, *self._ends[:-1]]
        return LoopTimes(
            total=self._between(start, self._ends[-1]),
            steps=tuple(self._between(*pair) for pair in zip(begins, self._ends, strict=True)),
            calls=tuple(
                tuple(self._between(*pair) for pair in zip(marks[::2], marks[1::2], strict=True)) for marks in calls
            ),
            num_forwards=self._num_forwards,
        )

    def _mark_call(self, *_: Any) -> None:
        self._calls[-1].append(self._now())

    def _count(self, *_: Any) -> None:
        self._num_forwards += 1

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self._device.type == "cuda" else 1000 * (end - begin)

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

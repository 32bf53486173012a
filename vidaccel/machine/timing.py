"""Time of a call without waiting for the device: CUDA events where there are any, the host's clock elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A point in the work of a device; `event` is None where the host's clock says it all."""

    host: float
    event: torch.cuda.Event | None


def moment(device: torch.device) -> Moment:
    """Now: after all work given to `device` so far. Does not wait."""
    if device.type != "cuda":
        return Moment(host=time.perf_counter(), event=None)
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return Moment(host=time.perf_counter(), event=event)


def seconds_between(start: Moment, end: Moment) -> float:
    """Seconds of device work between two moments; waits for the later one."""
    if start.event is None or end.event is None:
        return end.host - start.host
    end.event.synchronize()
    return start.event.elapsed_time(end.event) / 1000.0

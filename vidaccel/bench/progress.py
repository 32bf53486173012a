"""What a benchmark tells its caller while it runs; drawing it is the caller's part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BenchProgress:
    """`done` of `total` parts are finished; `label` names the part that begins."""

    done: int
    total: int
    label: str

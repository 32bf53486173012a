"""The report of a rollout: totals and lists for a file, and a picture of its memory over time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidaccel.rollout.picture import draw_rollout
from vidaccel.rollout.record import PARTS, RolloutRecord


class RolloutReport(RolloutRecord):
    """A record that can be written down."""

    def to_dict(self) -> dict[str, Any]:
        """Totals, and lists with an entry for every chunk, as plain values for strict JSON."""
        keyframes = set(self.keyframe_chunks)
        phases = {**self.phase_seconds(), "chunk": self.chunk_seconds()}
        return {
            "num_chunks": self.num_chunks,
            "num_pixel_frames": self.num_pixel_frames,
            "fps": self.grid.fps,
            "num_keyframes": self.num_keyframes,
            "num_passes": self.num_passes,
            "num_returns": len(self.returns()),
            "pixel_frames_per_second": self.pixel_frames_per_second,
            "seconds": {phase: spread(measured) for phase, measured in phases.items()},
            "decoder": self.decoder,
            "memory": self.memory.to_dict(),
            "memory_bytes": self.bytes_by_part,
            "prompts": [{"chunk": chunk, "prompt": prompt} for chunk, prompt in self.prompts],
            **({"camera": list(self.camera)} if self.camera else {}),
            "chunks": {
                "first_frame": list(self.first_frames),
                "is_keyframe": [chunk in keyframes for chunk in range(self.num_chunks)],
                "similarity": [_known(value) for value in self.similarities()],
                "seconds": {phase: [_known(value) for value in values] for phase, values in phases.items()},
            },
            "stays": {part: [list(stay) for stay in self.stays(part)] for part in PARTS},
        }

    def save_picture(self, path: str | Path) -> Path:
        """Draw which frames were remembered when, keyframes, time per chunk and similarity; the path written.

        The ending chooses the format (.png, .svg, .pdf). Raises ValueError where there is no chunk to draw.
        """
        return draw_rollout(self, Path(path))


def spread(seconds: Iterable[float]) -> dict[str, float] | None:
    """Total, median (p50) and 95th percentile (p95) of measured times; None without any."""
    known = sorted(value for value in seconds if not math.isnan(value))
    if not known:
        return None
    return {"total": sum(known), "p50": _quantile(known, 0.5), "p95": _quantile(known, 0.95)}


def _quantile(ordered: list[float], share: float) -> float:
    """Interpolated linearly between the two nearest values."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value

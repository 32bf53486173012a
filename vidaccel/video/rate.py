"""Frames a second: which rates there are, when the frames of a clip are shown, and which of them another rate takes.

Plain numbers; times are exact fractions of a second, so that a frame is never lost or doubled by rounding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from vidaccel.errors import UserError

_HALF = Fraction(1, 2)


def check_rate(fps: float) -> None:
    """Raises UserError for a number of frames per second that no video has."""
    if not 0.001 <= fps < 1000:
        raise UserError(f"`fps` must be at least 0.001 and below 1000, got {fps}.")


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a clip are shown, in seconds.

    starts: of each frame, ascending from 0. end: of the last frame. nominal: frames a second as the file says.

    Raises ValueError for no frames, and for times that go back.
    """

    starts: tuple[Fraction, ...]
    end: Fraction
    nominal: Fraction | None = None

    def __post_init__(self) -> None:
        if not self.starts or any(before > after for before, after in pairwise((Fraction(0), *self.starts, self.end))):
            raise ValueError(f"The times of frames must ascend from 0, got {self.starts} to {self.end}.")

    @classmethod
    def of_durations(cls, durations: Sequence[Fraction]) -> FrameTimes:
        """Frames one after the other, each for its own time."""
        *starts, end = accumulate(durations, initial=Fraction(0))
        return cls(tuple(starts), end)

    @classmethod
    def of_rate(cls, num_frames: int, fps: Fraction) -> FrameTimes:
        """Frames that are all shown equally long."""
        return cls(tuple(index / fps for index in range(num_frames)), num_frames / fps, fps)

    @property
    def is_constant(self) -> bool:
        """Whether all frames are shown equally long, but for what files round away."""
        period = self.end / len(self.starts) if self.nominal is None else 1 / self.nominal
        return all(abs(start - index * period) < period / 2 for index, start in enumerate((*self.starts, self.end)))

    @property
    def fps(self) -> float:
        """Frames a second: as the file says where they are constant, else in the mean."""
        nominal = self.nominal if self.is_constant else None
        return float(nominal or len(self.starts) / max(self.end, Fraction(1, 1000)))

    def at_rate(self, fps: float) -> list[int]:
        """The frames, by index, that a video of `fps` shows for the same time.

        Each of its frames is the one that is shown in the middle of its own time, the earlier of two that meet there:
        what ffmpeg's filter `fps` does. The video is as long as the clip, to half a frame, and has one at least.

        Example: of 6 frames at 30 a second, 15 take the frames 0, 2, 4, and 60 each of them twice.
        Raises UserError for a rate that no video has.
        """
        check_rate(fps)
        rate = Fraction(f"{fps:.6f}")
        count = max(1, int(self.end * rate + _HALF))
        return [max(0, bisect_left(self.starts, (index + _HALF) / rate) - 1) for index in range(count)]

"""Resampling by time: which frames another rate takes."""

from __future__ import annotations

from fractions import Fraction

import pytest

from vidaccel.errors import UserError
from vidaccel.video.rate import FrameTimes


@pytest.mark.parametrize("fps", [0.5, 8, 12.5, 16, 23.976, 29.97, 30, 60])
def test_the_own_rate_takes_every_frame_once_even_where_a_file_rounds_times_to_milliseconds(fps: float) -> None:
    exact = FrameTimes.of_rate(200, Fraction(f"{fps}"))
    rounded = [Fraction(round(start * 1000), 1000) for start in (*exact.starts, exact.end)]
    for times in (exact, FrameTimes(tuple(rounded[:-1]), rounded[-1], exact.nominal)):
        assert times.at_rate(fps) == list(range(200))
        assert times.is_constant
        assert times.fps == fps


@pytest.mark.parametrize(
    ("own", "wanted", "expected"),
    [
        (30, 15, [0, 2, 4]),
        (30, 10, [1, 4]),
        (15, 30, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (24, 16, [0, 2, 3, 5]),
        (6, 0.001, [5]),
    ],
)
def test_another_rate_takes_the_frames_of_its_times(own: int, wanted: float, expected: list[int]) -> None:
    assert FrameTimes.of_rate(6, Fraction(own)).at_rate(wanted) == expected


def test_ninety_two_frames_at_thirty_become_forty_nine_at_sixteen() -> None:
    assert len(FrameTimes.of_rate(92, Fraction(30)).at_rate(16)) == 49


def test_frames_are_held_as_long_as_they_are_shown() -> None:
    times = FrameTimes.of_durations([Fraction(1, 2), Fraction(1, 8), Fraction(1, 8), Fraction(1, 4)])
    assert times.at_rate(8) == [0, 0, 0, 0, 1, 2, 3, 3]
    assert not times.is_constant
    assert times.fps == 4


def test_wrong_rates_and_times_are_refused() -> None:
    for fps in (0, -1, 1000, float("nan")):
        with pytest.raises(UserError, match="`fps` must be at least"):
            FrameTimes.of_rate(2, Fraction(8)).at_rate(fps)
    with pytest.raises(ValueError, match="must ascend"):
        FrameTimes((Fraction(0), Fraction(1)), Fraction(1, 2))
    with pytest.raises(ValueError, match="must ascend"):
        FrameTimes((), Fraction(1))

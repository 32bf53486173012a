"""Labels of pictures: none covers another one or a point, and one that moved has a line to its point."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vidaccel.bench.shared.labels import Label, place_labels

POINTS = [(1, 5.0), (1, 5.1), (1, 5.15), (1.02, 5.2), (2, 1), (2, 1)]


@pytest.fixture
def axes() -> Any:
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for x, y in POINTS:
        axes.plot([0, x], [0, y], marker="o")
    axes.set_xlim(0, 4)
    return axes


def written(axes: Any) -> list[Any]:
    return [text for text in axes.texts if text.get_text()]


def test_labels_of_points_in_a_heap_cover_neither_each_other_nor_a_point(axes: Any) -> None:
    place_labels(axes, [Label(x=x, y=y, text=f"method {y}", colour="red", size=8) for x, y in POINTS])
    boxes = [text.get_window_extent() for text in written(axes)]
    assert len(boxes) == len(POINTS)
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert not [box for box in boxes for point in axes.transData.transform(POINTS) if box.contains(*point)]


def test_a_label_with_room_stands_beside_its_point_without_a_line(axes: Any) -> None:
    place_labels(axes, [Label(x=2, y=1, text="alone", colour="red", size=8)])
    (text,) = axes.texts
    assert text.get_position() == (7, 0)


def test_labels_keep_the_order_of_their_points(axes: Any) -> None:
    place_labels(axes, [Label(x=x, y=y, text=f"{y}", colour="red", size=8) for x, y in POINTS[:2]])
    heights = {text.get_text(): text.get_window_extent().y0 for text in written(axes)}
    assert heights["5.1"] > heights["5.0"]

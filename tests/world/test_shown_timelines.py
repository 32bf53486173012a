"""Every timeline that README and docs show is followed by the embedded student, stretch by stretch, by the oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.shown_timelines import ShownTimeline, shown_timelines
from vidaccel.bench.student.follow import follow
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.generation.loading import load_pipeline
from vidaccel.rollout.timeline import PromptTimeline

SHOWN = shown_timelines()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(EMBEDDED_STUDENT, device="cpu")


def test_there_are_some_and_all_are_in_the_words_of_the_world() -> None:
    assert "docs/how-to/timeline.md" in {one.page for one in SHOWN}
    assert not [one for one in SHOWN if not one.is_of_the_world]


@pytest.mark.shipped
@pytest.mark.parametrize("shown", SHOWN, ids=lambda one: one.page)
def test_the_embedded_student_follows(shown: ShownTimeline, pipe: Any, tmp_path: Path) -> None:
    # Twenty seconds on a busy core for 15 s of video: what is tested is the trained student on the page's own lines.
    (tmp_path / "shown.txt").write_text(shown.text)
    timeline = PromptTimeline.from_file(tmp_path / "shown.txt")
    places = pipe.transformer.takes_camera  # without a camera a student was not trained to keep its landmarks
    found = follow(pipe, timeline, seconds=shown.seconds, places=places, max_sequence_length=64)
    assert found
    assert not [(one.stretch.prompt, one.misses) for one in found if one.misses]

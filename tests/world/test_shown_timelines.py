"""Every timeline that README and docs show is followed by the embedded student, stretch by stretch, by the oracles."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.shown_timelines import ROOT, ShownTimeline, shown_timelines
from vidaccel.bench.student.follow import follow
from vidaccel.bench.student.readings import seen_landmarks
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.generation.loading import load_pipeline
from vidaccel.memory import parse_memory
from vidaccel.rollout.camera import CameraPath
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.loop import rollout
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


@pytest.mark.shipped
def test_the_landmark_of_the_page_about_memory_comes_back_with_retrieval_alone(pipe: Any) -> None:
    """docs/images/retrieval.png: as its script makes it, but that only what the oracle reads is decoded."""
    asked = json.loads((ROOT / "docs" / "images" / "retrieval.json").read_text(encoding="utf-8"))
    num_chunks = math.ceil((asked["frames"] + 3) / 12)
    first_end, end = (math.ceil((frames + 3) / 12) for frames in (asked["first_visit"], asked["frames"]))
    camera = CameraPath.parse(asked["camera"]).on(pipe.grid(fps=asked["fps"]))
    seen = {}
    for memory in (None, asked["memory"]):
        student = pipe.student()
        policy = pipe.memory_config() if memory is None else parse_memory(memory)
        state = pipe.new_state(student, height=128, width=128, seeds=(asked["seed"],), memory=policy)
        shots = pipe.shots([asked["prompt"]], num_videos=1, guided=False)
        latents = [chunk.latents for chunk in rollout(student, state, shots, num_chunks=num_chunks, camera=camera)]
        visits = [torch.cat(latents[chunk - 2 : chunk], dim=2) for chunk in (first_end, end)]
        stills = [StreamingDecoder(pipe.vae).decode(visit)[0, -9:].float().median(dim=0).values for visit in visits]
        seen[memory] = seen_landmarks(torch.stack(stills) / 255)
    for first, _ in seen.values():
        assert (first.kind, first.colour) == ("windmill", "rose")
    forgotten, back = (second for _, second in seen.values())
    assert (forgotten.kind, forgotten.colour) != ("windmill", "rose")
    assert (back.kind, back.colour) == ("windmill", "rose")
    assert abs(back.x - seen[asked["memory"]][0].x) <= 4

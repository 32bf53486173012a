"""What only a GPU can show: how often the host waits for the device, by PyTorch's own sync debug mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vidaccel
from tests.support.family_calls import call_inputs
from tests.support.tiny_causal import causal_model, chunks_of, shot, state_of, student
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report
from vidaccel.memory import MemoryConfig
from vidaccel.random_models.build import build_random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the waits of a GPU")
PACKAGE = str(Path(vidaccel.__file__).parent)
NUM_STEPS = 12
SMALL = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6, similarity_threshold=0.999)


@contextmanager
def waits_of_vidaccel() -> Iterator[list[str]]:
    """Where the host waits for the device within this package, one `file:line` a wait."""
    places: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def count(message: Warning | str, category: type[Warning], filename: str, line: int, *rest: object) -> None:
            if "synchronizing" in str(message) and filename.startswith(PACKAGE):
                places.append(f"{filename.removeprefix(PACKAGE)}:{line}")

        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            warnings.showwarning = shown


@pytest.mark.parametrize(
    "family",
    [
        "wan2.1-t2v",
        "wan2.1-i2v",
        "wan2.2-t2v",
        "hunyuan-video-t2v",
        "ltx-t2v",
        "cogvideox-t2v",
        "mochi",
        "sana-video-t2v",
    ],
)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_host_waits_at_most_once_a_step(family: str, threshold: float) -> None:
    pipe = build_random(family).to("cuda")
    apply_easycache(pipe, EasyCacheConfig(threshold=threshold, warmup_steps=3))
    pipe(**call_inputs(family, num_inference_steps=NUM_STEPS))
    with waits_of_vidaccel() as places:
        pipe(**call_inputs(family, num_inference_steps=NUM_STEPS))
    report = easycache_report(pipe)
    in_method = [place for place in places if place.startswith("/easycache/")]
    num_asked = sum(step.reason in ("above_threshold", "below_threshold") for step in report.decisions)
    assert len(in_method) <= report.num_steps + 1, in_method  # the rates are read once, for the report
    if threshold:
        assert len(in_method) <= num_asked + 1, in_method


def test_a_reused_step_and_a_computed_one_wait_for_nothing_else() -> None:
    """No wait where nothing is asked: all steps are warm-up."""
    pipe = build_random("wan2.1-t2v").to("cuda")
    apply_easycache(pipe, EasyCacheConfig(warmup_steps=NUM_STEPS))
    with waits_of_vidaccel() as places:
        pipe(**call_inputs("wan2.1-t2v", num_inference_steps=NUM_STEPS))
    assert len([place for place in places if place.startswith("/easycache/")]) <= 1


def test_a_chunk_of_a_rollout_waits_for_its_commit_and_its_pixels_only() -> None:
    model = causal_model().to("cuda")
    one = student(model)
    state = state_of(one, SMALL)
    given = replace(shot(), embeddings=tuple(part.cuda() for part in shot().embeddings))
    chunks_of(one, state, 2, [given])
    with waits_of_vidaccel() as places:
        chunks = chunks_of(one, state, 6, [given])
    assert len(places) <= 3 * len(chunks), places  # twice the similarity, once the pixels

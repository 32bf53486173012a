"""Fixtures of the tests of `vidaccel rollout`: a tiny random student, the command, and small decoders of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.tiny_models import save_student, tiny_student
from vidaccel.cli import run
from vidaccel.cli.rollout_request import RolloutRequest
from vidaccel.models.taehv import TinyWanDecoder
from vidaccel.rollout import plan
from vidaccel.rollout.chunk import Chunk
from vidaccel.rollout.plan import RolloutPlan
from vidaccel.rollout.production import Production
from vidaccel.rollout.report import RolloutReport

Command = Callable[..., int]


@pytest.fixture(scope="session")
def student_folder(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny random causal student."""
    return save_student(tiny_student(tiny_wan_folder), tmp_path_factory.mktemp("student"), height=32, width=48)


@pytest.fixture(scope="session")
def camera_student_folder(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is told of its camera."""
    pipe = tiny_student(tiny_wan_folder, camera_dim=8)
    return save_student(pipe, tmp_path_factory.mktemp("camera-student"), height=32, width=48)


@pytest.fixture(scope="module")
def plans() -> dict[Any, RolloutPlan]:
    """Plans that were measured, by size."""
    return {}


@pytest.fixture
def rollout(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plans: dict[Any, RolloutPlan]
) -> Iterator[Command]:
    """`vidaccel rollout` with the tiny student; 3 seconds are 5 chunks: 9 + 4 * 12 pixel frames.

    Every size is measured once for all tests of a file, for the time it takes. Nothing half-written may be left.
    """
    measure = RolloutRequest.plan

    def plan_of(request: RolloutRequest) -> RolloutPlan:
        size = (request.memory, request.request.height, request.request.width, request.is_guided)
        key = (*size, request.decoder and request.decoder.name, request.passes, plan.available_bytes)
        plans[key] = plans.pop(key, None) or measure(request)  # the last one asked for is the last
        return plans[key]

    def call(*arguments: str, output: Path | str = tmp_path / "video.mp4") -> int:
        sizes = ("--seconds", "3", "--similarity-threshold", "1")
        return run(["rollout", "--model", str(student_folder), "--output", str(output), *sizes, *arguments])

    monkeypatch.setattr(RolloutRequest, "plan", plan_of)
    yield call
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave drawing out, of tests that read the numbers of a report."""

    def save_picture(_: RolloutReport, path: Path) -> Path:
        path.write_bytes(b"a picture")
        return path

    monkeypatch.setattr(RolloutReport, "save_picture", save_picture)


def interrupted_after(num_chunks: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the rollout be interrupted while the chunk after `num_chunks` is made."""
    missing = Production._missing

    def stopping(production: Production) -> Iterator[Chunk]:
        for chunk in missing(production):
            if chunk.index == num_chunks:
                raise error
            yield chunk

    monkeypatch.setattr(Production, "_missing", stopping)


def decoder_file(path: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """A small decoder of random weights for the latents of the tiny student, as the published files are written."""
    torch.manual_seed(seed)
    model = TinyWanDecoder(**({"channels": (4, 4, 4, 4)} | sizes))
    save_file(model.state_dict(), path)
    return path

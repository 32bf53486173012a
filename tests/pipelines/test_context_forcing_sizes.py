"""A student's pipeline knows what sizes it was made for, so that a call need not say them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline

from tests.pipelines.test_context_forcing import PROMPT, new_pipe, quiet, seeded
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.catalog.registry import spec_of
from vidaccel.cli.rollout_request import StudentFolder
from vidaccel.errors import UserError

SIZES = {"height": 32, "width": 48, "max_sequence_length": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_pipe(**SIZES).save_pretrained(tmp_path)
    return tmp_path


def latents(pipe: Any, **said: Any) -> torch.Tensor:
    made: torch.Tensor = pipe(PROMPT, num_frames=9, generator=seeded(), output_type="latent", **said).frames
    return made


def test_what_a_call_leaves_out_is_the_pipelines_own(folder: Path) -> None:
    said = latents(new_pipe(), **SIZES)
    assert torch.equal(latents(new_pipe(**SIZES)), said)
    assert torch.equal(latents(quiet(ContextForcingWanPipeline.from_pretrained(folder))), said)
    assert not torch.equal(latents(new_pipe(**SIZES), max_sequence_length=32), said)
    assert latents(new_pipe(**SIZES), width=32).shape[-1] < said.shape[-1]


def test_the_settings_of_a_folder_hold_for_pipelines_that_were_saved_without(tmp_path: Path) -> None:
    new_pipe().save_pretrained(tmp_path)
    (tmp_path / "vidaccel.json").write_text(json.dumps({"defaults": SIZES}))
    pipe = quiet(ContextForcingWanPipeline.from_pretrained(tmp_path))
    assert torch.equal(latents(pipe), latents(new_pipe(), **SIZES))
    assert ContextForcingWanPipeline.from_pretrained(tmp_path, width=32).config.width == 32
    (tmp_path / "vidaccel.json").write_text(json.dumps({"defaults": {"height": "tall"}}))
    with pytest.raises(UserError, match="`height` must be a whole number of at least 1, got 'tall'"):
        ContextForcingWanPipeline.from_pretrained(tmp_path)
    (tmp_path / "vidaccel.json").write_text("nonsense")
    with pytest.raises(UserError, match=r"vidaccel\.json"):
        ContextForcingWanPipeline.from_pretrained(tmp_path)


def test_the_command_takes_the_sizes_that_python_takes(folder: Path) -> None:
    def asked(**flags: Any) -> dict[str, Any]:
        request = StudentFolder.of(spec_of(str(folder))).request(PROMPT, flags)
        return {name: getattr(request, name) for name in SIZES}

    assert asked() == SIZES
    assert {name: getattr(spec_of(str(folder)).defaults, name) for name in SIZES} == SIZES  # which the demo takes
    assert asked(width=64, height=None) == SIZES | {"width": 64}
    (folder / "vidaccel.json").write_text(json.dumps({"defaults": {"height": 64}}))
    assert asked() == SIZES | {"height": 64}
    assert ContextForcingWanPipeline.from_pretrained(folder).config.height == 64


def test_the_embedded_student_reads_prompts_as_it_was_trained_to() -> None:
    pipe = ContextForcingWanPipeline.from_pretrained(spec_of(EMBEDDED_STUDENT).folder)
    assert {name: pipe.config[name] for name in SIZES} == {"height": 128, "width": 128, "max_sequence_length": 64}
    (shot,) = pipe.shots("a red ball hops up and down on a grassy meadow")
    assert shot.embeddings[0].shape[1] == 64

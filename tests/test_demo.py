"""The demo: its page builds, its work is done by the same functions as everywhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from demos.app import build_app, make
from vidaccel.errors import UserError
from vidaccel.loading import load_pipeline
from vidaccel.registry import GenerationDefaults

TINY = GenerationDefaults(num_frames=5, height=32, width=32, num_inference_steps=12)


def test_a_prompt_gives_a_video_a_picture_and_figures(tiny_wan_folder: Path) -> None:
    pipe = load_pipeline(str(tiny_wan_folder), device="cpu")
    video, picture, figures = make(pipe, TINY, prompt="a red Zebra", threshold=0.5, num_inference_steps=12, seed=0)
    assert Path(video).stat().st_size > 0
    assert Path(picture).stat().st_size > 0
    assert "| transformer forwards | 24 |" in figures
    assert "Zebra" in figures


def test_the_page_builds(tiny_wan_folder: Path) -> None:
    pytest.importorskip("gradio")
    app = build_app(None, TINY)
    assert app.title == "vidaccel"


def test_a_missing_gradio_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"\.\[demo\]"):
        build_app(None, TINY)

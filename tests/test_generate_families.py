"""`vidaccel generate` on a tiny random folder of every family: a video comes out, and what is said of it is true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vidaccel.cli import run, runs
from vidaccel.components import denoisers
from vidaccel.families.calls import call_inputs
from vidaccel.families.family import Family
from vidaccel.families.random_weights import make_random
from vidaccel.families.table import FAMILIES
from vidaccel.generation import Generation, StepProgress, generate
from vidaccel.request import GenerationRequest
from vidaccel.video import read_video, save_frames

FLAGS = ("--num-inference-steps", "8", "--threshold", "0.5", "--warmup-steps", "2")
# Sections after the first one, and half of the video of the image model, change how many frames come out.
FRAMES = {"hunyuan-video-i2v": 5, "framepack": 25, "skyreels-v2-df-v2v": 34, "helios": 65, "helios-pyramid": 33}
FRAMES |= {"chronoedit": 5}
# The last step of a schedule may be dropped; `strength` drops the first ones; a stage has at least one.
RUNNABLE = [family for family in FAMILIES if family.refusal is None and family.name != "cosmos3"]

each_runnable_family = pytest.mark.parametrize("family", RUNNABLE, ids=lambda family: family.name)


def input_flags(family: Family, folder: Path) -> list[str]:
    """The family's inputs as files, and the flags that name them."""
    flags: list[str] = []
    arguments = call_inputs(family)
    for name in family.inputs:
        value = arguments[name]
        path = folder / (f"{name}.safetensors" if isinstance(value, list) else f"{name}.png")
        if isinstance(value, list):
            pixels = [torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) for picture in value]
            save_frames(path, torch.stack(pixels))
        else:
            value.save(path)
        flags += [f"--{name.replace('control_video', 'video').replace('_', '-')}", str(path)]
    return flags


@each_runnable_family
def test_every_family_makes_a_video_from_the_command_line(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    made: list[Generation] = []
    steps: list[StepProgress] = []

    def load(*arguments: Any, **settings: Any) -> Any:
        pipe = load_pipeline(*arguments, **settings)
        for model in denoisers(pipe):
            model.register_forward_pre_hook(lambda *_: calls.append("call"))
        return pipe

    def watched(pipe: Any, request: GenerationRequest, *, easycache: Any, on_step: Any) -> Generation:
        made.append(generate(pipe, request, easycache=easycache, on_step=steps.append))
        return made[-1]

    load_pipeline = runs.load_pipeline
    monkeypatch.setattr(runs, "load_pipeline", load)
    monkeypatch.setattr(runs, "generate", watched)
    folder = make_random(family, tmp_path / "model")
    video = tmp_path / "video.mp4"
    flags = input_flags(family, tmp_path)
    code = run(["generate", "a red ball", "--model", str(folder), "--output", str(video), *FLAGS, *flags])
    assert code == 0, capsys.readouterr().err

    (result,) = made
    assert result.report is not None
    asked = {"height": family.defaults["height"], "width": family.defaults["width"]}
    assert result.frames.shape[1:] == (3, asked["height"], asked["width"])
    assert result.frames.shape[0] == FRAMES.get(family.name, family.defaults["num_frames"])
    assert 0 <= result.frames.min() < result.frames.max() <= 1
    assert read_video(video)[0].shape == result.frames.shape
    assert len(calls) == sum(step.num_passes for step in result.report.decisions)
    assert result.num_forwards == result.report.num_computed_passes <= len(calls)
    assert [step.step_index for step in steps] == list(range(len(steps)))
    assert steps[-1].num_steps == len(steps)
    assert [step.computed for step in steps] == [step.computed for step in result.report.decisions]
    assert 0 < result.denoising_seconds < result.total_seconds

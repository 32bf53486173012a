"""`vidaccel generate` on a tiny random folder of every family: a video comes out, and what is said of it is true."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from vidaccel.pipelines.easycache_wan import EasyCacheWanPipeline

from tests.support.family_calls import call_inputs
from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.registry import SETTINGS_FILE
from vidaccel.catalog.table import CATALOG, family_named
from vidaccel.cli import run, runs
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.generation import generate as generation
from vidaccel.generation.calls import frames_of, negative_prompt_problem, parameters_of, sound_of
from vidaccel.generation.generate import Generation, check_request, generate, warm_up
from vidaccel.generation.recorder import StepProgress
from vidaccel.generation.request import GenerationRequest
from vidaccel.machine.components import denoisers
from vidaccel.random_models.build import build_random, make_random
from vidaccel.video.files import read_video, save_frames, write_video

FLAGS = ("--num-inference-steps", "8", "--threshold", "0.5", "--warmup-steps", "2")
# Sections after the first one, and half of the video of the image model, change how many frames come out.
FRAMES = {"hunyuan-video-i2v": 5, "framepack": 25, "skyreels-v2-df-v2v": 34, "helios": 65, "helios-pyramid": 33}
FRAMES |= {"chronoedit": 5}
# Each window of such a video is a generation of its own, the report is that of the last one, and of the timesteps that
# the pipeline names the last, 0, is no step.
WINDOWED = ("ltx-long",)
RUNNABLE = [family for family in CATALOG.families if family.refusal is None and "command" not in family.untested]

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
        warm_up(pipe, request)
        calls.clear()
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
    decisions = result.report.decisions
    windows, rest = divmod(len(calls), sum(step.num_passes for step in decisions))
    assert rest == 0
    assert windows == 1 or family.name in WINDOWED
    assert result.num_forwards <= len(calls)
    if windows == 1:
        assert result.num_forwards == result.report.num_computed_passes
    assert [step.step_index for step in steps] == list(range(windows * len(decisions)))
    assert steps[-1].num_steps - len(steps) == (family.name in WINDOWED)
    assert [step.computed for step in steps][-len(decisions) :] == [step.computed for step in decisions]
    assert 0 < result.denoising_seconds < result.total_seconds


@pytest.mark.parametrize(
    "family", [family for family in CATALOG.families if family.refusal], ids=lambda family: family.name
)
def test_what_easycache_refuses_is_one_line_and_runs_without_it(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_random(family, tmp_path / "model")
    command = ["generate", "a red ball", "--model", str(folder), "--output", str(tmp_path / "video.mp4"), *FLAGS]
    capsys.readouterr()
    assert run(command) == 2
    assert "--no-cache" in capsys.readouterr().err.strip().splitlines()[-1]
    assert run([*command, "--no-cache"]) == 0
    assert (tmp_path / "video.mp4").is_file()


@pytest.mark.parametrize(
    ("height", "flags"),
    [(40, ()), (32, ("--image", "first.png", "--last-image", "last.png")), (32, ("--video", "clip.safetensors"))],
)
def test_open_sora_takes_any_multiple_of_eight_both_ends_of_a_video_or_one_to_go_on_from(
    height: int,
    flags: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_random("open-sora-1.2", "model")
    frames = torch.rand(17, 3, height, 48)
    save_frames("clip.safetensors", frames)
    for name, frame in (("first.png", frames[0]), ("last.png", frames[-1])):
        Image.fromarray((frame * 255).byte().permute(1, 2, 0).numpy()).save(name)
    sizes = ("--height", str(height), "--width", "48")
    command = ["generate", "a red ball", "--model", "model", "--output", "video.mp4", *sizes, *FLAGS, *flags]
    assert run(command) == 0, capsys.readouterr().err
    assert tuple(read_video("video.mp4")[0].shape) == (17, 3, height, 48)


def test_a_swap_in_pipeline_is_called_without_its_own_easycache() -> None:
    pipe = EasyCacheWanPipeline.from_pipe(build_random("wan2.1-t2v"))
    request = GenerationRequest("a red ball", num_frames=9, height=32, width=32, num_inference_steps=8)
    made = generate(pipe, request)
    assert made.report is None
    assert made.num_forwards == 16
    config = EasyCacheConfig(threshold=0.5, warmup_steps=2)
    assert generate(pipe, request, easycache=config).num_forwards < 16


@pytest.mark.parametrize(
    ("family", "given", "words"),
    [
        ("wan2.1-flf2v", {"last_image": 3}, "--image"),
        ("wan2.1-v2v", {}, "--video"),
        ("wan2.2-animate", {"image": 3}, "--pose-video and --face-video"),
        ("wan2.1-vace", {"mask": 4}, "--video"),
        ("wan2.1-vace", {"video": 4}, "--video has 4 frames and 9 are asked for"),
        ("wan2.1-v2v", {"video": 4}, "--video has 4 frames and 9 are asked for"),
        ("cogvideox-v2v", {"video": 4}, "--video has 4 frames and 9 are asked for"),
        ("hunyuan-video-t2v", {"image": 3}, "takes no image"),
        ("ltx-t2v", {"video": 4}, "takes no video"),
        ("skyreels-v2-t2v", {"face_video": 4}, "takes no face-video"),
    ],
)
def test_a_missing_or_superfluous_input_is_named_with_its_flag(family: str, given: dict[Any, int], words: str) -> None:
    inputs = {name: torch.rand(*((4,) if size == 4 else ()), 3, 32, 32) for name, size in given.items()}
    request = GenerationRequest("a red ball", num_frames=9, height=32, width=32, inputs=inputs)
    with pytest.raises(UserError, match=words):
        generate(build_random(family), request)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("ltx-t2v", {"num_frames": 12}, "4k \\+ 1 for this model, got 12; nearest are 9 and 13"),
        ("mochi", {"num_frames": 9}, "6k \\+ 1 for this model, got 9; nearest are 7 and 13"),
        ("allegro-t2v", {"num_frames": 9, "height": 128, "width": 128}, "a multiple of 4"),
        ("latte", {"height": 36}, "multiple of"),
        ("hunyuan-video-t2v", {"height": 40}, "multiple of 16"),
        ("sana-video-t2v", {"height": 48}, "divisible by 32"),
        ("wan2.1-t2v", {"true_cfg_scale": 2.0}, "takes no true_cfg_scale"),
        ("wan2.1-t2v", {"arguments": {"nonsense": 1}}, "takes no argument `nonsense`"),
        ("skyreels-v2-df-t2v", {"num_frames": 17, "arguments": {"base_num_frames": 9}}, "overlap_history"),
    ],
)
def test_what_a_model_cannot_make_is_one_line(family: str, changes: dict[str, Any], words: str) -> None:
    request = GenerationRequest("a red ball", **({"num_frames": 9, "height": 32, "width": 32} | changes))
    with pytest.raises(UserError, match=words) as caught:
        generate(build_random(family), request)
    assert "\n" not in str(caught.value)


def test_a_clip_that_sets_the_length_is_cut_to_a_length_that_the_model_makes() -> None:
    request = GenerationRequest(
        "a red ball", num_frames=10, height=32, width=32, inputs={"video": torch.rand(12, 3, 32, 32)}
    )
    with pytest.raises(UserError, match="got 10; nearest are 9 and 13"):
        check_request(build_random("wan2.1-v2v"), request)


# A pipeline of each way of guiding: by its scale, by a second scale beside that of a distilled model, by a component.
@pytest.mark.parametrize(
    ("family", "key", "flag"),
    [
        ("wan2.1-t2v", "guidance_scale", "--guidance-scale"),
        ("hunyuan-video-t2v", "true_cfg_scale", "--true-cfg-scale"),
        ("hunyuan-video-1.5-t2v", "guidance_scale", "--guidance-scale"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_negative_prompt_without_effect_is_said_with_the_flag_to_use(
    family: str, key: str, flag: str, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, frames = build_random(family), []
    for negative in ("blue", "a green hill"):
        sizes: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 2}
        frames.append(
            generate(pipe, GenerationRequest("a red ball", negative_prompt=negative, **{key: scale}, **sizes)).frames
        )
    said = [message for message in caplog.messages if "--negative-prompt has no effect" in message]
    assert torch.equal(*frames) is bool(said) is (scale == 1)
    assert all(f"give {flag} above 1" in message for message in said)


def test_a_negative_prompt_that_the_pipeline_has_no_argument_for_is_said() -> None:
    request = GenerationRequest("a red ball", negative_prompt="blue")
    pipe = build_random("wan2.1-t2v")
    assert negative_prompt_problem(pipe, request) is None
    pipe.__class__ = type("Promptless", (type(pipe),), {"__call__": lambda self, prompt, num_frames=9: None})
    assert "takes no negative prompt" in str(negative_prompt_problem(pipe, request))


def test_guidance_of_the_sound_is_guidance_too() -> None:
    request = GenerationRequest("a red ball", negative_prompt="blue", guidance_scale=1.0)
    pipe = build_random("ltx2-t2v")
    assert negative_prompt_problem(pipe, request) is None
    assert negative_prompt_problem(pipe, replace(request, arguments={"audio_guidance_scale": 1.0})) is not None


def test_guidance_is_told_to_the_component_that_guides_and_taken_back() -> None:
    pipe = build_random("hunyuan-video-1.5-t2v")
    guider = pipe.guider
    request = GenerationRequest("a red ball", num_frames=5, height=32, width=32, num_inference_steps=2)
    videos = [generate(pipe, replace(request, guidance_scale=scale)).frames for scale in (2.0, 20.0, None)]
    assert not torch.equal(videos[0], videos[1])
    assert pipe.guider is guider
    own = replace(request, guidance_scale=guider.guidance_scale)
    assert torch.equal(generate(pipe, own).frames, videos[2])


def test_a_distilled_model_guides_against_a_negative_prompt_only_when_told() -> None:
    pipe = build_random("hunyuan-video-t2v-cfg")
    request = GenerationRequest("a red ball", num_frames=5, height=32, width=32, num_inference_steps=3)
    assert generate(pipe, request).num_forwards == 3
    assert generate(pipe, replace(request, true_cfg_scale=6.0)).num_forwards == 6


def cosmos3_with_sound() -> Family:
    family = family_named("cosmos3")
    transformer = family.components["transformer"]
    tokenizer = {"encoder_enabled": False, "vocoder_input_dim": 4, "dec_dim": 4, "dec_c_mults": (1, 1)}
    parts = {
        "transformer": replace(transformer, config={**transformer.config, "sound_gen": True, "sound_dim": 4}),
        "sound_tokenizer": Component(
            kind="diffusers:Cosmos3AVAEAudioTokenizer", config=tokenizer | {"dec_strides": (4, 480)}
        ),
    }
    return replace(family, components={**family.components, **parts})


@pytest.mark.parametrize(
    ("family", "arguments", "channels", "rate"),
    [
        (family_named("ltx2-t2v"), {"spatio_temporal_guidance_blocks": [1]}, 2, 16000),
        (family_named("kandinsky6-t2v"), {}, 1, 44100),
        (cosmos3_with_sound(), {"enable_sound": True, "use_system_prompt": False}, 2, 48000),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else None,
)
def test_sound_is_written_beside_the_pictures(
    family: Family, arguments: dict[str, Any], channels: int, rate: int, tmp_path: Path
) -> None:
    request = GenerationRequest(
        "a red ball", num_frames=9, height=32, width=32, fps=24, num_inference_steps=2, arguments=arguments
    )
    made = generate(build_random(family), request)
    assert made.sound is not None
    waveform, found = made.sound
    assert (waveform.shape[0], found) == (channels, rate)
    assert waveform.shape[1] > 0
    path = write_video(tmp_path / "video.mp4", made.frames, fps=24, sound=made.sound)
    output = subprocess.run([get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True, check=False).stderr
    assert "Audio: aac" in output
    assert read_video(path)[0].shape == made.frames.shape
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize(("dtype", "full"), [(np.int16, 2**15 - 1), (np.int32, 2**31 - 1), (np.float64, 1)])
def test_sound_of_whole_numbers_is_as_loud_as_that_of_floats(dtype: type, full: int) -> None:
    sounding = SimpleNamespace(audio=(np.array([[0.0, 0.5, -0.5, 1.0]]) * full).astype(dtype))
    sound = sound_of(SimpleNamespace(audio_sample_rate=8000), sounding)
    assert sound is not None
    torch.testing.assert_close(sound[0], torch.tensor([[0.0, 0.5, -0.5, 1.0]]), atol=1e-4, rtol=0)


def test_sound_at_an_unknown_rate_is_left_out_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    sounding = SimpleNamespace(audio=torch.zeros(1, 544))
    assert sound_of(SimpleNamespace(), sounding) is None
    assert any("the sound is not written" in record.message for record in caplog.records)
    caplog.clear()
    assert sound_of(SimpleNamespace(), SimpleNamespace(audio=None)) is None
    assert not caplog.records


@pytest.mark.parametrize("name", ["frames", "videos", "video"])
@pytest.mark.parametrize("batch", [True, False])
def test_the_video_of_an_output_is_found_in_every_form(name: str, batch: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 4, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    pictures: list[Any] = [Image.fromarray(picture) for picture in pixels]
    forms = [expected, expected.transpose(0, 1), expected.permute(0, 2, 3, 1).numpy(), pictures]
    for form in forms:
        whole = form if not batch else [form] if isinstance(form, list) else form[None]
        torch.testing.assert_close(frames_of(SimpleNamespace(**{name: whole})), expected)


def test_a_pipeline_that_finds_the_length_of_texts_itself_is_not_second_guessed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = build_random("wan2.1-t2v")
    request = GenerationRequest("a red ball " * 200, num_frames=9, height=32, width=32, num_inference_steps=1)
    generate(pipe, request)
    assert any("longer than 512 tokens" in record.message for record in caplog.records)
    caplog.clear()
    parameters = dict(parameters_of(pipe))
    parameters["max_sequence_length"] = parameters["max_sequence_length"].replace(default=None)
    monkeypatch.setattr(generation, "parameters_of", lambda _: parameters)
    generate(pipe, request)
    assert not any("tokens" in record.message for record in caplog.records)


def test_a_folder_that_a_swap_in_saved_is_generated_from_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_random("wan2.1-t2v", tmp_path / "plain")
    EasyCacheWanPipeline.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / SETTINGS_FILE).write_text((tmp_path / "plain" / SETTINGS_FILE).read_text())
    videos = []
    for name in ("plain", "saved"):
        video = tmp_path / f"{name}.mp4"
        assert run(["generate", "a red ball", "--model", str(tmp_path / name), "--output", str(video), *FLAGS]) == 0
        assert "reused" in capsys.readouterr().out
        videos.append(read_video(video)[0])
    assert torch.equal(*videos)

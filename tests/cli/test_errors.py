"""Every bad input ends in one clear line on stderr and exit code 2, before anything is written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidaccel.cli import run
from vidaccel.machine.footprint import GIB

Refused = Callable[..., str]


@pytest.fixture
def refused(tiny_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `vidaccel generate` and return its one line of complaint."""

    def call(*arguments: str, model: Path | str = tiny_wan_folder, output: Path | None = None) -> str:
        sizes = ("--height", "32", "--width", "32", "--num-frames", "9", "--num-inference-steps", "12")
        folder = tmp_path / "out" if output is None else output
        capsys.readouterr()
        assert run(["generate", "--model", str(model), "--output", str(folder), *sizes, *arguments]) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.strip().splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("vidaccel: ")
        assert not list(tmp_path.rglob("*.mp4"))
        return lines[0]

    return call


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num-frames", "10"), ("4k + 1", "10", "9", "13")),
        (("--num-frames", "0"), ("num_frames", "at least 1")),
        (("--height", "40"), ("height", "multiple of 16", "40")),
        (("--width", "8"), ("width", "multiple of 16", "try 16")),
        (("--width", "-16"), ("width", "-16")),
        (("--height", "16384"), ("height", "too large")),
        (("--threshold", "-0.1"), ("threshold", "-0.1")),
        (("--threshold", "nan"), ("threshold", "nan")),
        (("--predictor", "guess"), ("predictor", "guess")),
        (("--warmup-steps", "-1"), ("warmup_steps", "-1")),
        (("--num-inference-steps", "0"), ("num_inference_steps", "at least 1")),
        (("--num-inference-steps", "100000000"), ("num_inference_steps", "100000000", "at most")),
        (("--guidance-scale", "nan"), ("guidance_scale", "nan")),
        (("--guidance-scale", "-1"), ("guidance_scale", "-1")),
        (("--seed", "-1"), ("seed", "-1")),
        (("--fps", "0"), ("fps", "0")),
        (("--dtype", "int8"), ("dtype", "int8", "bfloat16")),
        (("--device", "toaster"), ("device", "toaster", "cuda")),
        (("--device", "cpu", "--offload", "model"), ("offload", "GPU")),
        (("--offload", "cellar"), ("offload", "cellar", "sequential")),
        (("--device", "cuda", "--offload", "group", "--compile"), ("group", "compile", "none or model")),
        (("--attention", "magic"), ("attention", "magic", "native")),
        (("--attention", "flash"), ("flash", "cannot run here", "flash-attn")),
        (("--attention", "_native_cudnn", "--device", "cpu"), ("_native_cudnn", "cannot run here")),
        (("--no-cache", "--compare"), ("--no-cache", "--compare")),
        (("--prompt-file", "no such file"), ("prompt file", "no such file")),
        (("--image", "no such image.png"), ("no such image.png",)),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(
    refused: Refused, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = refused("a red circle", *flags)
    for word in words:
        assert word in line


@pytest.mark.parametrize(("typed", "near"), [(["generat"], "generate"), (["bench", "recal"], "recall")])
def test_a_wrong_command_is_answered_with_the_one_near_to_it(
    capsys: pytest.CaptureFixture[str], typed: list[str], near: str
) -> None:
    assert run(typed) == 2
    assert f"Did you mean '{near}'?" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", "   "])
def test_an_empty_prompt_is_refused(refused: Refused, prompt: str) -> None:
    assert "prompt" in refused(prompt)


@pytest.mark.parametrize("arguments", [("red \udcff",), ("a red circle", "--negative-prompt", "\udce4")])
def test_bytes_that_are_no_text_are_refused(refused: Refused, arguments: tuple[str, ...]) -> None:
    assert "no UTF-8 text" in refused(*arguments)


def test_no_prompt_at_all_is_refused(refused: Refused) -> None:
    assert "prompt" in refused()


def test_a_prompt_file_without_prompts_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# nothing\n\n")
    assert "no prompts" in refused("--prompt-file", str(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused("--prompt-file", str(tmp_path / "prompts.txt"))


def test_an_unknown_model_is_refused_with_the_way_to_the_known_names(refused: Refused) -> None:
    line = refused("a red circle", model="no-such-model")
    assert "no-such-model" in line
    assert "`vidaccel models` lists" in line


def test_a_hub_model_without_network_says_that_the_weights_are_missing(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("a red circle", model="somebody/some-video-model")
    assert "not on this machine" in line


@pytest.mark.parametrize("name", ["", "~nobody-of-this-name", "a/b/c"])
def test_what_can_be_no_name_of_a_model_is_refused_with_what_can(refused: Refused, name: str) -> None:
    assert "a local folder or a Hub id" in refused("a red circle", model=name)


@pytest.mark.parametrize(
    "defaults",
    [
        {"fps": "x"},
        {"fps": None},
        {"guidance_scale": "5"},
        {"num_inference_steps": 3.5},
        {"num_frames": True},
        {"x": 1},
    ],
)
def test_a_wrong_setting_in_the_folder_of_a_model_is_named(
    refused: Refused, tiny_wan_folder: Path, tmp_path: Path, defaults: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    (folder / "vidaccel.json").write_text(json.dumps({"defaults": defaults}))
    line = refused("a red circle", model=folder)
    assert "vidaccel.json" in line
    assert next(iter(defaults)) in line


def test_a_folder_without_a_model_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in refused("a red circle", model=tmp_path / "empty")


def test_cuda_is_refused_where_there_is_none(refused: Refused) -> None:
    if torch.cuda.is_available():
        assert "CUDA devices" in refused("a red circle", "--device", "cuda:99")
    else:
        assert "0 CUDA devices" in refused("a red circle", "--device", "cuda")


def test_an_image_is_refused_by_a_model_that_takes_none(refused: Refused, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "first.png")
    assert "takes no image" in refused("a red circle", "--image", str(tmp_path / "first.png"))


def test_an_unreadable_image_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "first.png").write_bytes(b"not a picture")
    assert "first.png" in refused("a red circle", "--image", str(tmp_path / "first.png"))


def test_an_output_that_cannot_be_written_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "Cannot write" in refused("a red circle", output=tmp_path / "file" / "below")


@pytest.mark.parametrize("suffix", [".json", ".report.json", ".report.png"])
def test_a_folder_with_the_name_of_a_file_to_write_is_refused_before_the_work(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    (tmp_path / f"name{suffix}").mkdir()
    monkeypatch.setattr("vidaccel.cli.runs.load_pipeline", lambda *_, **__: pytest.fail("loaded the model"))
    assert "is a folder" in refused("a red circle", "--report", "--overwrite", output=tmp_path / "name.mov")


def test_an_output_with_another_ending_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert ".mp4" in refused("a red circle", output=tmp_path / "video.avi")


def test_one_file_for_two_prompts_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "2 prompts" in refused("a red circle", "a blue square", output=tmp_path / "video.mp4")


def test_two_prompts_with_one_file_name_are_refused(refused: Refused) -> None:
    assert "same file" in refused("a red circle", "A red circle!")


def test_too_little_memory_is_said_with_what_is_needed(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidaccel.generation.loading.available_bytes", lambda device: 1000)
    assert "weights need 1 MiB" in refused("a red circle")
    monkeypatch.setattr("vidaccel.generation.loading.available_bytes", lambda device: 64 * GIB)
    monkeypatch.setattr("vidaccel.generation.generate.available_bytes", lambda device: 1000)
    line = refused("a red circle")
    assert "needs about" in line
    assert "MiB are free" in line


def test_a_full_disk_is_one_line_wherever_it_shows(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr("vidaccel.cli.runs.describe_environment", full)
    assert "No space left on device: somewhere" in refused("a red circle")


def test_memory_that_runs_out_during_the_run_is_said_too(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr("diffusers.WanPipeline.prepare_latents", exhausted)
    assert "Too little memory" in refused("a red circle")


def test_a_compiler_that_fails_is_said(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("C++ compile error\nand many lines more")

    monkeypatch.setattr("diffusers.WanPipeline.prepare_latents", failing)
    line = refused("a red circle")
    assert "C++ compile error" in line
    assert "--compile" in line


def _cut(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_one_weight(folder: Path, file: str) -> None:
    weights = load_file(folder / file)
    weights.pop(sorted(name for name in weights if name.endswith("weight"))[-1])
    save_file(weights, folder / file, metadata={"format": "pt"})


def _with_a_wrong_shape(folder: Path, file: str) -> None:
    weights = load_file(folder / file)
    name = sorted(weights)[0]
    weights[name] = torch.zeros(3)
    save_file(weights, folder / file, metadata={"format": "pt"})


def _garbage(folder: Path, file: str) -> None:
    (folder / file).write_text("{nope")


def _gone(folder: Path, file: str) -> None:
    (folder / file).unlink()


def _not_finite(folder: Path, file: str) -> None:
    weights = {name: torch.full_like(weight, float("nan")) for name, weight in load_file(folder / file).items()}
    save_file(weights, folder / file, metadata={"format": "pt"})


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        *((_cut, file) for file in (TRANSFORMER, VAE, TEXT_ENCODER)),
        *((_without_one_weight, file) for file in (TRANSFORMER, VAE, TEXT_ENCODER)),
        *((_with_a_wrong_shape, file) for file in (TRANSFORMER, VAE, TEXT_ENCODER)),
        *((_gone, file) for file in (TRANSFORMER, TEXT_ENCODER, "tokenizer/tokenizer.json", "vae/config.json")),
        *((_garbage, file) for file in ("model_index.json", "transformer/config.json", "tokenizer/tokenizer.json")),
        (_garbage, "vidaccel.json"),
        (_not_finite, VAE),
    ],
)
def test_a_corrupt_checkpoint_is_refused(
    refused: Refused, tiny_wan_folder: Path, tmp_path: Path, damage: Callable[[Path, str], None], file: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    damage(folder, file)
    assert len(refused("a red circle", model=folder)) < 700


def test_a_pipeline_class_that_diffusers_lacks_is_refused(
    refused: Refused, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))
    assert "NoSuchPipeline" in refused("a red circle", model=folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer": [None, None]}, "transformer"),
        ({"_class_name": "WanVACEPipeline"}, "WanVACETransformer3DModel"),
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
    ],
)
def test_a_pipeline_whose_parts_do_not_fit_is_refused(
    refused: Refused, tiny_wan_folder: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    assert words in refused("a red circle", model=folder)

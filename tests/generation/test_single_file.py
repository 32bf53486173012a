"""A transformer from one file, in every naming: the same network as from its folder, or one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import tiny_transformer
from tests.support.wan_names import wan_tensors
from vidaccel.cli import run
from vidaccel.errors import UserError
from vidaccel.generation.expert_files import TransformerFile
from vidaccel.generation.loading import load_pipeline
from vidaccel.random_models.build import build_random

Tensors = dict[str, torch.Tensor]
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 16}  # rows of 32: GGUF blocks
NAMINGS: dict[str, Callable[[torch.nn.Module], Tensors]] = {
    "diffusers": lambda model: dict(model.state_dict()),
    "original": wan_tensors,
    "ComfyUI": lambda model: {f"model.diffusion_model.{name}": value for name, value in wan_tensors(model).items()},
}
EIGHT_BITS = torch.float8_e4m3fn


@pytest.fixture
def other() -> Any:
    """A transformer that is not the folder's, of the size that `base` has."""
    return tiny_transformer(seed=5, **SIZES)


@pytest.fixture
def base(tiny_wan_folder: Path, tmp_path: Path) -> Path:
    """A model folder whose transformer is gone but for its configuration, so that nothing can come from it."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_wan_folder, folder)
    shutil.rmtree(folder / "transformer")
    tiny_transformer(seed=0, **SIZES).save_config(folder / "transformer")
    return folder


def written(weights: Tensors, path: Path) -> str:
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return str(path)


def loaded(base: Path, *files: str) -> Any:
    return load_pipeline(str(base), device="cpu", dtype="float32", transformer_files=files)


def assert_same(network: torch.nn.Module, weights: Tensors) -> None:
    found = network.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_file_in_each_naming_is_the_network_it_was_saved_from(
    naming: str, base: Path, other: torch.nn.Module, tmp_path: Path
) -> None:
    file = written(NAMINGS[naming](other), tmp_path / "other.safetensors")
    assert_same(loaded(base, file).transformer, dict(other.state_dict()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_number_formats_are_those_of_a_folder(dtype: str, base: Path, other: Any, tmp_path: Path) -> None:
    other.save_pretrained(base / "transformer")
    whole = load_pipeline(str(base), device="cpu", dtype=dtype).transformer.state_dict()
    file = written(wan_tensors(other), tmp_path / "other.safetensors")
    network = load_pipeline(str(base), device="cpu", dtype=dtype, transformer_files=[file]).transformer
    assert {weight.dtype for weight in whole.values()} == {torch.float32, getattr(torch, dtype)}
    assert {name: weight.dtype for name, weight in network.state_dict().items()} == {
        name: weight.dtype for name, weight in whole.items()
    }
    assert_same(network, whole)


@pytest.mark.parametrize("naming", NAMINGS)
def test_8_bit_weights_are_the_numbers_they_stand_for(
    naming: str, base: Path, other: torch.nn.Module, tmp_path: Path
) -> None:
    other.to(EIGHT_BITS)
    file = written(NAMINGS[naming](other), tmp_path / "other.safetensors")
    assert_same(loaded(base, file).transformer, {name: value.float() for name, value in other.state_dict().items()})


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_8_bit_weights_are_multiplied_by_the_scale_beside_them(
    scale_name: str, base: Path, other: torch.nn.Module, tmp_path: Path
) -> None:
    weights = NAMINGS["ComfyUI"](other)
    scaled = [name for name in weights if ".ffn." in name and name.endswith(".weight")]
    assert scaled
    for number, name in enumerate(scaled):
        scale = torch.tensor(0.5 + number)
        weights[name] = (weights[name] / scale).to(EIGHT_BITS)
        weights[f"{name.removesuffix('weight')}{scale_name}"] = scale
    file = written(weights | {"scaled_fp8": torch.empty(2, dtype=EIGHT_BITS)}, tmp_path / "other.safetensors")
    network = loaded(base, file).transformer
    for name, value in other.state_dict().items():
        if ".ffn." in name and name.endswith(".weight"):
            assert 0 < (network.state_dict()[name] - value).abs().max() < 0.07 * value.abs().max()
        else:
            assert torch.equal(network.state_dict()[name], value)


def test_a_gguf_file_runs_and_is_close_to_what_it_was_packed_from(
    base: Path, other: torch.nn.Module, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "wan")
    for name, value in wan_tensors(other).items():
        numbers = value.numpy()
        if name.endswith(".weight") and value.ndim == 2 and value.shape[1] % 32 == 0 and "embedding" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quantize(numbers, kind)
            writer.add_tensor(name, packed, raw_shape=packed.shape, raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pipe = loaded(base, str(tmp_path / "other.gguf"))
    assert any(type(weight).__name__ == "GGUFParameter" for weight in pipe.transformer.parameters())
    latents = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    call = {"timestep": torch.tensor([500]), "encoder_hidden_states": torch.ones(1, 6, 16), "return_dict": False}
    with torch.no_grad():
        packed_output, output = (model(latents, **call)[0] for model in (pipe.transformer, other))
    assert 0 < (packed_output - output).abs().max() < 0.05 * output.abs().max()


def test_each_of_two_experts_takes_a_file_of_its_own(tmp_path: Path) -> None:
    pipe = build_random("wan2.2-t2v")
    pipe.save_pretrained(tmp_path / "base")
    before = load_pipeline(str(tmp_path / "base"), device="cpu", dtype="float32")
    changed = {name: value + 1 for name, value in pipe.transformer_2.state_dict().items()}
    file = written(changed, tmp_path / "low.safetensors")
    pipe = loaded(tmp_path / "base", f"low={file}")
    assert_same(pipe.transformer_2, changed)
    assert_same(pipe.transformer, dict(before.transformer.state_dict()))
    with pytest.raises(UserError, match="two experts; say which"):
        loaded(tmp_path / "base", file)
    with pytest.raises(UserError, match="are for one transformer"):
        loaded(tmp_path / "base", f"low={file}", f"low={file}")


def test_an_expert_of_a_model_with_one_transformer_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one transformer and no experts"):
        loaded(base, f"low={written({}, tmp_path / 'other.safetensors')}")


def test_a_file_that_lacks_weights_is_refused(base: Path, other: torch.nn.Module, tmp_path: Path) -> None:
    weights = wan_tensors(other)
    weights.pop("blocks.0.ffn.0.weight")
    with pytest.raises(UserError, match=r"other\.safetensors lacks weights that a WanTransformer3DModel"):
        loaded(base, written(weights, tmp_path / "other.safetensors"))


def test_the_weights_that_a_file_in_diffusers_naming_lacks_are_named_in_one_line(
    base: Path, other: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = dict(other.state_dict())
    weights.pop("blocks.0.ffn.net.2.weight")
    file = written(weights, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"has: 1 weight \(blocks\.0\.ffn\.net\.2\.weight\)\.$"):
        loaded(base, file)
    assert "not used" not in capsys.readouterr().err  # diffusers' own lines, which name others


def test_a_file_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other\.safetensors"):
        loaded(base, written({"a.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="expected shape"):
        loaded(base, written(wan_tensors(tiny_transformer()), tmp_path / "other.safetensors"))


def test_weights_without_a_place_are_said(
    base: Path, other: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidaccel.generation.single_file.logger.parent.propagate", True)
    weights = wan_tensors(other)
    loaded(base, written(weights, tmp_path / "other.safetensors"))
    assert not [message for message in caplog.messages if "other.safetensors" in message]
    deeper = {name.replace("blocks.1.", "blocks.2."): value for name, value in weights.items() if "blocks.1." in name}
    assert deeper
    loaded(base, written(weights | {k: v.clone() for k, v in deeper.items()}, tmp_path / "other.safetensors"))
    assert [message for message in caplog.messages if "other.safetensors holds weights" in message]


def test_what_is_no_file_of_weights_is_refused(base: Path, tmp_path: Path) -> None:
    for name in ("other.safetensors", "other.gguf"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(UserError, match=name):
            loaded(base, str(tmp_path / name))


def test_a_class_that_diffusers_reads_no_single_files_of_is_named(tmp_path: Path) -> None:
    pipe = build_random("latte")
    pipe.save_pretrained(tmp_path / "base")
    file = written(dict(pipe.transformer.state_dict()), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no single files of LatteTransformer3DModel"):
        loaded(tmp_path / "base", file)


@pytest.mark.parametrize(
    ("name", "words"), [("weights.pt", "pickle"), ("weights.txt", "ends in .safetensors or .gguf"), (None, "no file")]
)
def test_another_kind_of_file_is_refused_before_anything_is_loaded(
    name: str | None, words: str, tmp_path: Path
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=words):
        TransformerFile(tmp_path / (name or "nothing.gguf"))


def test_the_command_makes_a_video_with_the_file_and_records_its_content(
    base: Path, other: torch.nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(NAMINGS["ComfyUI"](other), tmp_path / "other.safetensors")
    sizes = ("--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "2", "--no-cache")
    command = ["generate", "a red circle", *sizes, "--output", str(tmp_path / "out" / "one.mp4")]
    assert run([*command, "--model", str(base), "--transformer", file]) == 0, capsys.readouterr().err
    sidecar = json.loads((tmp_path / "out" / "one.json").read_text())
    assert sidecar["settings"]["transformers"] == [TransformerFile(Path(file)).to_dict()]
    assert run([*command, "--model", str(base), "--transformer", file]) == 0
    assert "finished before" in capsys.readouterr().out
    weights = load_file(file)
    written({name: value + 1 for name, value in weights.items()}, Path(file))
    assert run([*command, "--model", str(base), "--transformer", file]) == 2
    assert "not made with these settings" in capsys.readouterr().err


def test_a_file_as_the_model_is_one_line_that_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert run(["generate", "a red circle", "--model", str(tmp_path / "model.gguf")]) == 2
    assert "--transformer" in capsys.readouterr().err

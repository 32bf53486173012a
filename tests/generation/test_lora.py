"""LoRA files: every naming is the same adapter, each expert gets its own, and what fits nowhere is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.family_calls import call_inputs
from tests.support.wan_names import wan_name
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report
from vidaccel.cli import run
from vidaccel.errors import UserError
from vidaccel.generation.adapters import load_loras, merge_loras
from vidaccel.generation.expert_files import LoraFile
from vidaccel.generation.loading import load_pipeline
from vidaccel.random_models.build import build_random, make_random

pytest.importorskip("peft")

Tensors = dict[str, torch.Tensor]
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]
RANK = 4
SIZES = ("--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "2", "--no-cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random("wan2.1-t2v", tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random("wan2.2-t2v", tmp_path_factory.mktemp("model") / "wan22")


@pytest.fixture(scope="module")
def matrices(folder: Path) -> Matrices:
    """Random matrices A (rank, in) and B (out, rank) for every layer that all the namings cover."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: layer
        for name, layer in load_pipeline(str(folder), device="cpu", dtype="float32").transformer.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.startswith("blocks.")
    }
    return {
        name: (
            torch.randn(RANK, layer.in_features, generator=generator),
            torch.randn(layer.out_features, RANK, generator=generator),
        )
        for name, layer in layers.items()
    }


def named(matrices: Matrices, name: Callable[[str], str], ends: tuple[str, str] = ("lora_A", "lora_B")) -> Tensors:
    return {
        f"{name(layer)}.{end}.weight": matrix
        for layer, pair in matrices.items()
        for end, matrix in zip(ends, pair, strict=True)
    }


def original(layer: str) -> str:
    return wan_name(f"{layer}.").removesuffix(".")


def kohya(layer: str) -> str:
    return "lora_unet_" + original(layer).replace(".", "_")


def with_alphas(weights: Tensors) -> Tensors:
    """As kohya's trainers write it: the strength of each layer is alpha over rank, here one."""
    down = [name for name in weights if name.endswith(".lora_down.weight")]
    return weights | {f"{name.removesuffix('.lora_down.weight')}.alpha": torch.tensor(float(RANK)) for name in down}


KOHYA = ("lora_down", "lora_up")
NAMINGS: dict[str, Callable[[Matrices], Tensors]] = {
    "diffusers": lambda matrices: named(matrices, lambda layer: f"transformer.{layer}"),
    "diffusers without prefix": lambda matrices: named(matrices, lambda layer: layer),
    "peft": lambda matrices: named(matrices, lambda layer: f"base_model.model.{layer}"),
    "ComfyUI": lambda matrices: named(matrices, lambda layer: f"diffusion_model.{original(layer)}"),
    "lightx2v": lambda matrices: named(matrices, lambda layer: f"diffusion_model.{original(layer)}", KOHYA),
    "original": lambda matrices: named(matrices, original, ("lora_A.default", "lora_B.default")),
    "kohya": lambda matrices: with_alphas(named(matrices, kohya, KOHYA)),
}


def written(weights: Tensors, path: Path) -> str:
    save_file(weights, path)
    return str(path)


def output(transformer: Any) -> torch.Tensor:
    latents = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    text = torch.ones(1, 6, transformer.config.text_dim)
    with torch.no_grad():
        return transformer(latents, torch.tensor([500]), text, return_dict=False)[0]


def merged(transformer: Any, matrices: Matrices, weight: float) -> Any:
    """The slow obvious twin: W + weight * B A in every layer."""
    for name, (down, up) in matrices.items():
        transformer.get_submodule(name).weight.data += weight * up @ down
    return transformer


def loaded(model: Path, *loras: str) -> Any:
    return load_pipeline(str(model), device="cpu", dtype="float32", loras=loras)


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_file_in_each_naming_is_the_weights_merged_by_hand(
    naming: str, folder: Path, matrices: Matrices, tmp_path: Path
) -> None:
    file = written(NAMINGS[naming](matrices), tmp_path / "style.safetensors")
    expected = output(merged(loaded(folder).transformer, matrices, 0.5))
    torch.testing.assert_close(output(loaded(folder, f"{file}:0.5").transformer), expected, atol=1e-4, rtol=1e-3)
    assert (output(loaded(folder).transformer) - expected).abs().max() > 0.01


def test_several_files_add_up(folder: Path, matrices: Matrices, tmp_path: Path) -> None:
    file = written(NAMINGS["ComfyUI"](matrices), tmp_path / "style.safetensors")
    once = output(merged(loaded(folder).transformer, matrices, 0.75))
    torch.testing.assert_close(
        output(loaded(folder, f"{file}:0.5", f"{file}:0.25").transformer), once, atol=1e-4, rtol=1e-3
    )


def test_an_expert_gets_what_is_for_it_and_both_get_what_is_for_none(
    experts: Path, matrices: Matrices, tmp_path: Path
) -> None:
    file = written(NAMINGS["ComfyUI"](matrices), tmp_path / "style.safetensors")
    plain = loaded(experts)
    changed = {
        texts: [
            not torch.equal(output(getattr(pipe, part)), output(getattr(plain, part)))
            for part in ("transformer", "transformer_2")
        ]
        for texts in ((f"high={file}",), (f"low={file}:0.8",), (file,), (f"high={file}", f"low={file}"))
        for pipe in [loaded(experts, *texts)]
    }
    assert list(changed.values()) == [[True, False], [False, True], [True, True], [True, True]]


def test_easycache_reuses_steps_of_a_model_with_a_lora(folder: Path, matrices: Matrices, tmp_path: Path) -> None:
    file = written(NAMINGS["diffusers"](matrices), tmp_path / "style.safetensors")
    pipe = loaded(folder, f"{file}:0.1")
    apply_easycache(pipe, EasyCacheConfig(threshold=float("inf"), warmup_steps=2))
    pipe(**call_inputs("wan2.1-t2v", num_inference_steps=6))
    assert easycache_report(pipe).num_reused == 3


def without(weights: Tensors, word: str) -> Tensors:
    return {name: value for name, value in weights.items() if word not in name}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda weights: {f"else.{name}": value for name, value in weights.items()}, "fits no layer"),
        (lambda weights: without(weights, "lora_B"), "one matrix of two"),
        (
            lambda weights: {**weights, "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.zeros(3, RANK)},
            "does not fit",
        ),
        (lambda weights: without(weights, "blocks.0.attn1.to_q.lora_B"), "one matrix of two"),
        (lambda weights: {"transformer.blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, "does not fit"),
    ],
    ids=["another model", "no B", "another shape", "half a layer", "no LoRA"],
)
def test_what_does_not_fit_is_one_clear_line(
    damage: Callable[[Tensors], Tensors], words: str, folder: Path, matrices: Matrices, tmp_path: Path
) -> None:
    file = written(damage(NAMINGS["diffusers"](matrices)), tmp_path / "style.safetensors")
    with pytest.raises(UserError, match=words) as refusal:
        loaded(folder, file)
    assert "style.safetensors" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_layers_that_fit_nothing_are_counted_in_a_warning(
    folder: Path,
    matrices: Matrices,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vidaccel.generation.adapters.logger.parent.propagate", True)
    strangers = {f"blocks.{number}.attn1.to_q": (torch.zeros(RANK, 8), torch.zeros(8, RANK)) for number in (98, 99)}
    file = written(NAMINGS["diffusers"](matrices | strangers), tmp_path / "style.safetensors")
    loaded(folder, file)
    (warning,) = {message for message in caplog.messages if "fit nothing" in message}
    assert warning.startswith(f"2 of {len(matrices) + 2} layers in style.safetensors")


@pytest.mark.parametrize(
    "family",
    ["wan2.1-vace", "skyreels-v2-t2v", "hunyuan-video-t2v", "ltx-t2v", "ltx2-t2v", "cogvideox-t2v", "mochi", "helios"],
)
def test_other_families_take_a_lora_too(family: str, tmp_path: Path) -> None:
    pipe = build_random(family)
    layers = pipe.transformer.named_modules()
    name, layer = next(one for one in layers if one[0].endswith(("attn1.to_q", "attn.to_q")))
    down, up = torch.randn(RANK, layer.in_features), torch.randn(layer.out_features, RANK)
    weights = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    file = written(weights, tmp_path / "style.safetensors")
    expected = layer.weight.data + 0.5 * up @ down
    load_loras(pipe, [LoraFile.parse(f"{file}:0.5")])
    merge_loras(pipe)
    torch.testing.assert_close(pipe.transformer.get_submodule(name).weight.data, expected)


def test_a_pipeline_that_takes_no_lora_is_named(tmp_path: Path) -> None:
    model = make_random("latte", tmp_path / "latte")
    file = written({"transformer.a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "style.safetensors")
    with pytest.raises(UserError, match="LattePipeline takes no LoRA"):
        loaded(model, file)


def test_an_expert_of_a_model_without_experts_is_refused(folder: Path, matrices: Matrices, tmp_path: Path) -> None:
    file = written(NAMINGS["diffusers"](matrices), tmp_path / "style.safetensors")
    with pytest.raises(UserError, match="one denoiser and no experts"):
        loaded(folder, f"high={file}")


def test_a_name_is_read_as_expert_file_and_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "a=b.safetensors", "b.safetensors:2.safetensors"):
        Path(name).write_bytes(b"")
    assert LoraFile.parse("a.safetensors") == LoraFile(Path("a.safetensors"))
    assert LoraFile.parse("low=a.safetensors:-0.5") == LoraFile(Path("a.safetensors"), "low", -0.5)
    assert LoraFile.parse("a=b.safetensors:2") == LoraFile(Path("a=b.safetensors"), None, 2.0)
    assert LoraFile.parse("b.safetensors:2.safetensors").path == Path("b.safetensors:2.safetensors")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing.safetensors", "no file nothing.safetensors"),
        ("lora.pt", "pickle"),
        ("lora.txt:1", "ends in .safetensors"),
        ("lora.safetensors:nan", "finite"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_loaded(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lora.pt", "lora.txt", "lora.safetensors"):
        Path(name).write_bytes(b"")
    monkeypatch.setattr("vidaccel.generation.loading.load_networks", lambda *_, **__: pytest.fail("loaded"))
    assert run(["generate", "a red circle", "--lora", text]) == 2
    assert words in capsys.readouterr().err


def test_without_peft_the_command_to_install_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    monkeypatch.setattr("vidaccel.generation.expert_files.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        LoraFile(tmp_path / "a.safetensors")


def test_the_command_records_content_and_weight_and_makes_other_videos_anew(
    folder: Path, matrices: Matrices, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(NAMINGS["kohya"](matrices), tmp_path / "style.safetensors")
    command = ["generate", "a red circle", *SIZES, "--model", str(folder), "--output", str(tmp_path / "one.mp4")]
    assert run([*command, "--lora", f"{file}:0.5"]) == 0, capsys.readouterr().err
    sidecar = json.loads((tmp_path / "one.json").read_text())
    assert sidecar["settings"]["loras"] == [LoraFile(Path(file), None, 0.5).to_dict()]
    assert run([*command, "--lora", f"{file}:0.5"]) == 0
    assert "finished before" in capsys.readouterr().out
    for others in ([], ["--lora", file]):
        assert run([*command, *others]) == 2
        assert "not made with these settings" in capsys.readouterr().err

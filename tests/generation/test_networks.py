"""Weights that a folder lacks, or holds too many of, are named; nothing is made up for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
FILES = (TRANSFORMER, VAE, TEXT_ENCODER)


def changed(source: Path, folder: Path, file: str, change: dict[str, torch.Tensor | None]) -> str:
    """A copy of a model with other weights in one file (None: taken out); returns the folder."""
    shutil.copytree(source, folder)
    weights: dict[str, torch.Tensor | None] = {**load_file(folder / file), **change}
    save_file({name: weight for name, weight in weights.items() if weight is not None}, folder / file, {"format": "pt"})
    return str(folder)


def one_weight(source: Path, file: str) -> tuple[str, torch.Tensor]:
    """The name and values of a weight that nothing is tied to."""
    weights = load_file(source / file)
    name = next(name for name in sorted(weights) if name.endswith("weight") and "embed" not in name)
    return name, weights[name]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_weight_is_named_though_a_stranger_of_its_size_stands_in_its_place(
    tiny_wan_folder: Path, tmp_path: Path, file: str
) -> None:
    name, weight = one_weight(tiny_wan_folder, file)
    model = changed(tiny_wan_folder, tmp_path / "model", file, {name: None, "a.stranger": torch.zeros_like(weight)})
    with pytest.raises(UserError) as refusal:
        load_pipeline(model, device="cpu")
    for words in (Path(file).parent.name, "lacks 1 weight", name, "a.stranger"):
        assert words in str(refusal.value)


@pytest.mark.parametrize("file", [TRANSFORMER, VAE])
def test_a_weight_that_a_denoiser_or_vae_has_no_place_for_is_named(
    tiny_wan_folder: Path, tmp_path: Path, file: str
) -> None:
    model = changed(tiny_wan_folder, tmp_path / "model", file, {"blocks.99.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"no place for 1 weight \(blocks\.99\.weight\)"):
        load_pipeline(model, device="cpu")


def test_a_text_encoder_may_be_saved_with_the_rest_of_its_model(tiny_wan_folder: Path, tmp_path: Path) -> None:
    model = changed(tiny_wan_folder, tmp_path / "model", TEXT_ENCODER, {"lm_head.weight": torch.zeros(2)})
    loaded, whole = (load_pipeline(folder, device="cpu").text_encoder for folder in (model, str(tiny_wan_folder)))
    for left, right in zip(loaded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("file", FILES)
def test_a_weight_of_another_shape_is_named(tiny_wan_folder: Path, tmp_path: Path, file: str) -> None:
    name, weight = one_weight(tiny_wan_folder, file)
    model = changed(tiny_wan_folder, tmp_path / "model", file, {name: torch.zeros(3, *weight.shape)})
    with pytest.raises(UserError, match=name):
        load_pipeline(model, device="cpu")

"""EasyCache on quantized transformers, loaded the way diffusers loads each kind: GGUF, torchao, bitsandbytes.

torchao and bitsandbytes are tested where they are installed. diffusers loads bitsandbytes only with a GPU, so that here
its layers are put in by hand.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
from torch import nn

from tests.support.family_calls import call_inputs
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache
from vidaccel.bench.shared.random_model import call_tensors, random_pipeline
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.generation.loading import load_pipeline
from vidaccel.random_models.build import make_random

CPU = torch.device("cpu")
CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)
BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}  # rows of 32, a block of 8-bit GGUF
TEXT = (8, 32)
ROWS = {
    "wan": SHAPES["toy"].tiny(
        {**BLOCKS, "ffn_dim": 64, "text_dim": 32, "freq_dim": 32},
        {"prompt_embeds": TEXT, "negative_prompt_embeds": TEXT},
    ),
    "hunyuan": SHAPES["toy-hunyuan-video"].tiny(
        {
            **BLOCKS,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 32,
            "rope_axes_dim": (4, 6, 6),
        },
        {"prompt_embeds": TEXT, "prompt_attention_mask": (8,), "pooled_prompt_embeds": (32,)},
    ),
}


def pipeline(row: str) -> Any:
    return random_pipeline(ROWS[row], device=CPU, dtype=torch.float32, guidance_scale=5.0)


def run(pipe: Any, row: str) -> torch.Tensor:
    shape = ROWS[row]
    return pipe(
        **call_tensors(shape.embeddings, device=CPU, dtype=torch.float32),
        num_frames=shape.num_frames,
        height=shape.height,
        width=shape.width,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_dict=False,
    )[0]


def from_gguf(transformer: Any, folder: Path) -> Any:
    """Write the weights as an 8-bit GGUF file and load that."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    file = gguf.GGUFWriter(str(folder / "model.gguf"), "test")
    for name, tensor in transformer.state_dict().items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            file.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            file.add_tensor(name, values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    transformer.save_config(folder)
    return type(transformer).from_single_file(
        str(folder / "model.gguf"),
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )


def from_torchao(transformer: Any, folder: Path) -> Any:
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    transformer.save_pretrained(folder)
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    return type(transformer).from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)


def with_bitsandbytes(transformer: Any, folder: Path) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for parent in transformer.transformer_blocks if hasattr(transformer, "transformer_blocks") else transformer.blocks:
        for name, layer in [(name, layer) for name, layer in parent.named_modules() if type(layer) is nn.Linear]:
            eight_bit = bitsandbytes.nn.Linear8bitLt(
                layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
            )
            eight_bit.load_state_dict(layer.state_dict())
            parent.set_submodule(name, eight_bit.to(CPU))
    return transformer


WAYS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "gguf": (from_gguf, "GGUFParameter"),
    "torchao": (from_torchao, "Int8Tensor"),
    "bitsandbytes": (with_bitsandbytes, "Int8Params"),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("way", WAYS)
def test_a_quantized_transformer_is_reused_like_any_other(row: str, way: str, tmp_path: Path) -> None:
    pipe = pipeline(row)
    unquantized = run(pipe, row)
    load, parameter = WAYS[way]
    pipe.transformer = load(pipe.transformer, tmp_path).eval()
    assert parameter in {type(weight).__name__ for weight in pipe.transformer.parameters()}
    plain = run(pipe, row)
    assert 0 < (plain - unquantized).abs().mean() < 0.2 * unquantized.abs().mean()
    apply_easycache(pipe, EasyCacheConfig(threshold=0))
    assert torch.equal(run(pipe, row), plain)
    remove_easycache(pipe)
    apply_easycache(pipe, CONFIG)
    reused = run(pipe, row)
    assert easycache_report(pipe).num_reused >= 3
    assert (reused - plain).abs().mean() < 0.5 * plain.abs().mean()
    assert torch.equal(run(pipe, row), reused)
    remove_easycache(pipe)
    assert torch.equal(run(pipe, row), plain)


def test_a_saved_pipeline_with_a_quantized_transformer_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    folder = make_random("wan2.1-t2v", tmp_path / "model")
    transformer = from_torchao(WanTransformer3DModel.from_pretrained(folder / "transformer"), tmp_path)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer")
    pipe = load_pipeline(str(folder), device="cpu", dtype="float32")
    assert "Int8Tensor" in {type(weight).__name__ for weight in pipe.transformer.parameters()}
    apply_easycache(pipe, CONFIG)
    frames = pipe(**call_inputs("wan2.1-t2v", num_inference_steps=8)).frames
    assert frames.isfinite().all()
    assert easycache_report(pipe).num_reused >= 1

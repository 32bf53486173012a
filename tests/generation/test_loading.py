"""Loading: devices, number formats, attention backends, completeness; memory asked for before it is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import tiny_wan_i2v, tiny_wan_t2v, tiny_wan_two_experts
from vidaccel.errors import UserError
from vidaccel.generation.loading import component_dtypes, cpu_has_bfloat16, load_pipeline, resolve_device
from vidaccel.machine import footprint as footprints
from vidaccel.machine.attention import (
    attention_backend_names,
    check_attention_backend,
    usable_attention_backends,
)
from vidaccel.machine.components import denoisers, modules
from vidaccel.machine.footprint import Footprint, available_bytes, footprint, gigabytes, weight_bytes
from vidaccel.machine.private_names import execution_device

CPU = torch.device("cpu")


def test_the_pipeline_class_is_the_one_the_folder_names(tiny_wan_folder: Path) -> None:
    pipe = load_pipeline(str(tiny_wan_folder), device="cpu")
    assert type(pipe).__name__ == "WanPipeline"
    assert execution_device(pipe) == CPU


def test_automatic_formats_are_float32_but_for_the_vae_where_the_cpu_has_bfloat16(tiny_wan_folder: Path) -> None:
    pipe = load_pipeline(str(tiny_wan_folder), device="cpu")
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float32
    assert pipe.vae.dtype == (torch.bfloat16 if cpu_has_bfloat16() else torch.float32)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_formats_follow_device_and_flag(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidaccel.generation.loading.cpu_has_bfloat16", lambda: has_bfloat16)
    vae = {"vae": torch.bfloat16} if has_bfloat16 else {}
    assert component_dtypes("auto", CPU, pipeline="WanPipeline") == {"default": torch.float32, **vae}
    assert component_dtypes("auto", torch.device("cuda"), pipeline="WanPipeline") == {"default": torch.bfloat16}
    assert component_dtypes("float32", CPU, pipeline="WanPipeline") == {"default": torch.float32}


def test_devices_that_exist_are_resolved() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "meta", "nonsense", "cpu:x"])
def test_devices_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"[Dd]evice"):
        resolve_device(name)


def test_the_native_backend_and_flex_are_names_diffusers_knows() -> None:
    assert {"native", "flex", "xformers", "flash", "sage"} <= set(attention_backend_names())
    assert "native" in usable_attention_backends(device=CPU, dtype=torch.float32)


def test_a_backend_that_returns_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vidaccel.machine.attention.dispatch_attention_fn",
        lambda query, *_, **__: torch.full_like(query, float("nan")),
    )
    with pytest.raises(UserError, match="wrong values"):
        check_attention_backend("_native_math", device=CPU, dtype=torch.float32)


def test_a_backend_that_runs_gives_the_same_video(tiny_wan_folder: Path) -> None:
    arguments = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    latents = [
        load_pipeline(str(tiny_wan_folder), device="cpu", attention=name)(
            "a red circle", generator=torch.Generator().manual_seed(0), **arguments
        ).frames
        for name in ("native", "_native_math")
    ]
    torch.testing.assert_close(*latents)


def test_asking_for_a_backend_changes_no_other_pipeline(tiny_wan_folder: Path) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    load_pipeline(str(tiny_wan_folder), device="cpu", attention="_native_math")
    assert _AttentionBackendRegistry.get_active_backend()[0].value == "native"


def test_weights_with_another_prefix_or_tied_are_complete(tiny_wan_folder: Path, tmp_path: Path) -> None:
    # `shared.weight` and `encoder.embed_tokens.weight` are one tensor and the file holds one of them.
    stored = load_file(tiny_wan_folder / "text_encoder" / "model.safetensors")
    assert len({"shared.weight", "encoder.embed_tokens.weight"} & set(stored)) == 1
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    name = next(name for name in stored if name.endswith("wo.weight"))
    stored.pop(name)
    save_file(stored, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        load_pipeline(str(folder), device="cpu")


def test_pickled_weights_are_never_read(tiny_wan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(str(folder), device="cpu")


def test_a_compiler_that_is_missing_is_said_before_anything_is_loaded(
    tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="compiler"):
        load_pipeline(str(tiny_wan_folder), device="cpu", compile=True)


def test_the_weights_in_files_are_counted_as_they_will_be_loaded(tiny_wan_folder: Path) -> None:
    pipe = load_pipeline(str(tiny_wan_folder), device="cpu", dtype="float32")
    loaded = footprint(pipe, num_frames=5, height=32, width=32).weights
    assert weight_bytes(tiny_wan_folder, 4) == pytest.approx(loaded, rel=0.1)


def test_a_larger_video_needs_more_and_parts_are_found_in_every_pipeline() -> None:
    for pipe in (tiny_wan_t2v(), tiny_wan_i2v(), tiny_wan_two_experts()):
        small = footprint(pipe, num_frames=5, height=32, width=32)
        large = footprint(pipe, num_frames=9, height=64, width=64)
        assert large.transformer > 4 * small.transformer
        assert large.vae > 4 * small.vae
        assert large.weights == small.weights
        assert large.working == max(large.transformer, large.vae)
        assert {"transformer", "vae"} <= set(modules(pipe))
    assert len(denoisers(tiny_wan_two_experts())) == 2


def test_a_footprint_counts_the_larger_of_denoising_and_decoding() -> None:
    assert Footprint(weights=5, transformer=3, vae=7).working == 7


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprints, "_CGROUP", tmp_path)
    without = available_bytes(CPU)
    assert without > 2**20
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert available_bytes(CPU) == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(CPU) > 2**20


def test_sizes_are_written_for_people() -> None:
    assert gigabytes(3 * 2**29) == "1.5 GiB"
    assert gigabytes(12 * 2**20) == "12 MiB"
    assert gigabytes(1) == "1 MiB"


def test_a_folder_with_a_wrong_index_is_one_error(tiny_wan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "NoSuchAutoencoder"]}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(str(folder), device="cpu")


@pytest.mark.shipped
def test_the_vae_in_bfloat16_loses_nothing_one_can_measure() -> None:
    from vidaccel.bench.quality import reconstruct
    from vidaccel.catalog.models import EMBEDDED_MODEL
    from vidaccel.video.metrics import psnr
    from vidaccel.world import make_clip

    clip = make_clip(7, num_frames=9, split="test").video
    made = {}
    for name in ("float32", "bfloat16"):
        pipe = load_pipeline(EMBEDDED_MODEL, device="cpu", dtype="float32")
        pipe.vae.to(getattr(torch, name))
        made[name] = reconstruct(pipe, clip)
    assert psnr(made["float32"], made["bfloat16"]) > 50
    assert psnr(clip, made["bfloat16"]) > psnr(clip, made["float32"]) - 0.05

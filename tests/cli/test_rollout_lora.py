"""LoRA files of a causal student: the same video as with the weights merged by hand, and a session of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support import rollout_command
from tests.support.rollout_command import Command, interrupted_after
from vidaccel.generation.adapters import merge_loras
from vidaccel.generation.loading import load_pipeline
from vidaccel.models.fused_layers import fuse_layers
from vidaccel.sessions.session import Session

pytest.importorskip("peft")
student_folder, plans, rollout = rollout_command.student_folder, rollout_command.plans, rollout_command.rollout
LAYERS = ("attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ffn.net.2")
RANK = 4


@pytest.fixture(scope="module")
def lora(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random matrices for some layers of both blocks, the cached prompt's keys and values among them."""
    generator = torch.Generator().manual_seed(0)
    transformer = load_pipeline(str(student_folder), device="cpu").transformer
    weights = {}
    for name in [f"blocks.{number}.{layer}" for number in range(2) for layer in LAYERS]:
        layer = transformer.get_submodule(name)
        down, up = torch.randn(RANK, layer.in_features), torch.randn(layer.out_features, RANK)
        weights[f"transformer.{name}.lora_A.weight"] = down.normal_(generator=generator)
        weights[f"transformer.{name}.lora_B.weight"] = up.normal_(generator=generator)
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(weights, file)
    return str(file)


def latents(student: Path, *, lora: str | None, merged: bool = False) -> torch.Tensor:
    pipe = load_pipeline(str(student), device="cpu", dtype="float32", loras=[] if lora is None else [lora])
    if merged:
        merge_loras(pipe)
        fuse_layers(pipe.transformer)
    chunks = pipe.stream("a red circle", num_chunks=3, height=32, width=48, max_sequence_length=16, decode=False)
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


def test_a_rollout_with_a_lora_is_one_with_the_weights_merged_and_the_layers_joined(
    student_folder: Path, lora: str
) -> None:
    made = latents(student_folder, lora=f"{lora}:0.1")
    assert (made - latents(student_folder, lora=None)).abs().max() > 0.01
    torch.testing.assert_close(latents(student_folder, lora=f"{lora}:0.1", merged=True), made, atol=1e-3, rtol=1e-3)


def test_a_session_goes_on_with_the_same_lora_and_weight_alone(
    rollout: Command,
    lora: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    session = str(tmp_path / "session")
    command = ("a red circle", "--checkpoint", session)
    assert rollout("a red circle", "--lora", lora, output=tmp_path / "whole.mp4") == 0
    with monkeypatch.context() as patch:
        interrupted_after(2, patch, KeyboardInterrupt())
        assert rollout(*command, "--lora", lora) == 130
    for others in ((), ("--lora", f"{lora}:0.5"), ("--lora", lora, "--lora", lora)):
        capsys.readouterr()
        assert rollout(*command, "--resume", *others) == 2
        assert "adapters" in capsys.readouterr().err
    with Session.open(session, read_only=True) as kept:
        assert kept.branch().num_chunks == 2
    assert rollout(*command, "--resume", "--lora", lora) == 0
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_wrong_file_is_refused_before_the_model_is_loaded(
    rollout: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vidaccel.cli.rollout_run.load_pipeline", lambda *_, **__: pytest.fail("loaded the model"))
    assert rollout("a red circle", "--lora", str(tmp_path / "nothing.safetensors")) == 2
    assert "no file" in capsys.readouterr().err


def test_a_negative_prompt_without_guidance_is_said(rollout: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert rollout("a red circle", "--negative-prompt", "blue", "--plan") == 0
    assert "--negative-prompt has no effect" in capsys.readouterr().err
    assert rollout("a red circle", "--negative-prompt", "blue", "--guidance-scale", "3", "--plan") == 0
    assert "--negative-prompt" not in capsys.readouterr().err

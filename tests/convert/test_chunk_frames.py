"""How many latent frames a converted student makes at once: what says so, and that all who ask the folder agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import tiny_transformer
from tests.support.wan_names import wan_tensors
from vidaccel.catalog.registry import spec_of
from vidaccel.cli import run
from vidaccel.cli.rollout_request import StudentFolder
from vidaccel.convert.causal_wan import StudentFiles, StudentSettings, convert_causal_wan
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline

TRAINING = """\
generator_ckpt: checkpoints/causal_ode.pt
denoising_step_list:
- 1000
- 500
num_frame_per_block: {} # latent frames
timestep_shift: 5.0
"""
LONGLIVE_2 = """\
model_kwargs:
  model_name: Wan2.2-TI2V-5B
  num_frame_per_block: 8
  local_attn_size: 32
"""

Convert = Callable[..., tuple[int, str]]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "from" / "self_forcing.safetensors"
    path.parent.mkdir()
    save_file(wan_tensors(tiny_transformer(seed=3)), path)
    return path


@pytest.fixture
def chunk_of(weights: Path, tiny_wan_folder: Path, tmp_path: Path) -> Convert:
    """Convert weights; returns the number that the folder records and who is said to have said it."""

    def call(
        path: Path = weights, kind: str = "self-forcing", base: Path | None = tiny_wan_folder, **given: object
    ) -> tuple[int, str]:
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        files, settings = StudentFiles(checkpoint=path, base=base), StudentSettings(**given)  # type: ignore[arg-type]
        made = convert_causal_wan(files, output, kind=kind, settings=settings)
        recorded = json.loads((output / "model_index.json").read_text())["chunk_frames"]
        assert recorded == made.chunk.number
        return recorded, made.chunk.source

    return call


def test_a_file_beside_the_weights_says_it(weights: Path, chunk_of: Convert) -> None:
    assert chunk_of() == (
        3,
        "published for Self-Forcing, nothing beside the weights says; give --chunk-frames for another",
    )
    for name, text, number in (
        ("config.yaml", TRAINING.format(1), 1),
        ("causal_forcing_dmd_chunkwise.yml", TRAINING.format(3), 3),
        ("longlive2.yaml", "memory: window:24\n" + LONGLIVE_2, 8),
        ("config.json", '{"num_frame_per_block": 1}', 1),
        ("config.json", '{"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 7}', 7),
    ):
        path = weights.parent / name
        path.write_text(text)
        memory = "window:24" if number == 8 else None
        assert chunk_of(memory=memory) == (number, name)
        path.unlink()
    (weights.parent / "training.yaml").write_text("# num_frame_per_block: 1\nmax_num_frame_per_block: 7\n")
    assert chunk_of()[0] == 3


def test_the_names_of_frame_wise_weights_say_it(weights: Path, chunk_of: Convert, tmp_path: Path) -> None:
    for place, number in (
        ("framewise/causal_forcing.safetensors", 1),
        ("chunkwise/causal_forcing.safetensors", 3),
        ("weights/self-forcing-Frame-Wise.safetensors", 1),
        ("causal-forcing++/framewise-2step.safetensors", 1),
    ):
        path = tmp_path / place
        path.parent.mkdir()
        path.write_bytes(weights.read_bytes())
        found, source = chunk_of(path, kind="auto")
        assert found == number
        assert ("framewise" in source) == (number == 1)


def test_what_the_user_says_comes_first(weights: Path, chunk_of: Convert) -> None:
    (weights.parent / "config.json").write_text('{"num_frame_per_block": 3}')
    assert chunk_of(chunk_frames=1) == (1, "--chunk-frames")
    assert chunk_of(chunk_frames=4, memory="window:8") == (4, "--chunk-frames")


def test_what_is_said_twice_or_wrongly_is_refused(weights: Path, chunk_of: Convert) -> None:
    config, training = weights.parent / "config.json", weights.parent / "training.yaml"
    config.write_text('{"num_frame_per_block": 3}')
    training.write_text(TRAINING.format(1))
    with pytest.raises(UserError, match=r"config\.json says 3 .* training\.yaml says 1; give --chunk-frames"):
        chunk_of()
    assert chunk_of(chunk_frames=1) == (1, "--chunk-frames")
    training.unlink()
    for wrong in ("0", "-1", "2.5", '"three"', "null", "true", "123456"):
        config.write_text(f'{{"num_frame_per_block": {wrong}}}')
        with pytest.raises(UserError, match="no number of latent frames"):
            chunk_of()
    config.unlink()
    training.write_text(TRAINING.format("${frames}"))
    with pytest.raises(UserError, match=r"training\.yaml says .* no number of latent frames"):
        chunk_of()
    training.unlink()
    for wrong_number in (0, -3):
        with pytest.raises(UserError, match="at least 1"):
            chunk_of(chunk_frames=wrong_number)


def test_a_chunk_that_does_not_fit_the_memory_is_refused(chunk_of: Convert) -> None:
    with pytest.raises(UserError, match=r"Chunks of 8 .* window:21: .* divisible .*--memory"):
        chunk_of(chunk_frames=8)
    with pytest.raises(UserError, match="A memory must be"):
        chunk_of(memory="everything")
    assert chunk_of(chunk_frames=8, memory="sink+window:8+24")[0] == 8


def test_what_is_published_is_not_taken_for_other_latents(weights: Path, chunk_of: Convert) -> None:
    """LongLive 2.0 is of Wan2.2 with 48 channels and chunks of 8: the numbers of LongLive are not its own."""
    tensors = load_file(weights)
    width, _, *patch = tensors["patch_embedding.weight"].shape
    tensors["patch_embedding.weight"] = torch.zeros(width, 48, *patch)
    tensors["head.head.weight"] = tensors["head.head.weight"].repeat(3, 1)
    tensors["head.head.bias"] = tensors["head.head.bias"].repeat(3)
    save_file(tensors, weights)
    (weights.parent / "config.json").write_text('{"num_heads": 2}')
    with pytest.raises(UserError, match=r"Nothing says how many latent frames .* give --chunk-frames"):
        chunk_of(kind="longlive", base=None)
    assert chunk_of(kind="longlive", base=None, chunk_frames=8, memory="sink+window:8+24")[0] == 8


def test_pipeline_timeline_memory_and_command_line_agree_on_a_frame_wise_student(
    weights: Path, tiny_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    flags = ["--checkpoint", str(weights), "--base", str(tiny_wan_folder), "--output", str(output)]
    assert run(["convert", "causal-wan", *flags, "--chunk-frames", "1"]) == 0
    assert "chunks of 1 latent frame (--chunk-frames)" in capsys.readouterr().out
    pipe = load_pipeline(str(output), dtype="float32")
    assert pipe.memory_config().chunk_frames == pipe.grid().chunk_frames == 1
    assert StudentFolder.of(spec_of(str(output))).memory(None) == pipe.memory_config()
    chunks = list(pipe.stream("a red circle", num_chunks=3, height=32, width=32, max_sequence_length=16))
    assert [chunk.latents.shape[2] for chunk in chunks] == [1, 1, 1]
    assert [chunk.frames.shape[1] for chunk in chunks] == [1, 4, 4]

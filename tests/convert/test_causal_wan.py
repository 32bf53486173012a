"""`vidaccel convert causal-wan`: each published layout of a causal student becomes a folder, all else is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor
from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline

from tests.support.broken_weights import broken_contents
from tests.support.tiny_models import tiny_transformer
from tests.support.wan_names import Tensors, wan_name, wan_tensors
from vidaccel.catalog.registry import spec_of
from vidaccel.cli import run
from vidaccel.convert.causal_wan import StudentFiles, convert_causal_wan
from vidaccel.convert.causal_wan_map import STUDENT
from vidaccel.convert.checkpoint import Checkpoint, StoredTensor
from vidaccel.convert.folder import ConvertOptions, ConvertProgress
from vidaccel.convert.plan import make_plan
from vidaccel.convert.students import STUDENTS
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline
from vidaccel.memory import MemoryConfig, parse_memory
from vidaccel.models.causal_wan import CausalWanTransformer3DModel


def wrapped(tensors: Tensors, group: str) -> Tensors:
    return {f"{group}{name}": value.clone() for name, value in tensors.items()}


def in_fsdp(tensors: Tensors) -> Tensors:
    """The names that averaged weights keep: a wrapper around the model and one in front of every block."""
    inner = {re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", name): value for name, value in tensors.items()}
    return wrapped(inner, "generator_ema.model._fsdp_wrapped_module.")


@pytest.fixture(scope="module")
def student() -> WanTransformer3DModel:
    return tiny_transformer(seed=3)


@pytest.fixture(scope="module")
def other(student: WanTransformer3DModel) -> Tensors:
    """Other weights of the same names, as the critic or the weights that are not averaged."""
    return wan_tensors(tiny_transformer(seed=4))


@pytest.fixture
def file(student: WanTransformer3DModel, tmp_path: Path) -> Path:
    """Self-Forcing's released layout: averaged weights only."""
    path = tmp_path / "from" / "self_forcing_dmd.safetensors"
    path.parent.mkdir()
    save_file(wrapped(wan_tensors(student), "generator_ema.model."), path)
    return path


@pytest.fixture
def refused(tmp_path: Path, tiny_wan_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must fail with one line and leave nothing behind; returns the line."""

    def call(checkpoint: Path, *flags: str, base: Path | None = tiny_wan_folder) -> str:
        capsys.readouterr()
        output = tmp_path / "folder" / "out"
        flags += ("--base", str(base)) if base else ()
        assert run(["convert", "causal-wan", "--checkpoint", str(checkpoint), "--output", str(output), *flags]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert not (tmp_path / "folder").exists() or not list((tmp_path / "folder").iterdir())
        return lines[0]

    return call


@pytest.fixture(autouse=True)
def _no_leftover(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob(".*.part"))


def test_the_names_of_this_file_are_those_that_diffusers_reads(student: WanTransformer3DModel) -> None:
    states, again = student.state_dict(), convert_wan_transformer_to_diffusers(wan_tensors(student))
    assert again.keys() == states.keys()
    assert all(torch.equal(again[name], value) for name, value in states.items())


LAYOUTS: dict[str, tuple[Callable[[Tensors, Tensors], Tensors], str, str]] = {
    "self-forcing": (lambda new, old: wrapped(new, "generator_ema.model."), "ema", "window:21"),
    "causvid": (lambda new, old: wrapped(new, "generator.model."), "plain", "window:21"),
    "longlive": (
        lambda new, old: wrapped(new, "generator.model.") | wrapped(old, "critic.model."),
        "plain",
        "sink+window:3+9",
    ),
    "context-forcing": (
        lambda new, old: in_fsdp(new) | wrapped(old, "generator.model.") | wrapped(old, "critic.model."),
        "ema",
        "slow-fast:3+12+6",
    ),
    "causal-forcing": (
        lambda new, old: wrapped(old, "generator.model.") | wrapped(new, "generator_ema.model._fsdp_wrapped_module."),
        "ema",
        "window:21",
    ),
    "rolling-forcing": (
        lambda new, old: in_fsdp(new) | wrapped(old, "generator.model.") | wrapped(old, "critic.model."),
        "ema",
        "sink+window:3+18",
    ),
    "krea-realtime": (lambda new, old: wrapped(new, "model."), "unnamed", "window:6"),
}
OTHERS = {
    "bare": lambda new, old: new,
    "model": lambda new, old: wrapped(new, "model."),
    "compiled": lambda new, old: wrapped(new, "module._orig_mod.model."),
    "repacked": lambda new, old: wrapped(new, "model.diffusion_model."),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_published_layout_becomes_the_same_transformer(
    kind: str,
    student: WanTransformer3DModel,
    other: Tensors,
    tiny_wan_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout, weights, memory = LAYOUTS[kind]
    save_file(layout(wan_tensors(student), other), tmp_path / "model.safetensors")
    output = tmp_path / "out"
    flags = ["--checkpoint", str(tmp_path / "model.safetensors"), "--output", str(output), "--kind", kind]
    assert run(["convert", "causal-wan", *flags, "--base", str(tiny_wan_folder)]) == 0
    line, *remark = capsys.readouterr().out.strip().splitlines()
    assert line.endswith(f"{weights} weights, memory {memory}, ContextForcingWanPipeline")
    assert "chunks of 3 latent frames (published for" in line
    assert "give --chunk-frames" in line
    assert bool(remark) == (kind in ("rolling-forcing", "krea-realtime"))
    loaded = CausalWanTransformer3DModel.from_pretrained(output / "transformer")
    states = student.state_dict()
    assert loaded.state_dict().keys() == states.keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in states.items())
    sizes = (
        "num_attention_heads",
        "attention_head_dim",
        "ffn_dim",
        "num_layers",
        "text_dim",
        "freq_dim",
        "in_channels",
    )
    assert {name: loaded.config[name] for name in sizes} == {name: student.config[name] for name in sizes}
    index = json.loads((output / "model_index.json").read_text())
    assert index["_class_name"] == "ContextForcingWanPipeline"
    assert index["transformer"] == ["vidaccel.models.causal_wan", "CausalWanTransformer3DModel"]
    assert spec_of(str(output)).weights == "external"
    defaults = spec_of(str(output)).defaults
    assert (defaults.fps, defaults.height, defaults.width, defaults.guidance_scale) == (16, 480, 832, None)
    assert (index["memory"], index["chunk_frames"]) == (memory, 3)


def test_a_converted_transformer_computes_what_the_model_did(
    student: WanTransformer3DModel, file: Path, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    convert_causal_wan(StudentFiles(checkpoint=file, base=tiny_wan_folder), tmp_path / "out")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer").eval()
    latents, text = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 6, 16)
    with torch.no_grad():
        expected, found = (
            model(latents, timestep=torch.tensor([625.0]), encoder_hidden_states=text, return_dict=False)[0]
            for model in (student, loaded)
        )
    assert torch.equal(found, expected)
    assert found.abs().max() > 0


@pytest.mark.parametrize("layout", OTHERS)
def test_a_state_dict_saved_alone_is_read_whatever_is_wrapped_around_it(
    layout: str, student: WanTransformer3DModel, other: Tensors, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    save_file(OTHERS[layout](wan_tensors(student), other), tmp_path / "longlive_base.safetensors")
    files = StudentFiles(checkpoint=tmp_path / "longlive_base.safetensors", base=tiny_wan_folder)
    made = convert_causal_wan(files, tmp_path / "out")
    assert (made.weights, made.recipe.name) == ("unnamed", "LongLive")
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored.pop(name), value) for name, value in student.state_dict().items())
    assert not stored


@pytest.mark.parametrize(("weights", "seed"), [("auto", 3), ("ema", 3), ("plain", 4)])
def test_the_weights_that_are_asked_for_are_taken(
    weights: str, seed: int, student: WanTransformer3DModel, other: Tensors, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "context_forcing.safetensors"
    save_file(in_fsdp(wan_tensors(student)) | wrapped(other, "generator.model."), path)
    files = StudentFiles(checkpoint=path, base=tiny_wan_folder, weights=weights)
    assert convert_causal_wan(files, tmp_path / "out").weights == ("plain" if weights == "plain" else "ema")
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = tiny_transformer(seed=seed).state_dict()
    assert all(torch.equal(stored[name], value) for name, value in expected.items())


TRAINING_STATE: Tensors = {
    "step": torch.tensor(600),
    "epoch": torch.tensor([3]),
    "best_score": torch.tensor(0.5),
    "generator_optimizer.state.blocks.0.ffn.0.weight.exp_avg": torch.ones(32, 24),
    "critic_optimizer.param_groups.0.lr": torch.tensor(1e-6),
    "optimizer.state.0.step": torch.tensor(600.0),
    "lr_scheduler.last_epoch": torch.tensor(2),
    "config.num_frame_per_block": torch.tensor(3),
    "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
}


@pytest.mark.parametrize("group", ["generator_ema.model.", "model.", ""])
def test_what_a_training_saved_beside_the_networks_is_left_out(
    group: str, student: WanTransformer3DModel, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    save_file(wrapped(wan_tensors(student), group) | TRAINING_STATE, tmp_path / "self_forcing.safetensors")
    files = StudentFiles(checkpoint=tmp_path / "self_forcing.safetensors", base=tiny_wan_folder)
    convert_causal_wan(files, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored.pop(name), value) for name, value in student.state_dict().items())
    assert not stored


def test_numbers_take_the_format_that_is_asked_for(file: Path, tiny_wan_folder: Path, tmp_path: Path) -> None:
    for dtype in (None, torch.bfloat16):
        files = StudentFiles(checkpoint=file, base=tiny_wan_folder)
        convert_causal_wan(files, tmp_path / str(dtype), options=ConvertOptions(dtype=dtype))
        stored = load_file(tmp_path / str(dtype) / "transformer" / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in stored.values()} == {dtype or torch.float32}


def test_the_parts_of_the_base_are_copied_and_stay_as_they_are(
    file: Path, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_wan_folder, tmp_path / "base"))
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    seen: list[ConvertProgress] = []
    output = tmp_path / "out"
    options = ConvertOptions(on_progress=seen.append)
    convert_causal_wan(StudentFiles(checkpoint=file, base=base), output, options=options)
    index, of_base = (json.loads((folder / "model_index.json").read_text()) for folder in (output, base))
    for part in ("vae", "text_encoder", "tokenizer"):
        assert index[part] == of_base[part]
        for path in (base / part).rglob("*"):
            assert (output / path.relative_to(base)).read_bytes() == path.read_bytes()
    done = [state.done for state in seen]
    assert done == sorted(done)
    assert done[-1] == seen[0].total == seen[-1].total
    shutil.rmtree(output)
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


def test_a_folder_with_a_base_makes_the_video_of_its_parts(
    student: WanTransformer3DModel, file: Path, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    convert_causal_wan(StudentFiles(checkpoint=file, base=tiny_wan_folder), tmp_path / "out", kind="longlive")
    loaded = load_pipeline(str(tmp_path / "out"), dtype="float32")
    assert isinstance(loaded, ContextForcingWanPipeline)
    assert loaded.memory_config() == MemoryConfig.sink_and_window(3, 9)
    transformer = CausalWanTransformer3DModel(**{k: v for k, v in student.config.items() if k[0] != "_"})
    transformer.load_state_dict(student.state_dict())
    parts = WanPipeline.from_pretrained(tiny_wan_folder).components
    names = ("vae", "text_encoder", "tokenizer")
    built = ContextForcingWanPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True),
        memory="sink+window:3+9",
        **{name: parts[name] for name in names},
    )
    video, expected = (
        pipe("a red circle", height=32, width=32, num_frames=21, generator=torch.Generator().manual_seed(1)).frames
        for pipe in (loaded, built)
    )
    assert video.shape == (1, 21, 32, 32, 3)
    assert (video == expected).all()


def test_without_a_base_the_parts_are_given_when_it_is_loaded(
    file: Path, tiny_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "config.json").write_text(json.dumps({"num_heads": 2}))
    output = tmp_path / "out"
    assert run(["convert", "causal-wan", "--checkpoint", str(file), "--output", str(output)]) == 0
    assert "give --base" in capsys.readouterr().out
    found = sorted(path.name for path in output.iterdir())
    assert found == ["model_index.json", "scheduler", "transformer", "vidaccel.json"]
    parts = WanPipeline.from_pretrained(tiny_wan_folder).components
    given = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}
    pipe = ContextForcingWanPipeline.from_pretrained(output, **given)
    assert pipe.vae is parts["vae"]
    with pytest.raises(UserError):
        load_pipeline(str(output))


def test_the_noise_levels_are_those_of_the_published_schedules(
    file: Path, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    usual = (1000, 937.5, 2500 / 3, 625)  # 1000, 750, 500 and 250 at a shift of 5
    others = {
        "causvid": (1000, 757, 522),  # rounded from 756.757 and 521.739, of a shift of 8
        "causal-forcing-2-step": (1000, 2500 / 3),
        "causal-forcing-1-step": (1000,),
        "rolling-forcing": tuple(5000 * level / (1 + 4 * level) for level in (1, 0.8, 0.6, 0.4, 0.2)),
    }
    for student in STUDENTS:
        kind = student.recipe.version
        output = tmp_path / kind
        convert_causal_wan(StudentFiles(checkpoint=file, base=tiny_wan_folder), output, kind=kind)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(output / "scheduler")
        assert scheduler.config.stochastic_sampling
        defaults = spec_of(str(output)).defaults
        even = [1 - step / defaults.num_inference_steps for step in range(defaults.num_inference_steps)]
        scheduler.set_timesteps(sigmas=even)
        error = 0.3 if kind == "causvid" else 1e-3
        assert scheduler.timesteps.tolist() == pytest.approx(others.get(kind, usual), abs=error)
    shifted = [8 * level / (1 + 7 * level) for level in (1, 0.28, 0.12)]
    causvid = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "causvid" / "scheduler")
    causvid.set_timesteps(sigmas=[1, 2 / 3, 1 / 3])
    assert causvid.sigmas.tolist() == pytest.approx([*shifted, 0], abs=1e-6)


def test_the_memories_are_those_of_the_published_configurations() -> None:
    memories = {
        student.recipe.version: parse_memory(student.recipe.settings["memory"], student.chunk_frames)
        for student in STUDENTS
    }
    sizes = {name: (item.sink_frames, item.slow_frames, item.fast_frames) for name, item in memories.items()}
    assert sizes == {
        "self-forcing": (0, 0, 21),
        "causvid": (0, 0, 21),
        "longlive": (3, 0, 9),
        "context-forcing": (3, 12, 6),
        "causal-forcing": (0, 0, 21),
        "causal-forcing-2-step": (0, 0, 21),
        "causal-forcing-1-step": (0, 0, 21),
        "rolling-forcing": (3, 0, 18),
        "krea-realtime": (0, 0, 6),
    }


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1.42),
        ({"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 14.3),
    ],
)
def test_the_sizes_of_the_published_models_follow_from_the_shapes(
    config: dict[str, int], billions: float, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    tensors = {
        wan_name(name): StoredTensor(file=tmp_path / "a", name=name, shape=tuple(value.shape), dtype=torch.bfloat16)
        for name, value in model.state_dict().items()
    }
    plan = make_plan(STUDENT, Checkpoint(path=tmp_path / "model.safetensors", tensors=tensors))
    found, expected = ({k: v for k, v in some.items() if k[0] != "_"} for some in (plan.settings, dict(model.config)))
    assert found == {
        **expected,
        "camera_dim": None,
        "clean_pass": "chunk",
        "kv_routing": 0.0,
        "depth_every": 1,
    }  # published students know no camera
    assert plan.num_bytes / 2e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "WanModel", "num_heads": 3, "num_layers": 2, "dim": 24, "eps": 1e-5, "qk_norm": True},
        {"_class_name": "CausalWanTransformer3DModel", "num_attention_heads": 3, "attention_head_dim": 8, "eps": 1e-5},
    ],
)
def test_a_config_beside_the_weights_says_what_no_shape_does(
    config: dict[str, Any], file: Path, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    (file.parent / "config.json").write_text(json.dumps(config))
    convert_causal_wan(StudentFiles(checkpoint=file, base=tiny_wan_folder), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    found = {name: written[name] for name in ("num_attention_heads", "attention_head_dim", "eps", "qk_norm")}
    assert found == {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "eps": 1e-5,
        "qk_norm": "rms_norm_across_heads",
    }


def test_the_kind_is_read_from_the_names_of_file_and_folder(file: Path, tiny_wan_folder: Path, tmp_path: Path) -> None:
    for place, kind in (
        ("self_forcing_dmd.safetensors", "self-forcing"),
        ("CausVid/model.safetensors", "causvid"),
        ("LongLive-1.3B/base.safetensors", "longlive"),
        ("checkpoints/context_forcing_ema.safetensors", "context-forcing"),
        ("chunkwise/causal_forcing.safetensors", "causal-forcing"),
        ("causal-forcing++/framewise-2step.safetensors", "causal-forcing-2-step"),
        ("causal-forcing++/framewise-1step.safetensors", "causal-forcing-1-step"),
        ("checkpoints/rolling_forcing_dmd.safetensors", "rolling-forcing"),
        ("checkpoints/krea-realtime-video-14b.safetensors", "krea-realtime"),
        ("LongLive/self_forcing_init.safetensors", "self-forcing"),
    ):
        path = tmp_path / "named" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, path)
        files, options = StudentFiles(checkpoint=path, base=tiny_wan_folder), ConvertOptions(overwrite=True)
        made = convert_causal_wan(files, tmp_path / "out" / kind, options=options)
        assert made.recipe.version == kind


def lora_of(student: WanTransformer3DModel, *, alpha: float) -> tuple[Tensors, Tensors]:
    """A LoRA on every linear layer of the blocks as PEFT saves it, with Wan's names, and the weights PEFT merges."""
    peft = pytest.importorskip("peft")
    model = tiny_transformer(seed=3)
    layers = [
        name
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, torch.nn.Linear)
    ]
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=layers, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    saved = {}
    for name, value in peft.get_peft_model_state_dict(adapted).items():
        stem, side = re.fullmatch(r"base_model\.model\.(.+)(\.lora_[AB]\.weight)", name).groups()  # type: ignore[union-attr]
        saved[f"base_model.model.{wan_name(stem + '.').rstrip('.')}{side}"] = value.clone()
    assert len(saved) == 2 * len(layers) == 2 * 2 * 10
    return saved, adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize(("alpha", "group", "flags"), [(4, "generator_lora.", ()), (8, "", ("--lora-alpha", "8"))])
def test_a_lora_is_merged_as_peft_merges_it(
    alpha: float,
    group: str,
    flags: tuple[str, ...],
    student: WanTransformer3DModel,
    tiny_wan_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, merged = lora_of(student, alpha=alpha)
    unused = {f"critic_lora.{name}": value.clone() for name, value in saved.items()} if group else {}
    save_file(wrapped(saved, group) | unused, tmp_path / "lora.safetensors")
    save_file(wrapped(wan_tensors(student), "generator.model."), tmp_path / "base.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "base.safetensors"), "--lora", str(tmp_path / "lora.safetensors")]
    arguments += ["--output", str(tmp_path / "out"), "--base", str(tiny_wan_folder), *flags]
    assert run(["convert", "causal-wan", *arguments]) == 0
    assert "LongLive" in capsys.readouterr().out
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    plain = student.state_dict()
    assert stored.keys() == merged.keys() == plain.keys()
    changed = {name for name, value in stored.items() if not torch.equal(value, plain[name])}
    assert len(changed) == 2 * 10
    for name, value in stored.items():
        torch.testing.assert_close(value, merged[name], rtol=0, atol=1e-6)


def test_no_more_than_a_weight_and_its_lora_are_in_memory(
    student: WanTransformer3DModel, tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, _ = lora_of(student, alpha=4)
    save_file(saved, tmp_path / "lora.safetensors")
    save_file(wan_tensors(student), tmp_path / "base.safetensors")
    alive, peak, largest = [0], [0], [0]
    read = Checkpoint.read

    def counted(self: Checkpoint, key: str) -> Tensor:
        tensor = read(self, key).clone()
        alive[0] += tensor.nbytes
        peak[0], largest[0] = max(peak[0], alive[0]), max(largest[0], tensor.nbytes)
        weakref.finalize(tensor, lambda size=tensor.nbytes: alive.__setitem__(0, alive[0] - size))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    files = StudentFiles(
        checkpoint=tmp_path / "base.safetensors", lora=tmp_path / "lora.safetensors", base=tiny_wan_folder
    )
    convert_causal_wan(files, tmp_path / "out")
    total = (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert alive[0] == 0
    assert 0 < peak[0] <= 2 * largest[0] < total / 3


def lacking(tensors: Tensors) -> None:
    del tensors["generator_ema.model.blocks.1.ffn.2.bias"]


def lacking_a_block(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".blocks.1." in name]:
        del tensors[name]


def unknown(tensors: Tensors) -> None:
    tensors["generator_ema.model.blocks.1.ffn.4.bias"] = torch.zeros(2)


def unknown_group(tensors: Tensors) -> None:
    tensors["teacher.model.head.head.bias"] = torch.zeros(2)


def reshaped(tensors: Tensors) -> None:
    tensors["generator_ema.model.blocks.1.ffn.2.bias"] = torch.zeros(25)


def flat(tensors: Tensors) -> None:
    tensors["generator_ema.model.patch_embedding.weight"] = torch.zeros(24, 64)


def not_finite(tensors: Tensors) -> None:
    tensors["generator_ema.model.head.head.bias"][0] = float("inf")


def twice(tensors: Tensors) -> None:
    tensors["generator_ema.model._orig_mod.head.head.bias"] = torch.zeros(64)


def of_images(tensors: Tensors) -> None:
    tensors["generator_ema.model.img_emb.proj.0.weight"] = torch.zeros(8)


def of_vace(tensors: Tensors) -> None:
    tensors["generator_ema.model.vace_blocks.0.modulation"] = torch.zeros(8)


def with_a_lora(tensors: Tensors) -> None:
    tensors["generator_lora.base_model.model.blocks.0.ffn.0.lora_A.weight"] = torch.zeros(4, 24)


def of_more_channels(tensors: Tensors) -> None:
    """Wan2.2's image to video: 16 channels of noise, 16 of the image and 4 of a mask, and no embedding of the image."""
    width, _, *patch = tensors["generator_ema.model.patch_embedding.weight"].shape
    tensors["generator_ema.model.patch_embedding.weight"] = torch.zeros(width, 36, *patch)


def foreign(tensors: Tensors) -> None:
    tensors.clear()
    tensors["double_blocks.0.img_attn.qkv.weight"] = torch.zeros(2)


def of_diffusers(tensors: Tensors) -> None:
    tensors.clear()
    tensors.update({name: value.clone() for name, value in tiny_transformer().state_dict().items()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lacking, ("lacks 1 of the", "blocks.1.ffn.2.bias", "incomplete")),
        (lacking_a_block, ("lacks 27 of the", "blocks.1.", "incomplete")),
        (unknown, ("1 tensors that", "blocks.1.ffn.4.bias")),
        (unknown_group, ("teacher.", "save its generator alone")),
        (reshaped, ("blocks.1.ffn.2.bias [25]", "[24]")),
        (flat, ("patch_embedding.weight [24, 64]",)),
        (not_finite, ("head.head.bias", "no finite numbers")),
        (twice, ("head.head.bias twice", "_orig_mod")),
        (of_images, ("image to video",)),
        (of_vace, ("VACE",)),
        (of_more_channels, ("takes 36 channels and gives 16", "image to video")),
        (with_a_lora, ("--lora",)),
        (foreign, ("not a causal Wan transformer", "double_blocks.0.img_attn.qkv.weight")),
        (of_diffusers, ("nothing to convert", "from_pretrained")),
    ],
)
def test_every_name_shape_and_number_is_checked(
    change: Callable[[Tensors], None],
    words: tuple[str, ...],
    file: Path,
    tiny_wan_folder: Path,
    refused: Callable[..., str],
) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    (file.parent / "config.json").write_text(json.dumps({"num_heads": 2, "num_layers": 2}))
    for base in (tiny_wan_folder, None):
        line = refused(file, base=base)
        assert all(word in line for word in (file.name, *words)), line


def test_files_that_are_no_whole_safetensors_are_refused(file: Path, refused: Callable[..., str]) -> None:
    whole = file.read_bytes()
    for content, words in broken_contents(whole):
        file.write_bytes(content)
        line = refused(file)
        assert words in line, line
        assert file.name in line
    assert "no file or folder" in refused(file.parent / "nowhere.safetensors")
    shutil.copy(file, file.with_name("second.safetensors"))
    file.write_bytes(whole)
    file.with_name("second.safetensors").write_bytes(whole)
    assert "2 checkpoints" in refused(file.parent)


@pytest.mark.parametrize("nested", [True, False])
def test_a_pickled_file_is_refused_with_a_command_that_writes_it_anew(
    nested: bool,
    student: WanTransformer3DModel,
    other: Tensors,
    tiny_wan_folder: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    path = tmp_path / "it's" / "self_forcing_dmd.pt"
    path.parent.mkdir()
    weights = wrapped(wan_tensors(student), "model.")
    state: dict[str, Any] = {"generator_ema": weights, "critic": wrapped(other, "model."), "step": 600}
    torch.save(state if nested else weights, path)
    line = refused(path)
    assert "pickled" in line
    python, flag, code = shlex.split(line[line.index("python -c ") :])
    assert (python, flag) == ("python", "-c")
    exec(compile(code, "command", "exec"), {})
    written = path.with_suffix(".safetensors")
    assert len(load_file(written)) == len(weights)
    convert_causal_wan(StudentFiles(checkpoint=written, base=tiny_wan_folder), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in student.state_dict().items())


def test_a_lora_that_does_not_fit_is_refused(
    student: WanTransformer3DModel, file: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    stem = "generator_lora.base_model.model.blocks.0.ffn.0"
    down, up = torch.randn(4, 24), torch.randn(32, 4)

    def line(tensors: Tensors, *flags: str) -> str:
        path = tmp_path / "lora.safetensors"
        save_file(tensors, path)
        return refused(file, "--lora", str(path), *flags)

    whole = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    assert "one of the two" in line({f"{stem}.lora_A.weight": down})
    assert "another size" in line(whole | {f"{stem}.lora_B.weight": up[:30].clone()})
    assert "another size" in line(whole | {f"{stem}.lora_B.weight": torch.zeros(32, 3)})
    assert "blocks.7.ffn.0.weight" in line({name.replace("s.0.", "s.7."): value for name, value in whole.items()})
    assert "no LoRA" in line(whole | {f"{stem}.dora.weight": torch.zeros(2)})
    assert "no LoRA" in line(whole | {"generator.model.head.head.bias": torch.zeros(64)})
    assert "no LoRA" in line({f"critic_lora.{name}": value for name, value in whole.items()})
    assert "above 0" in line(whole, "--lora-alpha", "0")
    assert "above 0 and finite" in line(whole, "--lora-alpha", "inf")
    assert "give --lora with it" in refused(file, "--lora-alpha", "4")
    save_file(whole, tmp_path / "longlive.safetensors")
    assert "give it with --lora" in refused(tmp_path / "longlive.safetensors")


def test_flags_that_are_no_choice_are_refused(file: Path, refused: Callable[..., str]) -> None:
    assert "auto, self-forcing, causvid, longlive, context-forcing, causal-forcing" in refused(file, "--kind", "wan")
    assert "auto, ema, plain" in refused(file, "--weights", "average")
    assert "keep, float32" in refused(file, "--dtype", "int8")
    assert "holds ema weights" in refused(file, "--weights", "plain")
    unnamed = file.rename(file.with_name("model.safetensors"))
    assert "--kind" in refused(unnamed)
    save_file({name.removeprefix("generator_ema."): value for name, value in load_file(unnamed).items()}, unnamed)
    for weights in ("ema", "plain"):
        assert "unnamed weights" in refused(unnamed, "--kind", "causvid", "--weights", weights)


def test_a_base_that_does_not_fit_is_refused(
    file: Path, tiny_wan_folder: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(change: Callable[[Path], object]) -> str:
        base = Path(shutil.copytree(tiny_wan_folder, tmp_path / "base"))
        change(base)
        line = refused(file, base=base)
        shutil.rmtree(base)
        return line

    def say(path: Path, **values: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def pickled(base: Path) -> None:
        (file_of_vae,) = (base / "vae").glob("*.safetensors")
        file_of_vae.rename(file_of_vae.with_suffix(".bin"))

    def truncated(base: Path) -> None:
        (weights,) = (base / "text_encoder").glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-10])

    assert "no model_index.json" in changed(lambda base: (base / "model_index.json").unlink())
    assert "has no vae" in changed(lambda base: say(base / "model_index.json", vae=None))
    assert "is missing" in changed(lambda base: shutil.rmtree(base / "tokenizer"))
    assert "pickled" in changed(pickled)
    assert "truncated" in changed(truncated)
    assert "48" in changed(lambda base: say(base / "vae" / "config.json", z_dim=48))
    assert "4096" in changed(lambda base: say(base / "text_encoder" / "config.json", d_model=4096))
    assert "z_dim" in changed(lambda base: say(base / "vae" / "config.json", z_dim=None))
    wide = changed(lambda base: say(base / "transformer" / "config.json", num_attention_heads=3))
    assert "no heads of 128" in wide
    (file.parent / "config.json").write_text(json.dumps({"num_heads": 5}))
    assert "5 heads" in refused(file)
    (file.parent / "config.json").unlink()
    usage = shutil.disk_usage(file)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "GB free" in refused(file)


def test_what_stood_there_is_kept_unless_the_new_folder_is_complete(
    file: Path, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    output, files = tmp_path / "place" / "out", StudentFiles(checkpoint=file, base=tiny_wan_folder)
    convert_causal_wan(files, output)
    (output / "mark").touch()
    with pytest.raises(UserError, match="--overwrite"):
        convert_causal_wan(files, output)

    def stop(progress: ConvertProgress) -> None:
        if progress.component == "text_encoder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_causal_wan(files, output, options=ConvertOptions(overwrite=True, on_progress=stop))
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert (output / "mark").is_file()
    for given in (tiny_wan_folder, tiny_wan_folder.parent):
        with pytest.raises(UserError, match="which it is made from"):
            convert_causal_wan(files, given, options=ConvertOptions(overwrite=True))
    convert_causal_wan(files, output, options=ConvertOptions(overwrite=True))
    assert not (output / "mark").exists()

"""`vidaccel convert open-sora`: published files become a folder that loads and computes; everything else is refused."""

from __future__ import annotations

import errno
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vidaccel.pipelines.open_sora_2 as pipeline_module
from safetensors.torch import load_file, save_file

from tests.support import tiny_open_sora
from tests.support.broken_weights import broken_contents
from tests.support.open_sora_2_original import random_weights
from tests.support.open_sora_fixtures import values
from tests.support.tiny_models import tiny_tokenizer
from tests.support.tiny_open_sora_2 import POOLED_DIM, SIZES, TEXT_DIM, tiny_clip, tiny_flux, tiny_hunyuan_vae, tiny_t5
from vidaccel.catalog.registry import spec_of
from vidaccel.cli import run
from vidaccel.convert.checkpoint import Checkpoint, find_checkpoints
from vidaccel.convert.folder import ConvertOptions, ConvertProgress, convert
from vidaccel.convert.formats import empty_model
from vidaccel.convert.open_sora import HUNYUAN_VAE, MMDIT_2, RECIPES, REFUSED, STDIT3, T5_ENCODER, VAE_1_2
from vidaccel.convert.plan import make_plan
from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_folder
from vidaccel.generation.loading import load_pipeline

TRANSFORMER = "Open_Sora_v2.safetensors"


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def config_of(model: Any) -> dict[str, Any]:
    return json.loads(model.to_json_string() if hasattr(model, "to_json_string") else model.config.to_json_string())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the form of the published ones: `ckpts` as Open-Sora 2.0 has it, with text encoders below."""
    root = tmp_path_factory.mktemp("ckpts")
    weights = random_weights(heads=1, head_dim=32, double=1, single=1, text=TEXT_DIM, pooled=POOLED_DIM)
    write(root / "dit", TRANSFORMER, weights, config_of(tiny_flux()))
    vae = tiny_hunyuan_vae()
    write(root / "vae", "hunyuan_vae.safetensors", vae.state_dict(), config_of(vae))
    t5, clip = tiny_t5(), tiny_clip()
    states = {key: value for key, value in t5.state_dict().items() if key != "encoder.embed_tokens.weight"}
    states |= {"decoder.final_layer_norm.weight": torch.ones(TEXT_DIM), "lm_head.weight": torch.ones(4, TEXT_DIM)}
    write(root / "google" / "t5", "model.safetensors", states, config_of(t5.config))
    states = {f"text_model.{key}": value for key, value in clip.state_dict().items()}
    states |= {"logit_scale": torch.ones(()), "vision_model.embeddings.class_embedding": torch.ones(4)}
    config = {"model_type": "clip", "text_config": config_of(clip.config)}
    write(root / "openai" / "clip", "model.safetensors", states, config)
    for folder in (root / "google" / "t5", root / "openai" / "clip"):
        tiny_tokenizer().save_pretrained(folder)
    return root


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must fail with one line and leave nothing behind; returns the line."""

    def call(*paths: Path, flags: tuple[str, ...] = ()) -> str:
        capsys.readouterr()
        output = tmp_path / "folder" / "out"
        checkpoints = [part for path in paths for part in ("--checkpoint", str(path))]
        assert run(["convert", "open-sora", *checkpoints, "--output", str(output), *flags]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert not (tmp_path / "folder").exists() or not list((tmp_path / "folder").iterdir())
        return lines[0]

    return call


def test_version_2_converts_from_one_folder_and_makes_a_video(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(["convert", "open-sora", "--checkpoint", str(published), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == f"{output}: Open-Sora 2.0, OpenSora2Pipeline"
    assert spec_of(str(output)).defaults.num_frames == 129
    pipe = load_pipeline(str(output), dtype="float32")
    assert isinstance(pipe, pipeline_module.OpenSora2Pipeline)
    stored = load_file(published / "dit" / TRANSFORMER)
    name = "single_blocks.0.v_mlp.weight"
    assert torch.equal(pipe.transformer.single_transformer_blocks[0].attn.to_v.weight, stored[name][:32])
    for converted, model in (
        (pipe.vae, tiny_hunyuan_vae()),
        (pipe.text_encoder, tiny_clip()),
        (pipe.text_encoder_2, tiny_t5()),
    ):
        states = converted.state_dict()
        assert all(torch.equal(states[key], value) for key, value in model.state_dict().items())
    video = pipe("a red circle", num_inference_steps=2, output_type="pt", **SIZES).frames
    assert video.shape == (1, 9, 3, 32, 48)
    assert torch.isfinite(video).all()


def test_version_1_2_converts_from_published_folders_and_makes_the_same_video(tmp_path: Path) -> None:
    pipe = tiny_open_sora.small_pipeline()
    sizes = {"hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": 32, "model_max_length": 64}
    published = {"model_type": "STDiT3", "architectures": ["STDiT3"], "qk_norm": True, "pred_sigma": True}
    write(tmp_path / "v3", "model.safetensors", pipe.transformer.state_dict(), published | sizes)
    names = ("block_out_channels", "layers_per_block", "norm_num_groups", "temporal_channels", "temporal_res_blocks")
    sizes = {name: pipe.vae.config[name] for name in names}
    write(
        tmp_path / "vae", "model.safetensors", pipe.vae.state_dict(), {"model_type": "VideoAutoencoderPipeline"} | sizes
    )
    pipe.text_encoder.save_pretrained(tmp_path / "t5")
    pipe.tokenizer.save_pretrained(tmp_path / "t5")
    checkpoints = [part for name in ("v3", "vae", "t5") for part in ("--checkpoint", str(tmp_path / name))]
    output = tmp_path / "out"
    assert run(["convert", "open-sora", *checkpoints, "--output", str(output)]) == 0
    assert not load_file(output / "vae" / "diffusion_pytorch_model.safetensors").keys() ^ pipe.vae.state_dict().keys()
    loaded = load_pipeline(str(output), dtype="float32")
    assert type(loaded).__name__ == "OpenSoraPipeline"
    assert torch.equal(tiny_open_sora.run(loaded), tiny_open_sora.run(pipe))


@pytest.mark.parametrize(("form", "table"), [(STDIT3, "stdit3_xl2_keys"), (VAE_1_2, "vae_v12_keys")])
def test_the_published_names_and_shapes_of_version_1_2_are_those_of_the_classes(
    form: Any, table: str, tmp_path: Path
) -> None:
    model, _ = empty_model(form, Checkpoint(path=tmp_path / "model.safetensors", tensors={}))
    expected = {name: list(shape) for name, shape in values(table).items()}
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected
    assert form.recognises(expected)


def test_the_settings_of_the_published_weights_of_version_2_are_the_full_size(tmp_path: Path) -> None:
    model, _ = empty_model(MMDIT_2, Checkpoint(path=tmp_path / TRANSFORMER, tensors={}))
    parameters = sum(value.numel() for value in model.state_dict().values())
    assert 11.0e9 < parameters < 12.0e9
    assert (model.config.in_channels, model.config.out_channels, model.config.guidance_embeds) == (132, 64, False)
    vae, _ = empty_model(HUNYUAN_VAE, Checkpoint(path=tmp_path / "hunyuan_vae.safetensors", tensors={}))
    assert 2.4e8 < sum(value.numel() for value in vae.state_dict().values()) < 2.5e8


def test_numbers_keep_their_format_or_take_the_one_that_is_asked_for(published: Path, tmp_path: Path) -> None:
    for dtype in (None, torch.bfloat16):
        output = tmp_path / str(dtype)
        convert([published], output, recipes=RECIPES, options=ConvertOptions(dtype=dtype))
        for component in ("transformer", "vae", "text_encoder_2"):
            (file,) = (output / component).glob("*.safetensors")
            kinds = {value.dtype for value in load_file(file).values()}
            assert kinds == {dtype or torch.float32}


def test_large_weights_are_split_and_load_as_one(published: Path, tmp_path: Path) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    convert([published], whole, recipes=RECIPES)
    convert([published], split, recipes=RECIPES, options=ConvertOptions(most_shard_bytes=60_000))
    files = sorted((split / "transformer").glob("*-of-*.safetensors"))
    index = json.loads((split / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(value.nbytes for file in files for value in load_file(file).values())
    one, other = (pipeline_module.OpenSora2Pipeline.from_pretrained(folder) for folder in (whole, split))
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        states = getattr(other, name).state_dict()
        assert all(torch.equal(states[key], value) for key, value in getattr(one, name).state_dict().items())
    shutil.copytree(split / "transformer", tmp_path / "again")  # shards can be read as well as written
    assert len(find_checkpoints([tmp_path / "again"])) == 1


def test_no_more_than_one_tensor_and_its_sources_are_in_memory(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, peaks, largest = [0], [0], [0]
    read = Checkpoint.read

    def counted(self: Checkpoint, key: str) -> torch.Tensor:
        tensor = read(self, key).clone()
        size = tensor.nbytes
        alive[0] += size
        peaks[0], largest[0] = max(peaks[0], alive[0]), max(largest[0], size)
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - size))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    convert([published], tmp_path / "out", recipes=RECIPES)
    total = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert alive[0] == 0
    assert peaks[0] <= 2 * largest[0] < total / 4


def test_progress_counts_the_bytes_that_are_written(published: Path, tmp_path: Path) -> None:
    seen: list[ConvertProgress] = []
    convert([published], tmp_path / "out", recipes=RECIPES, options=ConvertOptions(on_progress=seen.append))
    done = [state.done for state in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total == seen[0].total
    assert list(dict.fromkeys(state.component for state in seen)) == [
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
    ]


def damaged(name: str) -> Callable[[Path], Path]:
    """Copies of the transformer's file that are no good."""

    def lacking(tensors: Any) -> Any:
        tensors.pop("double_blocks.0.img_attn.proj.bias")

    def unknown(tensors: Any) -> Any:
        tensors["double_blocks.1.img_attn.proj.bias"] = torch.zeros(2)

    def reshaped(tensors: Any) -> Any:
        tensors["img_in.weight"] = torch.zeros(32, 60)

    def transposed(tensors: Any) -> Any:
        tensors["txt_in.weight"] = tensors["txt_in.weight"].T.contiguous()

    def not_finite(tensors: Any) -> Any:
        tensors["txt_in.weight"][3, 2] = float("nan")

    changes = {item.__name__: item for item in (lacking, unknown, reshaped, transposed, not_finite)}

    def make(source: Path) -> Path:
        tensors = load_file(source)
        changes[name](tensors)
        save_file(tensors, source)
        return source

    return make


@pytest.fixture
def own(published: Path, tmp_path: Path) -> Path:
    """A copy of the published files that a test may spoil."""
    return Path(shutil.copytree(published, tmp_path / "own"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lacking", ("lacks 1 of the", "double_blocks.0.img_attn.proj.bias", "incomplete")),
        ("unknown", ("1 tensors that", "double_blocks.1.img_attn.proj.bias")),
        ("reshaped", ("img_in.weight [32, 60]", "[32, 128]", "[32, 132]")),
        ("transposed", ("txt_in.weight [16, 32]", "[32, 16]")),
        ("not_finite", ("txt_in.weight", "no finite numbers")),
    ],
)
def test_every_name_shape_and_number_is_checked(own: Path, refused: Any, name: str, words: tuple[str, ...]) -> None:
    line = refused(damaged(name)(own / "dit" / TRANSFORMER).parents[1])
    assert all(word in line for word in (TRANSFORMER, *words)), line


def test_files_that_are_no_whole_safetensors_are_refused(own: Path, refused: Any, tmp_path: Path) -> None:
    file = own / "dit" / TRANSFORMER
    whole = file.read_bytes()
    for content, words in broken_contents(whole):
        file.write_bytes(content)
        line = refused(own)
        assert words in line, line
        assert TRANSFORMER in line
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({"a": torch.zeros(2)}, pickled / "model.pt")
    for path in (pickled, pickled / "model.pt"):
        assert "pickled" in (line := refused(path)), line
        assert ".safetensors" in line
    assert "no file or folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no .safetensors" in refused(tmp_path / "empty")


def test_other_models_and_versions_are_named(own: Path, refused: Any, tmp_path: Path) -> None:
    names = {
        "1.3": (
            "spatial_blocks.0.attn.qkv.weight",
            "temporal_blocks.0.a",
            "fps_embedder.a",
            "x_embedder_cond.proj.weight",
        ),
        "1.0 or 1.1": ("blocks.0.attn_temp.qkv.weight",),
        "FLUX.1": ("double_blocks.0.img_attn.qkv.weight", "guidance_in.in_layer.weight"),
        "is none of": ("model.diffusion_model.a",),
    }
    foreign = {words: {name: torch.zeros(1) for name in keys} for words, keys in names.items()}
    for words, tensors in foreign.items():
        folder = tmp_path / words.replace(" ", "")
        write(folder, "model.safetensors", tensors)
        assert words in (line := refused(folder / "model.safetensors")), line
        line = refused(folder)
        assert (words if words != "is none of" else "no transformer") in line, line
    assert "version 2.0" in refused(own, flags=("--version", "1.2"))
    assert "auto, 1.2, 2.0" in refused(own, flags=("--version", "3"))
    assert "keep, float32" in refused(own, flags=("--dtype", "int8"))
    write(
        own / "flux", "flux1-dev.safetensors", foreign["FLUX.1"]
    )  # it lies beside the published files, and is not used
    convert([own], tmp_path / "out", recipes=RECIPES, refused=REFUSED)


def test_parts_that_are_missing_or_there_twice_are_named(own: Path, refused: Any) -> None:
    shutil.copytree(own / "vae", own / "vae_2")
    line = refused(own)
    assert "more than once" in line
    assert "vae_2" in line
    shutil.rmtree(own / "vae_2")
    (own / "google" / "t5" / "config.json").rename(own / "config.away")
    assert "no config.json" in refused(own)
    shutil.rmtree(own / "google")
    assert "T5 text encoder is missing" in refused(own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / "openai" / "clip" / name).unlink()
    line = refused(own, own.parent)  # given twice is read once
    assert "missing" in line


def test_a_file_given_by_name_comes_before_what_lies_in_folders(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own / "vae", own / "vae_2")
    paths = [own, own / "vae_2" / "hunyuan_vae.safetensors"]
    convert(paths, tmp_path / "out", recipes=RECIPES)
    assert (tmp_path / "out" / "vae" / "config.json").is_file()


def test_a_text_encoder_without_a_tokenizer_is_refused_and_a_sibling_folder_is_found(
    own: Path, refused: Any, tmp_path: Path
) -> None:
    t5 = own / "google" / "t5"
    moved = own / "google" / "tokenizer_2"
    moved.mkdir()
    for file in t5.glob("tokenizer*"):
        file.rename(moved / file.name)
    convert([own], tmp_path / "out", recipes=RECIPES)
    shutil.rmtree(moved)
    assert "no tokenizer" in refused(own)


def test_an_output_that_exists_is_kept_unless_it_may_be_replaced(own: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert([own], output, recipes=RECIPES)
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(UserError, match="--overwrite"):
        convert([own], output, recipes=RECIPES)
    (output / "mark").touch()
    convert([own], output, recipes=RECIPES, options=ConvertOptions(overwrite=True))
    assert sorted(path.name for path in output.iterdir()) == before
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    with pytest.raises(UserError, match="no diffusers folder"):
        convert([own], precious, recipes=RECIPES, options=ConvertOptions(overwrite=True))
    with pytest.raises(UserError, match="which it is made from"):
        convert([own], own, recipes=RECIPES, options=ConvertOptions(overwrite=True))
    assert (precious / "thesis.txt").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_conversion_that_is_cut_short_leaves_what_was_there(own: Path, tmp_path: Path, error: BaseException) -> None:
    output = tmp_path / "place" / "out"
    convert([own], output, recipes=RECIPES)
    (output / "mark").touch()

    def stop(progress: ConvertProgress) -> None:
        if progress.component == "vae":
            raise error

    with pytest.raises(type(error)):
        convert([own], output, recipes=RECIPES, options=ConvertOptions(overwrite=True, on_progress=stop))
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert (output / "mark").is_file()


def test_an_interrupted_command_says_nothing_that_is_not_so(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vidaccel.convert.folder.convert", interrupt)
    assert run(["convert", "open-sora", "--checkpoint", str(own), "--output", str(tmp_path / "out")]) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vidaccel: interrupted")
    assert "video" not in line


def test_leftovers_of_killed_processes_are_tidied_up(tmp_path: Path) -> None:
    dead = 2**22 + 1  # above the highest process number
    (tmp_path / f".out.{dead}.part").mkdir()
    (tmp_path / f".out.{dead}.old").mkdir()
    (tmp_path / f".out.{dead}.old" / "mark").touch()
    with atomic_folder(tmp_path / "out") as folder:
        assert (tmp_path / "out" / "mark").is_file()  # killed before the new one was there: the old one is back
        (folder / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_disk_that_is_too_small_is_said_beforehand(own: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(own)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "GB free" in refused(own)


@pytest.fixture(autouse=True)
def _no_leftover(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob(".*.part"))


def test_tied_weights_are_stored_once(published: Path) -> None:
    (checkpoint,) = find_checkpoints([published / "google"])
    plan = make_plan(T5_ENCODER, checkpoint)
    names = [tensor.name for tensor in plan.tensors]
    assert "shared.weight" in names
    assert "encoder.embed_tokens.weight" not in names

"""The family table: every row is a complete tiny pipeline, in memory and on disk, that makes a video from a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoTokenizer

from tests.support.family_calls import PROMPT, call_inputs
from vidaccel.catalog.families.checks import CHECKS
from vidaccel.catalog.families.family import Family
from vidaccel.catalog.models import MODELS
from vidaccel.catalog.pipelines import is_modular, named_class
from vidaccel.catalog.presets import Preset
from vidaccel.catalog.registry import model_index, recorded_preset, spec_of
from vidaccel.catalog.table import CATALOG, family_named
from vidaccel.cli import run
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline
from vidaccel.machine.components import denoisers, modules
from vidaccel.random_models import build as random_weights
from vidaccel.random_models import tokenizers
from vidaccel.random_models.build import build_random, make_random

# Where a pipeline returns other than `num_frames`: it drops the image's four, makes whole sections, or adds its input.
# Helios makes whole chunks, ChronoEdit the frame it starts from and the edited ones.
FRAMES = {
    "hunyuan-video-i2v": 5,
    "framepack": 25,
    "skyreels-v2-df-v2v": 34,
    "helios": 65,
    "helios-pyramid": 33,
    "helios-blocks": 65,
    "helios-pyramid-blocks": 33,
    "chronoedit": 5,
}
# The transformer of HunyuanVideo 1.5 projects ByT5's text through a layer of 2048x2048, whatever its configuration.
# The VAEs of Mochi and of Open-Sora 1.2 are normalised in 32 groups, so they have 32 channels.
MOST_BYTES = {"hunyuan-video-1.5-t2v": 20_000_000, "hunyuan-video-1.5-i2v": 20_000_000, "mochi": 3_000_000}
MOST_BYTES |= {"open-sora-1.2": 4_000_000, "open-sora-1.2-i2v": 4_000_000}

each_family = pytest.mark.parametrize("family", CATALOG.families, ids=lambda family: family.name)
OF_BLOCKS = [family for family in CATALOG.families if is_modular(named_class(family.pipeline))]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Each family's pipeline, once written to a folder and loaded from it; one of blocks has no folder."""
    pipes: dict[str, Any] = {}

    def pipeline(family: Family) -> Any:
        if family in OF_BLOCKS:
            pipes.setdefault(family.name, build_random(family))
        if family.name not in pipes:
            folder = make_random(family, tmp_path_factory.mktemp("families") / family.name)
            size = sum(path.stat().st_size for path in folder.rglob("*"))
            assert size < MOST_BYTES.get(family.name, 1_000_000)
            is_own = family.pipeline.startswith("vidaccel.")  # which diffusers does not know
            pipes[family.name] = load_pipeline(str(folder)) if is_own else DiffusionPipeline.from_pretrained(folder)
            pipes[family.name].set_progress_bar_config(disable=True)
            if family.name == "allegro-t2v":
                pipes[family.name].vae.enable_tiling()  # decodes no other way
        return pipes[family.name]

    yield pipeline
    pipes.clear()


@each_family
def test_a_random_folder_loads_and_makes_a_video_from_a_prompt(family: Family, loaded: Any) -> None:
    pipe = loaded(family)
    assert type(pipe).__name__ == family.pipeline_name
    outputs: list[Any] = []
    hooks = [
        denoiser.register_forward_hook(lambda _, __, output: outputs.append(output[0])) for denoiser in denoisers(pipe)
    ]
    arguments = call_inputs(family, num_inference_steps=3)
    frames = _frames(pipe(**arguments))
    for hook in hooks:
        hook.remove()
    size = (family.defaults["height"], family.defaults["width"])
    assert frames.shape == (FRAMES.get(family.name, family.defaults["num_frames"]), 3, *size)
    assert torch.isfinite(frames).all()
    assert len(outputs) >= 2
    videos = [output[0] if isinstance(output, list) else output for output in outputs]  # Cosmos 3 returns a list
    for output in filter(lambda output: output is not None, videos):  # AnyFlow writes keys and values without a video
        assert torch.isfinite(output).all()
        assert output.float().std() > 0.05


@each_family
def test_another_prompt_gives_another_video(family: Family, loaded: Any) -> None:
    first, other = (_latents(loaded(family), family, prompt) for prompt in (PROMPT, "two green frogs"))
    assert not torch.equal(first, other)


def _video(output: Any) -> Any:
    """What a pipeline made: a pipeline of blocks returns it as it is, Cosmos 3 calls it otherwise."""
    if isinstance(output, torch.Tensor | list):
        return output
    return output.video if hasattr(output, "video") else output.frames


def _frames(output: Any) -> torch.Tensor:
    """The one video of a call, (F, 3, H, W)."""
    video = _video(output)
    if video.ndim == 4:
        return video
    assert len(video) == 1
    return video[0] if video.shape[2] == 3 else video[0].transpose(0, 1)


def _latents(pipe: Any, family: Family, prompt: str) -> torch.Tensor:
    frames = _video(pipe(**call_inputs(family, num_inference_steps=2, output_type="latent", prompt=prompt)))
    return torch.cat([part.flatten() for part in frames])  # FramePack returns a list of growing sections


@each_family
def test_a_loaded_folder_has_the_weights_that_are_built_in_memory_and_none_is_a_zero_matrix(
    family: Family, loaded: Any
) -> None:
    built = modules(build_random(family))
    for name, module in modules(loaded(family)).items():
        weights = built[name].state_dict()
        assert module.state_dict().keys() == weights.keys()
        for key, value in module.state_dict().items():
            assert torch.equal(value, weights[key]), f"{name}.{key}"
        assert not [key for key, value in module.named_parameters() if value.ndim >= 2 and not value.any()]


def test_both_experts_work_in_a_short_call() -> None:
    for name in ("wan2.2-t2v", "wan2.2-i2v"):
        pipe = build_random(name)
        counts = [0, 0]

        def count(index: int, counts: list[int] = counts) -> Any:
            return lambda *_: counts.__setitem__(index, counts[index] + 1)

        for index, denoiser in enumerate(denoisers(pipe)):
            denoiser.register_forward_hook(count(index))
        pipe(**call_inputs(name, output_type="latent"))
        assert sum(counts) == 24
        assert min(counts) >= 4


class TestWeights:
    def test_the_same_seed_gives_the_same_weights_and_another_seed_others(self) -> None:
        first, again, other = (build_random("wan2.1-t2v", seed=seed) for seed in (3, 3, 4))
        for name, module in modules(first).items():
            for key, value in module.state_dict().items():
                assert torch.equal(value, modules(again)[name].state_dict()[key])
        for part in ("transformer", "vae", "text_encoder"):
            weights, others = (next(iter(modules(pipe)[part].parameters())) for pipe in (first, other))
            assert not torch.equal(weights, others)

    def test_two_experts_differ(self) -> None:
        first, second = denoisers(build_random("wan2.2-t2v"))
        assert not torch.equal(first.proj_out.weight, second.proj_out.weight)

    def test_building_leaves_the_random_numbers_of_pytorch_as_they_were(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        build_random("wan2.1-t2v")
        assert torch.equal(torch.rand(3), expected)

    def test_a_matrix_that_starts_at_zero_is_filled_and_a_bias_is_left(self) -> None:
        layer = torch.nn.Linear(64, 64)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        random_weights._fill_zeros(layer)
        assert layer.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
        assert not layer.bias.any()

    def test_a_pipeline_in_memory_has_the_short_texts_that_no_file_records(self) -> None:
        assert build_random("hunyuan-video-1.5-t2v").tokenizer_max_length == 64

    def test_a_component_in_a_component_is_made_first(self) -> None:
        processor = build_random("skyreels-v2-i2v").image_processor
        assert processor.tokenizer("a cat").input_ids
        assert processor.image_processor.crop_size["height"] == 16


class TestFolder:
    def test_it_records_what_a_small_call_takes_and_that_its_weights_are_random(self, tmp_path: Path) -> None:
        folder = make_random("wan2.1-t2v", tmp_path / "new" / "model", seed=1)
        spec = spec_of(str(folder))
        assert spec.weights == "random"
        assert (spec.defaults.num_frames, spec.defaults.height, spec.defaults.width) == (9, 32, 32)
        assert spec.defaults.max_sequence_length == 64
        assert [path.name for path in folder.parent.iterdir()] == ["model"]

    def test_a_family_of_blocks_has_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"ltx-t2v-blocks is put together from blocks"):
            make_random("ltx-t2v-blocks", tmp_path / "model")
        assert not list(tmp_path.iterdir())

    def test_an_empty_folder_is_used(self, tmp_path: Path) -> None:
        make_random("wan2.1-t2v", tmp_path)
        assert (tmp_path / "model_index.json").is_file()

    def test_a_folder_with_files_is_kept_and_a_model_is_replaced_when_asked(self, tmp_path: Path) -> None:
        folder = make_random("wan2.1-t2v", tmp_path / "model")
        with pytest.raises(UserError, match="not empty"):
            make_random("wan2.1-v2v", folder)
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "WanPipeline"
        make_random("wan2.1-v2v", folder, overwrite=True)
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "WanVideoToVideoPipeline"

    def test_a_folder_that_holds_no_model_is_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "letters.txt").write_text("dear")
        with pytest.raises(UserError, match="holds no model"):
            make_random("wan2.1-t2v", tmp_path, overwrite=True)
        assert (tmp_path / "letters.txt").read_text() == "dear"

    def test_a_file_in_its_place_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "model").write_text("")
        with pytest.raises(UserError, match="is a file"):
            make_random("wan2.1-t2v", tmp_path / "model")
        with pytest.raises(UserError, match="cannot be written"):
            make_random("wan2.1-t2v", tmp_path / "model" / "below")

    def test_nothing_is_left_and_nothing_is_lost_when_saving_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = make_random("wan2.1-t2v", tmp_path / "model")
        before = (folder / "model_index.json").read_bytes()

        def fail(self: Any, path: Path) -> None:
            (Path(path) / "half").write_text("")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(DiffusionPipeline, "save_pretrained", fail)
        with pytest.raises(UserError, match="No space left"):
            make_random("wan2.1-t2v", folder, overwrite=True)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (folder / "model_index.json").read_bytes() == before


class TestCalls:
    def test_the_same_seed_gives_the_same_media_and_another_seed_others(self) -> None:
        first, again, other = (call_inputs("wan2.1-vace", seed=seed) for seed in (0, 0, 1))
        assert first["video"] == again["video"]
        assert first["video"] != other["video"]
        assert len(first["video"]) == len(first["mask"]) == 9
        assert {picture.mode for picture in first["mask"]} == {"L"}

    def test_changes_win_and_shape_the_media(self) -> None:
        arguments = call_inputs("wan2.1-i2v", height=48, prompt=["a", "b"])
        assert arguments["image"].size == (32, 48)
        assert arguments["prompt"] == ["a", "b"]

    def test_settings_that_the_pipeline_does_not_take_are_left_out(self) -> None:
        arguments = call_inputs("wan2.1-v2v")
        assert "num_frames" not in arguments
        assert len(arguments["video"]) == 9

    def test_frames_and_steps_go_to_what_a_pipeline_has_in_their_place(self) -> None:
        assert call_inputs("sana-video-t2v", num_frames=5)["frames"] == 5
        assert call_inputs("latte")["video_length"] == 4
        arguments = call_inputs("helios-pyramid", num_inference_steps=2)
        assert arguments["pyramid_num_inference_steps_list"] == [2, 2, 2]
        assert "num_inference_steps" not in arguments

    def test_a_pipeline_of_blocks_is_asked_for_its_video_or_its_latents(self) -> None:
        assert call_inputs("wan2.1-t2v-blocks")["output"] == "videos"
        assert call_inputs("wan2.1-t2v-blocks", output_type="latent")["output"] == "latents"
        assert "output" not in call_inputs("wan2.1-t2v", output_type="latent")


class TestTable:
    def test_names_are_unique_also_among_the_models_and_reasons_are_given_for_known_checks(self) -> None:
        names = [*(family.name for family in CATALOG.families), *(spec.name for spec in MODELS)]
        assert len(set(names)) == len(names)
        for family in CATALOG.families:
            assert family.untested.keys() <= CHECKS.keys()
            assert all(family.untested.values())

    def test_a_name_that_is_no_family_is_answered_with_all_names(self) -> None:
        with pytest.raises(UserError, match=r"wan2\.1-t2v.*hunyuan-video-t2v.*got 'wan'"):
            family_named("wan")


TEMPLATES = ("", "_image2video", "_framepack")


class TestTokenizers:
    @pytest.mark.parametrize("name", ["t5", "clip", "llama", "gemma", "qwen2", "byt5"])
    def test_texts_become_tokens_that_survive_saving(self, name: str, tmp_path: Path) -> None:
        tokenizer = getattr(tokenizers, f"{name}_tokenizer")()
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert type(again) is type(tokenizer)
        text = 'A red ball, "hops"!'
        tokens = tokenizer(text).input_ids
        assert again(text).input_ids == tokens
        assert len(set(tokens)) > 8
        assert tokenizer(text.replace("red", "raw")).input_ids != tokens

    @pytest.mark.parametrize("ending", TEMPLATES)
    def test_the_words_before_the_prompt_are_as_many_tokens_as_the_pipeline_cuts_off(self, ending: str) -> None:
        module = f"diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video{ending}"
        template = import_module(module).DEFAULT_PROMPT_TEMPLATE
        tokenizer = tokenizers.llama_tokenizer(template=f"{module}:DEFAULT_PROMPT_TEMPLATE")
        tokens = tokenizer(template["template"].format("cat")).input_ids
        prompt = tokens[template["crop_start"] :][:4]
        assert prompt == tokenizer.convert_tokens_to_ids(
            [*(f"<0x{ord(letter):02X}>" for letter in "cat"), "<|eot_id|>"]
        )
        if "image_emb_start" in template:
            assert tokens[template["image_emb_start"]] == tokenizer.convert_tokens_to_ids("<image>")

    def test_a_chat_has_the_wanted_number_of_tokens_before_the_prompt(self) -> None:
        tokenizer = tokenizers.qwen2_tokenizer(head_tokens=108)
        chat = [{"role": "system", "content": "long"}, {"role": "user", "content": "cat"}]
        tokens = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True).input_ids
        assert tokens[108:] == tokenizer("cat<|im_end|>").input_ids

    def test_marks_of_the_models_have_the_numbers_their_configurations_say(self) -> None:
        encoder = family_named("hunyuan-video-i2v").components["text_encoder"]
        assert tokenizers.llama_tokenizer().convert_tokens_to_ids("<image>") == encoder.config["image_token_index"]


class TestCommand:
    def test_every_family_is_listed_with_its_pipeline_and_what_was_tested(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["models", "--families"]) == 0
        output = capsys.readouterr().out
        for family in CATALOG.families:
            assert f"\n{family.name} " in output
            assert family.pipeline_name in output
            for reason in family.untested.values():
                assert reason in output

    def test_the_settings_listed_are_those_a_loaded_pipeline_gets(
        self, loaded: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["models", "--families"]) == 0
        entries = re.split(r"\n(?=\S)", capsys.readouterr().out)
        for family in (family for family in CATALOG.families if family.refusal is None):
            (entry,) = (entry for entry in entries if entry.split()[0] == family.name)
            preset = Preset.for_pipeline(loaded(family))
            assert ("the defaults, none are published" if preset is None else preset.source) in entry
            if family not in OF_BLOCKS:
                index = model_index(spec_of(loaded(family).name_or_path))
                assert index is not None
                assert recorded_preset(index) == preset, "before it is loaded"
            config = EasyCacheConfig.published(preset)
            assert f"threshold {config.threshold:g}, {config.warmup_steps} warm-up steps" in entry

    def test_a_random_model_is_written_and_generates(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "model"
        assert run(["models", "--make-random", "wan2.1-t2v", str(folder), "--seed", "2"]) == 0
        assert str(folder) in capsys.readouterr().out
        output = tmp_path / "ball.mp4"
        assert run(["generate", "a ball", "--model", str(folder), "--output", str(output), "--threshold", "1"]) == 0
        assert "9 reused" in capsys.readouterr().out
        assert output.is_file()

    def test_wrong_arguments_are_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").write_text("")
        for arguments in (["wan", str(tmp_path / "x")], ["wan2.1-t2v", str(tmp_path / "taken")], ["wan2.1-t2v"]):
            assert run(["models", "--make-random", *arguments]) == 2
            assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not (tmp_path / "x").exists()

"""The command line from outside: what it makes, what it says, and how it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vidaccel.catalog import presets
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.cli import run, runs
from vidaccel.cli.app import COMMANDS, LazyCommand
from vidaccel.video.files import read_video, save_frames, write_video

Command = Callable[..., int]


@pytest.fixture
def generate(tiny_wan_folder: Path, tmp_path: Path) -> Command:
    """`vidaccel generate` with the tiny random model and small sizes; flags given later win."""

    def call(*arguments: str, model: Path | str = tiny_wan_folder, output: Path | str = tmp_path / "out") -> int:
        sizes = ("--height", "32", "--width", "32", "--num-frames", "9", "--num-inference-steps", "14")
        return run(["generate", "--model", str(model), "--output", str(output), *sizes, *arguments])

    return call


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")} if folder.exists() else set()


@pytest.fixture
def no_half_written_files(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]


@pytest.mark.usefixtures("no_half_written_files")
class TestGenerate:
    def test_a_prompt_becomes_a_video_with_a_sidecar(
        self, generate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert generate("a red circle", "--fps", "8") == 0
        assert files_of(tmp_path / "out") == {"a-red-circle-seed0.mp4", "a-red-circle-seed0.json"}
        frames, fps = read_video(tmp_path / "out" / "a-red-circle-seed0.mp4")
        assert frames.shape == (9, 3, 32, 32)
        assert fps == 8
        assert "14 steps" in capsys.readouterr().out

    def test_the_sidecar_holds_request_settings_and_figures(self, generate: Command, tmp_path: Path) -> None:
        assert generate("a red circle", "--threshold", "0.5", "--warmup-steps", "3", "--seed", "7") == 0
        sidecar = json.loads((tmp_path / "out" / "a-red-circle-seed7.json").read_text())
        assert sidecar["settings"]["request"]["seed"] == 7
        assert sidecar["settings"]["easycache"]["threshold"] == 0.5
        result = sidecar["result"]
        assert result["num_computed"] + result["num_reused"] == 14
        assert result["num_forwards"] == 2 * result["num_computed"]

    def test_without_cache_every_forward_runs(self, generate: Command, tmp_path: Path) -> None:
        assert generate("a red circle", "--no-cache") == 0
        sidecar = json.loads((tmp_path / "out" / "a-red-circle-seed0.json").read_text())
        assert sidecar["settings"]["easycache"] is None
        assert sidecar["result"]["num_forwards"] == 28

    def test_compare_and_report_write_their_files_and_a_table(
        self, generate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert generate("a red circle", "--compare", "--report", "--threshold", "1", "--warmup-steps", "2") == 0
        assert files_of(tmp_path / "out") == {
            f"a-red-circle-seed0{suffix}" for suffix in (".mp4", ".json", ".compare.mp4", ".report.json", ".report.png")
        }
        output = capsys.readouterr().out
        for word in ("denoising time", "transformer forwards", "PSNR", "SSIM"):
            assert word in output
        frames, _ = read_video(tmp_path / "out" / "a-red-circle-seed0.compare.mp4")
        assert frames.shape[-1] >= 64
        report = json.loads((tmp_path / "out" / "a-red-circle-seed0.report.json").read_text())
        assert len(report["decisions"]) == 14
        assert report["num_reused"] > 0

    def test_a_folder_may_be_called_after_a_version(self, generate: Command, tmp_path: Path) -> None:
        assert generate("a red circle", "--no-cache", output=tmp_path / "wan2.1-vace") == 0
        assert len(list((tmp_path / "wan2.1-vace").glob("*.mp4"))) == 1

    def test_threshold_zero_makes_the_same_pixels_as_no_cache(self, generate: Command, tmp_path: Path) -> None:
        assert generate("a red circle", "--threshold", "0", output=tmp_path / "zero.mp4") == 0
        assert generate("a red circle", "--no-cache", output=tmp_path / "plain.mp4") == 0
        assert torch.equal(read_video(tmp_path / "zero.mp4")[0], read_video(tmp_path / "plain.mp4")[0])

    def test_prompts_of_a_file_become_videos_and_finished_ones_are_skipped(
        self, generate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("# two scenes\na red circle\n\na blue square\n", encoding="utf-8")
        assert generate("--prompt-file", str(prompts)) == 0
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
        assert len(made) == 4
        (tmp_path / "out" / "a-blue-square-seed0.mp4").unlink()
        capsys.readouterr()
        assert generate("--prompt-file", str(prompts)) == 0
        output = capsys.readouterr().out
        assert "a-red-circle-seed0.mp4: finished before, skipped" in output
        assert "a-blue-square-seed0.mp4: 9 frames" in output
        kept = tmp_path / "out" / "a-red-circle-seed0.mp4"
        assert kept.stat().st_mtime_ns == made[kept]

    def test_another_request_for_the_same_file_is_refused_not_skipped(
        self, generate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert generate("a red circle") == 0
        before = (tmp_path / "out" / "a-red-circle-seed0.mp4").read_bytes()
        assert generate("a red circle", "--guidance-scale", "2") == 2
        error = capsys.readouterr().err
        assert "--overwrite" in error
        assert "request.guidance_scale is " in error
        assert "asked for 2.0)" in error
        assert (tmp_path / "out" / "a-red-circle-seed0.mp4").read_bytes() == before
        assert generate("a red circle", "--guidance-scale", "2", "--overwrite") == 0
        assert (tmp_path / "out" / "a-red-circle-seed0.mp4").read_bytes() != before

    def test_settings_published_anew_for_a_model_make_another_video(
        self, generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert generate("a red circle", "--threshold", "0.3") == 0
        sidecar = json.loads((tmp_path / "out" / "a-red-circle-seed0.json").read_text())
        expected = {"threshold": 0.3, "warmup_steps": 10, "predictor": "transformation"}
        assert sidecar["settings"]["easycache"] == expected
        changed = tuple(replace(preset, warmup_steps=4) for preset in presets.PRESETS)
        monkeypatch.setattr(presets, "PRESETS", changed)
        assert generate("a red circle", "--threshold", "0.3", "--warmup-steps", "10") == 0
        assert "finished before, skipped" in capsys.readouterr().out
        assert generate("a red circle", "--threshold", "0.3") == 2
        assert "not made with these settings" in capsys.readouterr().err

    def test_a_model_that_is_not_on_this_machine_is_loaded_before_its_settings_are_known(
        self, generate: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert generate("a red circle") == 0
        monkeypatch.setattr(runs, "model_index", lambda _: None)
        capsys.readouterr()
        assert generate("a red circle") == 0
        assert "finished before, skipped" in capsys.readouterr().out

    def test_a_foreign_file_in_the_way_is_never_replaced_unasked(self, generate: Command, tmp_path: Path) -> None:
        (tmp_path / "mine.json").write_text("{}")
        assert generate("a red circle", output=tmp_path / "mine.mp4") == 2
        assert (tmp_path / "mine.json").read_text() == "{}"

    def test_words_the_model_does_not_know_are_named_once(
        self, generate: Command, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert generate("a red Zebra, moves", "--compare") == 0
        errors = capsys.readouterr().err
        assert errors.count("Zebra") == 1
        assert "red" not in errors

    def test_an_interrupt_leaves_no_file_and_returns_130(
        self, generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("vidaccel.cli.progress.StepCounter.add", interrupt)
        assert generate("a red circle") == 130
        assert files_of(tmp_path / "out") == set()
        assert len(capsys.readouterr().err.strip().splitlines()) == 1

    @pytest.mark.parametrize(
        "stopped", ["cli.jobs.write_json", "cli.runs.write_video", "cli.runs.side_by_side", "cli.runs.write_json"]
    )
    def test_after_an_interrupt_between_two_files_the_same_command_finishes(
        self, generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        flags = ("a red circle", "--compare", "--report")
        with monkeypatch.context() as patch:
            patch.setattr(f"vidaccel.{stopped}", interrupt)
            assert generate(*flags) == 130
        assert generate(*flags) == 0
        assert len(files_of(tmp_path / "out")) == 5

    def test_an_interrupted_overwrite_never_passes_the_old_video_for_the_new_one(
        self, generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        video = tmp_path / "out" / "a-red-circle-seed0.mp4"
        assert generate("a red circle") == 0
        old = video.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("vidaccel.cli.runs.write_video", interrupt)
            assert generate("a red circle", "--guidance-scale", "2", "--overwrite") == 130
        assert generate("a red circle", "--guidance-scale", "2") == 0
        assert video.read_bytes() != old

    def test_a_comparison_of_other_settings_never_passes_for_one_of_these(
        self, generate: Command, tmp_path: Path
    ) -> None:
        pair = tmp_path / "out" / "a-red-circle-seed0.compare.mp4"
        assert generate("a red circle", "--compare") == 0
        old = pair.read_bytes()
        assert generate("a red circle", "--guidance-scale", "2", "--overwrite") == 0
        assert not pair.exists()
        assert generate("a red circle", "--guidance-scale", "2", "--compare") == 0
        assert pair.read_bytes() != old

    def test_a_report_added_later_keeps_the_comparison(self, generate: Command, tmp_path: Path) -> None:
        assert generate("a red circle", "--compare") == 0
        assert generate("a red circle", "--report") == 0
        assert len(files_of(tmp_path / "out")) == 5
        assert json.loads((tmp_path / "out" / "a-red-circle-seed0.json").read_text())["comparison"]["psnr"]

    def test_a_foreign_file_with_the_name_of_a_comparison_is_kept(self, generate: Command, tmp_path: Path) -> None:
        assert generate("a red circle") == 0
        pair = tmp_path / "out" / "a-red-circle-seed0.compare.mp4"
        pair.write_text("mine")
        assert generate("a red circle", "--compare") == 2
        assert generate("a red circle", "--guidance-scale", "2", "--overwrite") == 0
        assert pair.read_text() == "mine"

    def test_a_prompt_file_of_a_windows_editor_reads_as_any_other(self, generate: Command, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_bytes("\ufeffa red circle\r\n\r\na\u2028blue square\r\n".encode())
        assert generate("a red circle", "--prompt-file", str(tmp_path / "prompts.txt")) == 0
        made = {"a-red-circle-seed0", "a-blue-square-seed0"}
        assert files_of(tmp_path / "out") == {f"{name}{suffix}" for name in made for suffix in (".mp4", ".json")}


class TestCompare:
    @pytest.fixture
    def videos(self, tmp_path: Path) -> tuple[Path, Path]:
        frames = torch.rand(3, 3, 32, 32)
        write_video(tmp_path / "a.mp4", frames, fps=8)
        save_frames(tmp_path / "a.safetensors", frames)
        save_frames(tmp_path / "b.safetensors", frames.flip(0))
        return tmp_path / "a.safetensors", tmp_path / "b.safetensors"

    def test_figures_are_printed_and_written(
        self, videos: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["compare", *map(str, videos), "--json", str(tmp_path / "c.json")]
        assert run([*arguments, "--output", str(tmp_path / "side.mp4")]) == 0
        assert "PSNR" in capsys.readouterr().out
        figures = json.loads((tmp_path / "c.json").read_text())
        assert 0 < figures["psnr"] < 20
        assert (tmp_path / "side.mp4").is_file()

    def test_a_video_against_itself_is_infinitely_close(
        self, videos: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["compare", str(tmp_path / "a.mp4"), str(tmp_path / "a.mp4")]) == 0
        assert "inf dB" in capsys.readouterr().out

    def test_what_cannot_be_compared_is_one_line(
        self, videos: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_frames(tmp_path / "short.safetensors", torch.rand(2, 3, 32, 32))
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        for other in ("short.safetensors", "broken.mp4", "missing.mp4"):
            assert run(["compare", str(videos[0]), str(tmp_path / other)]) == 2
            assert len(capsys.readouterr().err.strip().splitlines()) == 1

    def test_an_existing_figure_file_is_kept(self, videos: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "c.json").write_text("mine")
        assert run(["compare", *map(str, videos), "--json", str(tmp_path / "c.json")]) == 2
        assert (tmp_path / "c.json").read_text() == "mine"

    @pytest.mark.parametrize(
        "flags",
        [
            ("--output", "a.mp4", "--overwrite"),
            ("--output", "same.mp4", "--json", "same.mp4"),
            ("--output", "folder", "--overwrite"),
            ("--json", "folder", "--overwrite"),
            ("--output", "side.txt"),
        ],
    )
    def test_a_result_never_takes_the_place_of_something_else(
        self,
        videos: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        flags: tuple[str, ...],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder").mkdir()
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert run(["compare", "a.mp4", str(tmp_path / "a.mp4"), *flags]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_models_are_listed_with_their_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    output = capsys.readouterr().out
    assert "wan-tiny" in output
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in output
    assert "tested: " not in output, "the families are a list of their own"
    assert "--families" in output


def test_a_model_name_with_a_slip_is_told_the_names_near_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "a ball", "--model", "wan-tniy"]) == 2
    error = capsys.readouterr().err
    assert "wan-tiny" in error
    assert "cogvideox-2b" not in error
    assert "`vidaccel models`" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_all_commands_says_what_each_says_itself(name: str) -> None:
    module, line = COMMANDS[name]
    assert (LazyCommand(name, module=module, help=line).load().help or "").startswith(line)


def test_a_wrong_flag_or_command_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["generate", "--nonsense"], ["generate", "x", "--seed", "many"], ["paint"]):
        assert run(arguments) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


class TestPage:
    @pytest.mark.parametrize("name", ["generate", "rollout", "session", "compare", "convert", "models"])
    def test_it_has_every_flag_of_the_command(self, name: str) -> None:
        module, line = COMMANDS[name]
        command = LazyCommand(name, module=module, help=line).load()
        (section,) = [part for part in PAGE.split("\n## ") if part.startswith(f"{name}\n")]
        for part in getattr(command, "commands", {name: command}).values():
            flags = {flag for option in part.params for flag in option.opts if flag.startswith("--")}
            assert flags - {"--help"} <= set(re.findall(r"--[a-z-]+", section))

    def test_it_has_every_measurement_and_every_shape(self) -> None:
        bench = LazyCommand("bench", module=COMMANDS["bench"][0], help="").load()
        assert all(f"| `{name}` |" in PAGE for name in bench.list_commands(None))
        assert all(f"`{name}`" in PAGE for name in SHAPES if not name.startswith("toy"))

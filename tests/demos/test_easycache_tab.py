"""The demo: its page builds and answers, its work is done by the same functions as everywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from app import build_app, open_studio
from easycache_tab import make
from live_rollout import Studio

from tests.support.tiny_models import tiny_student
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline
from vidaccel.rollout.report import RolloutReport
from vidaccel.video.files import read_video

TINY = GenerationDefaults(num_frames=5, height=32, width=32, num_inference_steps=12)
MEMORY = "the first 3, keyframes: 3, the last 6"


@pytest.fixture(scope="module")
def student(tiny_wan_folder: Path) -> Any:
    return tiny_student(tiny_wan_folder)


@pytest.fixture
def studio(student: Any, tmp_path: Path) -> Studio:
    folder = tmp_path / "work"
    folder.mkdir()
    return Studio(student, replace(TINY, fps=24), folder)


@pytest.fixture
def connect(
    tiny_wan_folder: Path, studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Any]]:
    """Serves the page; every call gives a visitor of its own."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "sent"))
    monkeypatch.setattr(RolloutReport, "save_picture", _gray_picture)
    app = build_app(load_pipeline(str(tiny_wan_folder), device="cpu"), TINY, studio)
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield lambda: Client(address, verbose=False, download_files=str(tmp_path / "downloads"))
    app.close()


def _gray_picture(report: RolloutReport, path: Path) -> Path:
    from PIL import Image

    Image.new("L", (8, 8)).save(path)
    return path


def until(is_so: Callable[[], Any]) -> Any:
    """What `is_so` gives when it gives anything."""
    end = time.monotonic() + 60
    while not (found := is_so()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def lines(job: Any) -> list[str]:
    return [output[1] for output in job.outputs()]


def test_a_prompt_gives_a_video_a_picture_and_figures(tiny_wan_folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(tiny_wan_folder), device="cpu")
    video, picture, figures = make(
        pipe, TINY, tmp_path, prompt="a red Zebra", threshold=0.5, num_inference_steps=12, seed=0
    )
    assert Path(video).stat().st_size > 0
    assert Path(picture).stat().st_size > 0
    assert "| transformer forwards | 24 |" in figures
    assert "Zebra" in figures


def test_the_page_builds(studio: Studio) -> None:
    pytest.importorskip("gradio")
    app = build_app(None, TINY, studio)
    assert app.title == "vidaccel"


def test_a_missing_gradio_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, studio: Studio
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"\.\[demo\]"):
        build_app(None, TINY, studio)


def test_a_student_that_is_not_causal_is_refused(tiny_wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a causal student and .* is a WanPipeline"):
        open_studio(str(tiny_wan_folder), tmp_path)


def test_the_page_serves_easycache_and_keeps_no_file_of_its_own(connect: Callable[[], Any], studio: Studio) -> None:
    visitor = connect()
    video, picture, figures = visitor.predict("a red square", 0.5, 12, 0, api_name="/easycache")
    assert len(read_video(video)[0]) == 5
    assert Path(picture).stat().st_size > 0
    assert "| transformer forwards | 24 |" in figures
    assert not [*studio.folder.iterdir()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("  ", 0.5, 12, 0), "There is no prompt"),
        (("a red square", 0.5, 12, None), "seed must be a whole number"),
        (("a red square", 0.5, 12, 2**70), "seed must be a whole number"),
    ],
)
def test_easycache_says_what_is_wrong_with_a_request(
    connect: Callable[[], Any], values: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        connect().predict(*values, api_name="/easycache")


def test_a_student_that_is_told_of_its_camera_has_a_field_for_it(
    student: Any, tiny_wan_folder: Path, studio: Studio
) -> None:
    pytest.importorskip("gradio")
    told = replace(studio, pipe=tiny_student(tiny_wan_folder, camera_dim=8))
    for one, expected in ((studio, 0), (told, 1)):
        config = build_app(None, TINY, one).get_config_file()
        labels = [part["props"].get("label") or "" for part in config["components"]]
        assert sum(label.startswith("Camera") for label in labels) == expected
        (start,) = [part for part in config["dependencies"] if part["api_name"] == "rollout"]
        assert len(start["inputs"]) == 5 + expected


def test_a_visitor_sees_chunks_changes_the_prompt_stops_and_branches(connect: Callable[[], Any]) -> None:
    visitor = connect()
    job = visitor.submit("a red square", 60, 0, MEMORY, api_name="/rollout")
    until(lambda: len(job.outputs()) >= 2)
    assert not job.done()
    assert "the next chunk" in visitor.predict("a blue zebra", api_name="/change_prompt")
    until(lambda: lines(job)[-1].endswith("does not know: zebra"))
    assert "ends after" in visitor.predict(api_name="/stop")
    screen, line, note, video, picture = job.result(timeout=60)
    assert any(output[0].startswith('<img src="data:image/webp;base64,') for output in job.outputs())
    assert (screen, line[:8], note) == ("", "Stopped:", "")
    frames = len(read_video(video)[0])
    assert f"{frames / 24:.1f} of " in line
    assert Path(picture).stat().st_size > 0
    _, line, _, video, _ = visitor.predict("a red square", 0.3, 1, api_name="/branch")
    assert line.startswith("Done: 1.4 of 1.4 s")
    assert len(read_video(video)[0]) == 33


def test_what_comes_in_an_odd_order_is_answered_with_what_to_do(connect: Callable[[], Any]) -> None:
    visitor = connect()
    for name, values in (("stop", ()), ("change_prompt", ("a",))):
        with pytest.raises(Exception, match="No rollout is running; start one"):
            visitor.predict(*values, api_name=f"/{name}")
    with pytest.raises(Exception, match="no rollout to branch from"):
        visitor.predict("a red square", 0, 1, api_name="/branch")
    for values, message in (
        (("", 1, 0, MEMORY), "There is no prompt"),
        (("a red square", 1e9, 0, MEMORY), "1000000000|length must be from"),
        (("a red square", 1, None, MEMORY), "seed must be a whole number"),
        (("a red square", 1, 0, "../../etc"), "not in the list of choices|memory must be one of"),
    ):
        with pytest.raises(Exception, match=message):
            visitor.predict(*values, api_name="/rollout")
    job = visitor.submit("a red square", 60, 0, MEMORY, api_name="/rollout")
    until(lambda: len(job.outputs()) >= 2)
    with pytest.raises(Exception, match="running; stop it first"):
        visitor.predict("a red square", 1, 0, MEMORY, api_name="/rollout")
    visitor.predict(api_name="/stop")
    assert job.result(timeout=60)[1].startswith("Stopped")


def test_visitors_do_not_reach_each_other(connect: Callable[[], Any], studio: Studio) -> None:
    one, other = connect(), connect()
    job = one.submit("a red square", 60, 0, MEMORY, api_name="/rollout")
    until(lambda: len(job.outputs()) >= 2)
    with pytest.raises(Exception, match="No rollout is running"):
        other.predict(api_name="/stop")
    with pytest.raises(Exception, match="no rollout to branch from"):
        other.predict("a red square", 0, 1, api_name="/branch")
    assert other.predict("a blue circle", 1, 1, MEMORY, api_name="/rollout")[1].startswith("Done")
    assert len([*studio.folder.iterdir()]) == 2
    one.predict(api_name="/stop")
    assert job.result(timeout=60)[1].startswith("Stopped")


def test_no_request_reaches_the_files_of_a_session(connect: Callable[[], Any], studio: Studio) -> None:
    httpx = pytest.importorskip("httpx", reason="comes with gradio")
    visitor = connect()
    _, _, _, video, _ = visitor.predict("a red square", 1, 0, MEMORY, api_name="/rollout")
    assert read_video(video)[1] == 24
    found = [path for path in studio.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in found} >= {".mp4", ".png", ".h264", ".safetensors", ".json"}
    address = visitor.src.rstrip("/") + "/gradio_api/file="
    for path in (*found, Path(__file__), Path("/etc/passwd"), studio.folder / ".." / "work"):
        assert httpx.get(f"{address}{path}").status_code in (403, 404), path


def test_a_closed_page_ends_its_rollout_and_later_its_files_go(
    connect: Callable[[], Any], studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpx = pytest.importorskip("httpx", reason="comes with gradio")
    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")  # the state of a closed page is kept for a second, not an hour
    address = connect().src.rstrip("/")
    functions = httpx.get(f"{address}/config").json()["dependencies"]
    number = next(function["id"] for function in functions if function["api_name"] == "rollout")
    request = {"data": [None, "a red square", 60, 0, MEMORY], "fn_index": number, "session_hash": "closing"}
    with httpx.stream("GET", f"{address}/gradio_api/heartbeat/closing"):
        httpx.post(f"{address}/gradio_api/queue/join", json=request).raise_for_status()
        with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=closing") as events:
            next(line for line in events.iter_lines() if "data:image/webp" in line)
        (folder,) = studio.folder.iterdir()
    until(lambda: not folder.exists())
    assert not [*studio.folder.iterdir()]

"""One visitor's rollout in the demo: the same video as without a page, and nobody else's; whatever is clicked when."""

from __future__ import annotations

import io
import stat
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_rollout import MOST_SECONDS, LiveRollout, Studio, View, animated
from PIL import Image
from torch import Tensor

from tests.support.tiny_models import tiny_student
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.errors import UserError
from vidaccel.rollout.chunk import Chunk
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.loop import rollout
from vidaccel.rollout.report import RolloutReport
from vidaccel.video.files import read_video

RED, BLUE = "a red square", "a blue circle"
FPS = 240  # so that no test waits for a video to be watched
SECONDS = 45 / FPS  # four chunks: 9 + 3 * 12 pixel frames
DEFAULTS = GenerationDefaults(height=32, width=32, fps=FPS)


@pytest.fixture(scope="module")
def pipe(tiny_wan_folder: Path) -> Any:
    return tiny_student(tiny_wan_folder)


@pytest.fixture(autouse=True)
def _plain_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of a report takes a second to draw; those that nobody looks at are empty files (`undo` draws)."""

    def save_picture(report: RolloutReport, path: Path) -> Path:
        path.touch()
        return path

    monkeypatch.setattr(RolloutReport, "save_picture", save_picture)


@pytest.fixture
def studio(pipe: Any, tmp_path: Path) -> Studio:
    return Studio(pipe, DEFAULTS, tmp_path)


def started(live: LiveRollout, prompt: str = RED, **changes: Any) -> Iterator[View]:
    memory = next(iter(live._studio.memories()))
    return live.start(prompt, **({"seconds": SECONDS, "seed": 0, "memory": memory} | changes))


def without_page(
    studio: Studio, prompts: dict[int, str], *, seed: int = 0, num_chunks: int = 4, decode: bool = False
) -> list[Chunk]:
    """The chunks of a rollout whose prompts, by their first chunk, are known before it begins."""
    student = studio.pipe.student()
    decoder = StreamingDecoder(studio.pipe.vae) if decode else None
    state = studio.pipe.new_state(student, height=32, width=32, seeds=(seed,), decoder=decoder)
    shots = [replace(studio.shot(prompt), start_chunk=chunk) for chunk, prompt in prompts.items()]
    return list(rollout(student, state, shots, num_chunks=num_chunks))


def latents(live: LiveRollout) -> list[Tensor]:
    """Of the chunks of the branch that is shown."""
    assert live._kept is not None
    branch = live._kept.session.branch(live._kept.branch)
    return [branch.latents(index)["latents"] for index in range(branch.num_chunks)]


def assert_same(made: list[Tensor], chunks: list[Chunk]) -> None:
    assert len(made) == len(chunks)
    assert all(torch.equal(one, chunk.latents) for one, chunk in zip(made, chunks, strict=True))


def test_a_rollout_is_seen_while_it_is_made_and_ends_in_a_video_and_a_picture(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    live = LiveRollout(studio)
    views = started(live)
    assert next(views).line == "Starting."
    first = next(views)
    assert not latents(live)  # chunks to come are not waited for, and it is saved beside the making of the next
    assert first.line == "0.0 of 0.2 s | - frames a second | frames in memory: sink 3, slow 0, fast 0"
    with Image.open(io.BytesIO(first.moving)) as image:
        assert (image.format, image.n_frames, image.size, image.info["loop"]) == ("WEBP", 9, (32, 32), 1)
    *others, last = views
    assert [bool(view.moving) for view in others] == [True] * 3
    assert last.line.startswith("Done: 0.2 of 0.2 s | ")
    assert "sink 3, slow " in last.line
    assert last.video is not None
    frames, fps = read_video(last.video)
    chunks = without_page(studio, {0: RED}, decode=True)
    expected = torch.cat([chunk.frames[0] for chunk in chunks if chunk.frames is not None])
    assert (frames.shape, fps) == ((45, 3, 32, 32), FPS)
    assert (frames - expected / 255).abs().mean() < 0.03  # what H.264 loses of noise
    assert last.picture is not None
    with Image.open(last.picture) as image:
        assert image.format == "PNG"


def test_the_animated_picture_shows_the_frames_for_their_time() -> None:
    levels = [0, 120, 240]
    frames = torch.tensor(levels, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 16, 16)
    with Image.open(io.BytesIO(animated(frames, fps=16))) as image:
        durations = []
        for number, level in enumerate(levels):
            image.seek(number)
            image.load()
            durations.append(image.info["duration"])
            assert abs(image.convert("RGB").getpixel((8, 8))[0] - level) < 6
    assert sum(durations) == round(3 * 1000 / 16)


def test_a_new_prompt_begins_with_the_next_chunk(studio: Studio) -> None:
    live = LiveRollout(studio)
    views = started(live)
    for _ in range(3):  # the beginning and two chunks
        next(views)
    live.change_prompt("a green square")
    live.change_prompt(f"  {BLUE} ")
    *_, last = views
    assert_same(latents(live), without_page(studio, {0: RED, 2: BLUE}))
    assert last.line.startswith("Done")


def test_a_camera_moves_as_asked_for_and_goes_on_from_there_in_a_branch(tiny_wan_folder: Path, tmp_path: Path) -> None:
    studio = Studio(tiny_student(tiny_wan_folder, camera_dim=8), DEFAULTS, tmp_path)
    live = LiveRollout(studio)
    first, later = f"{9 / FPS}-{21 / FPS} right 1", f"{33 / FPS}-{45 / FPS} left 0.5"
    list(started(live, camera=first))
    made = list(studio.pipe.stream(RED, num_chunks=5, camera=f"{first}, {later}", height=32, width=32, fps=FPS))
    assert_same(latents(live)[:3], made[:3])
    list(live.branch_from(RED, second=33 / FPS, seconds=57 / FPS, camera=later))
    assert_same(latents(live), made)
    held = LiveRollout(studio)
    list(started(held))
    assert not torch.equal(latents(held)[1], made[1].latents)


@pytest.mark.parametrize(
    ("camera", "complaint"),
    [
        ("right", "no camera move"),
        (3, "The camera must be a text"),
        ("1-2 right 1," * 50, "at most 500 characters"),
        ("1-2 right 1", "this student is not: leave it out"),
    ],
)
def test_a_camera_that_cannot_be_is_refused(studio: Studio, camera: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        started(LiveRollout(studio), camera=camera)


def test_a_prompt_before_the_first_chunk_is_the_only_one(studio: Studio) -> None:
    live = LiveRollout(studio)
    views = started(live)
    next(views)
    live.change_prompt(BLUE)
    list(views)
    assert_same(latents(live), without_page(studio, {0: BLUE}))


def test_the_same_prompt_again_and_one_of_the_rollout_before_change_nothing(studio: Studio) -> None:
    live = LiveRollout(studio)
    views = started(live)
    while True:
        view = next(views)
        if view.video is not None:
            break
    live.change_prompt(BLUE)  # after the last chunk
    with pytest.raises(StopIteration):
        next(views)
    views = started(live)
    next(views), next(views)
    live.change_prompt(RED)
    list(views)
    assert_same(latents(live), without_page(studio, {0: RED}))


def test_stop_ends_after_the_present_chunk_with_the_video_so_far(studio: Studio) -> None:
    live = LiveRollout(studio)
    views = started(live)
    next(views), next(views)
    live.stop()
    live.stop()
    (last,) = views
    assert last.line.startswith("Stopped: 0.0 of 0.2 s")
    assert last.video is not None
    assert len(read_video(last.video)[0]) == 9
    assert last.picture is not None


def test_a_rollout_that_is_stopped_before_its_first_chunk_has_one(studio: Studio) -> None:
    live = LiveRollout(studio)
    views = started(live)
    next(views)
    live.stop()
    assert [bool(view.video) for view in views] == [False, True]
    assert len(latents(live)) == 1


def test_after_a_stop_another_rollout_runs_to_its_end(studio: Studio) -> None:
    live = LiveRollout(studio)
    views = started(live)
    next(views)
    live.stop()
    list(views)
    assert [*started(live, BLUE)][-1].line.startswith("Done")
    assert_same(latents(live), without_page(studio, {0: BLUE}))


@pytest.mark.parametrize("second", [0, 9 / FPS, 10 / FPS, SECONDS])
def test_a_branch_is_what_a_rollout_with_the_prompts_known_would_be(studio: Studio, second: float) -> None:
    live = LiveRollout(studio)
    list(started(live))
    at = {0: 0, 9 / FPS: 1, 10 / FPS: 2, SECONDS: 4}[second]
    first, *_, last = live.branch_from(BLUE, second=second, seconds=69 / FPS)
    assert first.line.startswith("Going back to ")
    expected = without_page(studio, {0: RED, at: BLUE} if at else {0: BLUE}, num_chunks=6)
    assert_same(latents(live), expected)
    assert last.video is not None
    assert len(read_video(last.video)[0]) == 69


def test_a_branch_of_a_branch_goes_on_from_what_is_shown(studio: Studio) -> None:
    live = LiveRollout(studio)
    list(started(live))
    list(live.branch_from(BLUE, second=9 / FPS, seconds=SECONDS))
    list(live.branch_from(RED, second=33 / FPS, seconds=SECONDS))
    assert_same(latents(live), without_page(studio, {0: RED, 1: BLUE, 3: RED}))


def test_a_branch_from_an_exact_state_is_the_same_too(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("live_rollout._SNAPSHOT_EVERY", 2)
    live = LiveRollout(studio)
    list(started(live))
    assert live._kept is not None
    assert live._kept.session.branch("main").snapshots == (2, 4)
    list(live.branch_from(BLUE, second=33 / FPS, seconds=SECONDS))
    assert_same(latents(live), without_page(studio, {0: RED, 3: BLUE}))


def test_a_branch_that_comes_to_nothing_leaves_the_rollout_shown(studio: Studio) -> None:
    live = LiveRollout(studio)
    list(started(live))
    views = live.branch_from(BLUE, second=0, seconds=SECONDS)
    next(views)
    views.close()  # type: ignore[attr-defined]
    assert_same(latents(live), without_page(studio, {0: RED}))


def test_visitors_at_once_get_what_each_would_get_alone(studio: Studio) -> None:
    visitors = {seed: LiveRollout(studio) for seed in (1, 2)}
    ended: dict[int, View] = {}

    def visit(seed: int) -> None:
        views = started(visitors[seed], seed=seed)
        next(views), next(views)
        visitors[seed].change_prompt(f"{BLUE} {'left' if seed == 1 else 'right'}")
        ended[seed] = [*views][-1]

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in visitors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for seed, word in ((1, "left"), (2, "right")):
        expected = without_page(studio, {0: RED, 1: f"{BLUE} {word}"}, seed=seed)
        assert_same(latents(visitors[seed]), expected)
    folders = [view.video.parent for view in ended.values() if view.video is not None]
    assert len(set(folders)) == 2
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)


def test_a_new_rollout_and_leaving_remove_the_files(studio: Studio, tmp_path: Path) -> None:
    live = LiveRollout(studio)
    list(started(live))
    (before,) = tmp_path.iterdir()
    list(started(live))
    (after,) = tmp_path.iterdir()
    assert before != after
    live.leave()
    live.leave()
    assert not [*tmp_path.iterdir()]
    with pytest.raises(UserError, match="load the page again"):
        next(started(live))


def test_leaving_while_a_chunk_is_made_ends_the_rollout_and_then_removes_the_files(
    studio: Studio, tmp_path: Path
) -> None:
    live = LiveRollout(studio)
    views = started(live)
    next(views), next(views)
    live.leave()
    assert [*tmp_path.iterdir()]
    assert [*views][-1].line.startswith("Stopped")
    assert not [*tmp_path.iterdir()]


def test_a_page_that_is_closed_keeps_its_finished_chunks_and_is_free_again(studio: Studio) -> None:
    live = LiveRollout(studio)
    views = started(live)
    next(views), next(views), next(views)
    views.close()  # type: ignore[attr-defined]
    list(live.branch_from(BLUE, second=10 / FPS, seconds=SECONDS))
    assert_same(latents(live), without_page(studio, {0: RED, 2: BLUE}))


def test_while_a_rollout_runs_no_other_begins(studio: Studio) -> None:
    live = LiveRollout(studio)
    views = started(live)
    next(views), next(views)
    with pytest.raises(UserError, match="running; stop it first"):
        next(started(live))
    with pytest.raises(UserError, match="running; stop it first"):
        next(live.branch_from(BLUE, second=0, seconds=1))
    list(views)
    assert_same(latents(live), without_page(studio, {0: RED}))


def test_before_a_rollout_there_is_nothing_to_stop_change_or_branch(studio: Studio) -> None:
    live = LiveRollout(studio)
    with pytest.raises(UserError, match="No rollout is running"):
        live.stop()
    with pytest.raises(UserError, match="No rollout is running"):
        live.change_prompt(BLUE)
    with pytest.raises(UserError, match="no rollout to branch from"):
        next(live.branch_from(BLUE, second=0, seconds=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n"}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": "a " * 400}, "at most 500 characters; this one has 799"),
        ({"prompt": "a \ud800"}, "surrogates"),
        ({"seconds": 0}, "length must be from"),
        ({"seconds": -1}, "length must be from"),
        ({"seconds": 1e9}, f"to {MOST_SECONDS}, got 1e"),
        ({"seconds": float("nan")}, "must be a number"),
        ({"seconds": None}, "must be a number, got nothing"),
        ({"seconds": "3"}, "must be a number, got '3'"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"seed": None}, "got nothing"),
        ({"seed": 2**70}, "seed must be a whole number"),
        ({"memory": "full:100000"}, "memory must be one of: the first 3, keyframes: 3, the last 6"),
        ({"memory": None}, "memory must be one of"),
    ],
)
def test_a_rollout_of_values_out_of_range_is_refused(studio: Studio, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        started(LiveRollout(studio), **changes)


def test_a_rollout_that_is_refused_keeps_the_one_before(studio: Studio) -> None:
    live = LiveRollout(studio)
    list(started(live, seconds=9 / FPS))
    with pytest.raises(UserError):
        started(live, "")
    assert len(latents(live)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second": 1}, "video ends at 0.0375 s; branch from there or before"),
        ({"second": -1}, "second must be from 0"),
        ({"second": None}, "second must be a number"),
        ({"second": 9 / FPS}, "branch begins at 0.0375 s; the length must be more"),
        ({"second": 0, "prompt": ""}, "no prompt"),
    ],
)
def test_a_branch_that_cannot_be_is_refused_and_the_rollout_kept(
    studio: Studio, changes: dict[str, Any], message: str
) -> None:
    live = LiveRollout(studio)
    list(started(live, seconds=9 / FPS))
    with pytest.raises(UserError, match=message):
        next(live.branch_from(**({"prompt": BLUE, "seconds": 9 / FPS} | changes)))
    assert_same(latents(live), without_page(studio, {0: RED}, num_chunks=1))


def test_every_memory_to_choose_makes_a_video_of_its_own(studio: Studio) -> None:
    names = [*studio.memories()]
    assert names == ["the first 3, keyframes: 3, the last 6", "the first 3, the last 9", "the last 12"]
    live, made = LiveRollout(studio), []
    for name in names:
        list(started(live, memory=name, seconds=69 / FPS))
        made.append(latents(live)[-1])
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


def test_words_that_the_model_does_not_know_are_said(studio: Studio) -> None:
    live = LiveRollout(studio)
    views = started(live, "a red zebra")
    next(views)
    assert next(views).line.endswith("the model does not know: zebra")
    live.change_prompt(BLUE)
    assert "does not know" not in [*views][-1].line


def test_no_faster_than_it_can_be_watched(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: timeout is None or waits.append(timeout))
    studio = Studio(pipe, replace(DEFAULTS, fps=0.1), tmp_path)
    views = started(LiveRollout(studio), seconds=110)
    for _ in range(3):
        next(views)
    assert waits[0] == 0
    assert 60 < waits[1] < 90  # of the first chunk's 90 seconds, less what the second took

"""A memory policy is one class and one row: the smallest one, through every part that works with memories."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import rollout_command
from tests.support.sliding_window import SlidingWindow, read_sliding_window
from tests.support.tiny_causal import chunks_of, shot, state_of, student, video
from vidaccel.cli import run
from vidaccel.errors import UserError
from vidaccel.memory import POLICIES, MemoryConfig, MemoryIndex, MemoryPolicy, PolicyRow
from vidaccel.rollout.loop import ingest
from vidaccel.rollout.state import RolloutState
from vidaccel.video.files import read_video

student_folder = rollout_command.student_folder

OWN = SlidingWindow(window_frames=9)
SAME = MemoryConfig.sliding_window(9)  # the slow-fast memory without sink and slow part
SHOTS = [shot("a"), shot("b", start=4), shot("c", start=7, cut="hard")]


@pytest.fixture
def _in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "last", PolicyRow("last:9", read_sliding_window))


def latents_of(policy: MemoryPolicy, **sampling: Any) -> list[torch.Tensor]:
    made = student(num_inference_steps=2, **sampling)
    return [chunk.latents for chunk in chunks_of(made, state_of(made, policy, (0, 1)), 10, _for_two(SHOTS))]


def _for_two(shots: list[Any]) -> list[Any]:
    return [shot(one.prompt, one.start_chunk, batch_size=2, cut=one.cut) for one in shots]


@pytest.mark.parametrize("sampling", [{}, {"guidance_scale": 2.0}], ids=["plain", "guided"])
def test_the_smallest_policy_makes_the_video_of_a_slow_fast_window_bit_for_bit(sampling: dict[str, Any]) -> None:
    pairs = zip(latents_of(OWN, **sampling), latents_of(SAME, **sampling), strict=True)
    assert all(torch.equal(own, same) for own, same in pairs)


def test_it_is_saved_and_goes_on_bit_for_bit() -> None:
    made = student(num_inference_steps=1)
    whole = chunks_of(made, state_of(made, OWN), 8)
    state = state_of(made, OWN)
    chunks_of(made, state, 5)
    tensors, values = state.save_state()
    resumed = state_of(made, OWN)
    resumed.load_state({name: part.clone() for name, part in tensors.items()}, json.loads(json.dumps(values)))
    for chunk, wanted in zip(chunks_of(made, resumed, 8), whole[5:], strict=True):
        assert torch.equal(chunk.latents, wanted.latents)
        assert (chunk.sink, chunk.slow, chunk.fast) == ((), (), wanted.fast)


def test_latents_that_are_given_are_remembered() -> None:
    states: list[RolloutState] = []
    for policy in (OWN, SAME):
        made = student(num_inference_steps=1)
        states.append(state_of(made, policy))
        list(ingest(made, states[-1], shot(), video(13)))
    assert list(states[0].remembered) == list(range(4, 13))
    assert torch.equal(states[0].memory.buffers.raw, states[1].memory.buffers.raw)


@pytest.mark.parametrize(
    ("parts", "message"),
    [(None, "cannot be read"), ([0, 99], "does not exist yet"), ([0] * 12, "more frames than there is place")],
)
def test_a_damaged_state_is_refused_without_a_line_of_its_own(parts: object, message: str) -> None:
    index = MemoryIndex(OWN)
    for _ in range(4):
        index.begin_chunk()
        index.commit()
    with pytest.raises(UserError, match=message):
        MemoryIndex.from_state(OWN, {**index.state(), "parts": parts})
    with pytest.raises(UserError, match="saved with `window_frames` 9; now it is 12"):
        MemoryIndex.from_state(SlidingWindow(window_frames=12), index.state())
    assert MemoryIndex.from_state(OWN, json.loads(json.dumps(index.state()))).entries == index.entries


@dataclass(frozen=True, kw_only=True)
class LastWindow(SlidingWindow):
    """Another policy, whose settings have the same names."""


@pytest.mark.parametrize(
    ("saved", "asked"), [(OWN, LastWindow(window_frames=9)), (OWN, SAME), (SAME, OWN)], ids=["equal", "ours", "theirs"]
)
def test_a_state_of_another_policy_is_refused_in_one_line(saved: MemoryPolicy, asked: MemoryPolicy) -> None:
    before, now = type(saved).__name__, type(asked).__name__
    with pytest.raises(UserError, match=rf"^The memory was saved by the policy {before}; now it is {now}\. Take"):
        MemoryIndex.from_state(asked, MemoryIndex(saved).state())


def test_a_policy_without_its_decisions_cannot_be_made_and_says_which_are_missing() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unfinished(MemoryPolicy):
        chunk_frames: int = 3

        def start(self) -> list[int]:
            return []

    with pytest.raises(TypeError) as error:
        Unfinished()  # type: ignore[abstract]
    missing = {name for name in vars(MemoryPolicy) if re.search(rf"\b{name}\b", str(error.value))}
    assert missing == {"part_frames", "begin", "commit", "entries"}


@pytest.mark.usefixtures("_in_the_table")
def test_the_command_line_runs_it_by_name_plans_it_and_reports_it(
    student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(name: str, *arguments: str, seconds: str = "3") -> int:
        output = str(tmp_path / f"{name}.mp4")
        return run(
            ["rollout", "a", "--model", str(student_folder), "--seconds", seconds, "--output", output, *arguments]
        )

    assert command("plan", "--memory", "last:9", "--plan") == 0
    assert "memory of 9 frames" in capsys.readouterr().out
    assert command("own", "--memory", "last:9", "--report", "--checkpoint", str(tmp_path / "run"), seconds="2") == 0
    again = ("--checkpoint", str(tmp_path / "run"), "--resume", "--overwrite")
    assert command("own", "--memory", "last:9", "--report", *again) == 0
    assert command("same", "--memory", "window:9") == 0
    assert torch.equal(read_video(tmp_path / "own.mp4")[0], read_video(tmp_path / "same.mp4")[0])
    settings = json.loads((tmp_path / "own.json").read_text())["settings"]
    assert settings["memory"] == {"policy": "SlidingWindow", "window_frames": 9, "chunk_frames": 3}
    report = json.loads((tmp_path / "own.report.json").read_text())
    assert [stay[0] for stay in report["stays"]["fast"]] == list(range(15))
    capsys.readouterr()
    assert command("own", "--memory", "last:12", *again) == 2
    assert "memory.window_frames is 9 there, asked for 12" in " ".join(capsys.readouterr().err.split())
    assert command("other", "--memory", "last:9", "--similarity-threshold", "0.9") == 2
    assert "--similarity-threshold is for slow-fast memories" in " ".join(capsys.readouterr().err.split())
    assert command("other", "--memory", "last:two") == 2
    assert "full:240 or last:9 (latent frames); got 'last:two'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("part", [SlidingWindow, read_sliding_window])
def test_the_documentation_shows_this_very_policy(part: Any) -> None:
    page = Path(__file__).parents[2] / "docs/how-to/memory-policy.md"
    assert inspect.getsource(part) in page.read_text(encoding="utf-8")

"""The camera of `pipe.stream` from outside: against the loop itself, in calls, and in sessions of both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import rollout_command
from tests.support.rollout_command import Command
from tests.support.tiny_models import tiny_student
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline
from vidaccel.rollout.camera import CameraPath
from vidaccel.rollout.loop import rollout as rollout_of
from vidaccel.rollout.timeline import PromptSpan, PromptTimeline
from vidaccel.sessions.session import Session

student_folder, plans, rollout = rollout_command.camera_student_folder, rollout_command.plans, rollout_command.rollout
RED, BLUE = "a red circle", "a blue square"
MOVES = "1-1.6 right 1, 2.5-3 left 0.5"


@pytest.fixture(scope="module")
def pipe(student_folder: Path) -> Any:
    return load_pipeline(str(student_folder))


def streamed(pipe: Any, prompt: Any = RED, **changes: Any) -> Any:
    settings = {"height": 32, "width": 48, "max_sequence_length": 16, "num_chunks": 5, "decode": False}
    return pipe.stream(prompt, **{**settings, **changes})


def latents(chunks: Any) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


@pytest.mark.parametrize(
    "timeline", [PromptTimeline.single(RED), PromptTimeline((PromptSpan(0, RED), PromptSpan(2, BLUE, "hard")))]
)
def test_a_stream_with_a_camera_is_the_loop_with_the_path_on_the_grid_with_its_cuts(
    pipe: Any, timeline: PromptTimeline
) -> None:
    path, grid = CameraPath.parse(MOVES), timeline.grid_with_cuts(pipe.grid())

    def camera(chunk: int, first_frame: int, num_frames: int) -> tuple[list[float], list[float]]:
        assert (first_frame, num_frames) == (3 * chunk, 3)
        return path.positions(chunk, grid), path.motions(chunk, grid)

    student = pipe.student()
    state = pipe.new_state(student, height=32, width=48, seeds=(4, 5))
    shots = pipe.shots(timeline, num_chunks=5, num_videos=2, max_sequence_length=16)
    expected = list(rollout_of(student, state, shots, num_chunks=5, camera=camera))
    made = list(streamed(pipe, timeline, camera=MOVES, seeds=(4, 5)))
    assert torch.equal(latents(made), latents(expected))
    assert [chunk.camera for chunk in made] == [chunk.camera for chunk in expected]
    told = list(streamed(pipe, timeline.with_camera(path), seeds=(4, 5)))
    assert torch.equal(latents(told), latents(made))
    still = latents(streamed(pipe, timeline, seeds=(4, 5)))
    assert torch.equal(still[:, :, :6], latents(made)[:, :, :6])  # until the first move
    assert not torch.allclose(still[:, :, 6:], latents(made)[:, :, 6:])


def test_a_camera_that_holds_is_a_camera_that_nobody_speaks_of(pipe: Any) -> None:
    student = pipe.student()
    state = pipe.new_state(student, height=32, width=48)
    shots = pipe.shots(RED, max_sequence_length=16)
    assert torch.equal(latents(streamed(pipe)), latents(rollout_of(student, state, shots, num_chunks=5)))


def test_a_call_moves_the_camera_as_a_stream_does(pipe: Any) -> None:
    call = {"height": 32, "width": 48, "num_frames": 57, "max_sequence_length": 16, "output_type": "latent"}
    made = pipe(RED, generator=torch.Generator().manual_seed(3), camera=CameraPath.parse(MOVES), **call).frames
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(3)))
    assert torch.equal(made, latents(streamed(pipe, camera=MOVES, seeds=(seed,))))
    assert not torch.equal(made, pipe(RED, generator=torch.Generator().manual_seed(3), **call).frames)


def test_moves_may_lie_in_what_the_video_begins_with(pipe: Any) -> None:
    clip = torch.rand(25, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    moved, later = (
        list(streamed(pipe, video=clip, num_chunks=6, camera=camera)) for camera in ("0.5-1 right 1", "2-2.5 right 1")
    )
    assert [chunk.origin for chunk in moved] == ["given"] * 3 + ["made"] * 3
    grid = pipe.grid(given_frames=7)
    for chunks, path in ((moved, "0.5-1 right 1"), (later, "2-2.5 right 1")):
        assert [chunk.camera[0] for chunk in chunks] == [CameraPath.parse(path).positions(n, grid) for n in range(6)]
    assert torch.equal(latents(moved[:3]), latents(later[:3]))
    assert not torch.allclose(latents(moved[3:]), latents(later[3:]))


@pytest.mark.parametrize("snapshot_every", [0, 1])
def test_python_and_the_command_line_go_on_with_each_others_moves(
    pipe: Any, rollout: Command, tmp_path: Path, snapshot_every: int
) -> None:
    expected = list(streamed(pipe, camera=MOVES, seeds=(0,), memory=pipe.memory_config()))
    kept = ("--checkpoint", str(tmp_path / "command"), "--camera", MOVES, "--snapshot-every", str(snapshot_every))
    plain = ("--similarity-threshold", str(pipe.memory_config().similarity_threshold))
    assert rollout(RED, *kept, *plain, "--seconds", "2") == 0
    run = {"session": tmp_path / "command", "resume": True, "decode": True}
    made = list(streamed(pipe, camera=MOVES, **run))
    assert [chunk.origin for chunk in made] == ["saved"] * 3 + ["made"] * 2
    assert torch.equal(latents(made), latents(expected))
    assert [tuple(chunk.camera) for chunk in made[3:]] == [chunk.camera for chunk in expected[3:]]
    assert [list(chunk.camera) for chunk in made] == [list(chunk.camera) for chunk in expected]
    with pytest.raises(UserError, match="Chunk 2 of branch 'main' was made with the camera move 'right 1'"):
        streamed(pipe, **run)
    branch = streamed(pipe, branch="still", branch_from=3, num_chunks=5, session=run["session"], decode=True)
    whole = latents(streamed(pipe, camera="1-1.6 right 1"))
    assert torch.equal(latents(branch), whole)
    with Session.open(tmp_path / "command", read_only=True) as session:
        assert session.branch("still").num_chunks == 5


def test_a_student_that_is_not_told_of_a_camera_refuses_one(tiny_wan_folder: Path) -> None:
    plain = tiny_student(tiny_wan_folder)
    timeline = PromptTimeline.single(RED).with_camera(MOVES)
    for arguments in ({"prompt": RED, "camera": MOVES}, {"prompt": timeline}):
        with pytest.raises(UserError, match=r"in Python `camera`.* this student is not: leave it out"):
            streamed(plain, **arguments)
    assert all(chunk.camera is None for chunk in streamed(plain, num_chunks=1))


def test_what_is_no_camera_or_a_second_one_is_said_when_the_stream_is_asked_for(pipe: Any) -> None:
    for camera, complaint in (("right", "no camera move"), (3, "or a `CameraPath`"), ("1-2 right 0", "no way of a")):
        with pytest.raises(UserError, match=complaint):
            streamed(pipe, camera=camera)
    with pytest.raises(UserError, match="camera lines and --camera"):
        streamed(pipe, PromptTimeline.single(RED).with_camera(MOVES), camera=MOVES)

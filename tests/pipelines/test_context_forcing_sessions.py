"""Sessions of `pipe.stream` from outside: going on after a kill, branches, rewinding, the command line's sessions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import rollout_command
from tests.support.rollout_command import Command
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline
from vidaccel.rollout.chunk import Chunk
from vidaccel.rollout.production import Production
from vidaccel.rollout.timeline import PromptSpan, PromptTimeline
from vidaccel.sessions.session import Session
from vidaccel.video.files import save_frames

student_folder, plans, rollout = rollout_command.student_folder, rollout_command.plans, rollout_command.rollout
RED, BLUE = "a red circle", "a blue square"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pipe(student_folder: Path) -> Any:
    return load_pipeline(str(student_folder))


def streamed(pipe: Any, prompt: Any = RED, **changes: Any) -> Any:
    """A stream with what `vidaccel rollout` of this student uses."""
    memory = replace(pipe.memory_config(), similarity_threshold=1.0)
    settings = {"height": 32, "width": 48, "memory": memory, "max_sequence_length": 16}
    return pipe.stream(prompt, **{**settings, **changes})


def assert_same(made: list[Chunk], expected: list[Chunk]) -> None:
    assert len(made) == len(expected)
    for one, other in zip(made, expected, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.frames, other.frames) if other.frames is not None else one.frames is None
        names = ("index", "first_frame", "prompt", "sink", "slow", "fast", "is_keyframe")
        assert all(getattr(one, name) == getattr(other, name) for name in names)


def segments(folder: Path, branch: str = "main") -> list[bytes | None]:
    with Session.open(folder, read_only=True) as session:
        return [session.branch(branch).segment(index) for index in range(session.branch(branch).num_chunks)]


@pytest.mark.parametrize("snapshot_every", [None, 0, 2])
def test_a_stream_that_was_stopped_goes_on_as_if_it_had_not_been(
    pipe: Any, tmp_path: Path, snapshot_every: int | None
) -> None:
    timeline = PromptTimeline((PromptSpan(0.0, RED), PromptSpan(1.0, BLUE, "hard"), PromptSpan(2.0, "a green sky")))
    expected = list(streamed(pipe, timeline, num_chunks=6))
    kept = {"session": tmp_path / "run", "snapshot_every": snapshot_every}
    stopped = streamed(pipe, timeline, **kept)
    begin = list(islice(stopped, 4))
    stopped.close()
    made = list(streamed(pipe, timeline, num_chunks=6, resume=True, **kept))
    assert_same(made, expected)
    assert_same(begin, expected[:4])
    assert [chunk.origin for chunk in made] == ["saved"] * 4 + ["made"] * 2
    assert list(streamed(pipe, timeline, num_chunks=6, resume=True, replay=False, **kept)) == []
    new = list(streamed(pipe, timeline, num_chunks=7, resume=True, replay=False, **kept))
    assert [chunk.index for chunk in new] == [6]


@pytest.mark.parametrize("snapshot_every", [1, 0])
def test_steps_that_are_left_out_are_left_out_on_the_way_and_the_session_says_so(
    pipe: Any, tmp_path: Path, snapshot_every: int
) -> None:
    """Also the first step, for which the chunk before stands in: from an exact state, and from replayed latents."""
    timeline = PromptTimeline((PromptSpan(0.0, RED), PromptSpan(1.0, BLUE, "hard")))
    left_out = {"skip_steps": "1+2", "num_inference_steps": 3}
    expected = list(streamed(pipe, timeline, num_chunks=5, **left_out))
    assert [chunk.skipped for chunk in expected[:2]] == [(1,), (2,)]
    assert not torch.equal(expected[0].latents, next(streamed(pipe, RED, num_inference_steps=3)).latents)
    kept = {"session": tmp_path / "run", "snapshot_every": snapshot_every, **left_out}
    list(streamed(pipe, timeline, num_chunks=3, **kept))
    assert_same(list(streamed(pipe, timeline, num_chunks=5, resume=True, **kept)), expected)
    with pytest.raises(UserError, match="skip_steps"):
        streamed(pipe, timeline, num_chunks=6, resume=True, **{**kept, "skip_steps": "2"})
    with pytest.raises(UserError, match="skip_steps"):
        streamed(pipe, timeline, num_chunks=6, resume=True, **{**kept, "skip_steps": None})


def test_a_session_of_python_goes_on_after_its_process_was_killed(
    pipe: Any, student_folder: Path, tmp_path: Path
) -> None:
    program = (
        "import sys\nfrom tests.pipelines.test_context_forcing_sessions import load_pipeline, streamed\n"
        "for chunk in streamed(load_pipeline(sys.argv[1]), session=sys.argv[2], snapshot_every=2):\n"
        "    print(chunk.index, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(student_folder), str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 4:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with Session.open(tmp_path / "run", read_only=True) as session:
        kept = session.branch().num_chunks
    assert kept >= 4  # at most the chunk in work and the one before are lost
    made = list(streamed(pipe, num_chunks=kept + 2, session=tmp_path / "run", resume=True))
    assert_same(made, list(streamed(pipe, num_chunks=kept + 2)))


def test_python_goes_on_with_a_session_of_the_command_line_and_the_other_way_round(
    pipe: Any, rollout: Command, tmp_path: Path
) -> None:
    def command(folder: str, *flags: str) -> int:
        return rollout(RED, "--checkpoint", str(tmp_path / folder), *flags, output=tmp_path / f"{folder}.mp4")

    assert command("whole", "--seconds", "3") == 0
    assert command("begun", "--seconds", "1") == 0
    list(streamed(pipe, num_chunks=5, session=tmp_path / "begun", resume=True))
    assert segments(tmp_path / "begun") == segments(tmp_path / "whole")
    assert command("begun", "--seconds", "3", "--resume", "--overwrite") == 0
    list(streamed(pipe, num_chunks=2, session=tmp_path / "python"))
    assert command("python", "--seconds", "3", "--resume") == 0
    for folder in ("begun", "python"):
        assert (tmp_path / f"{folder}.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    with Session.open(tmp_path / "whole") as one, Session.open(tmp_path / "python") as other:
        assert one.settings == other.settings


def test_a_clip_to_begin_with_is_of_the_same_session_for_both(pipe: Any, rollout: Command, tmp_path: Path) -> None:
    pixels = torch.randint(256, (14, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    clip = pixels.float() / 255
    save_frames(tmp_path / "clip.safetensors", clip)
    flags = ("--video", str(tmp_path / "clip.safetensors"), "--checkpoint", str(tmp_path / "run"))
    assert rollout(RED, *flags, "--seconds", "1.5", output=tmp_path / "short.mp4") == 0
    made = list(streamed(pipe, num_chunks=5, video=clip, session=tmp_path / "run", resume=True))
    expected = list(streamed(pipe, num_chunks=5, video=clip))
    assert_same(made, expected)
    assert [chunk.origin for chunk in expected] == ["given"] * 2 + ["made"] * 3
    given = torch.cat([chunk.frames for chunk in made[:2] if chunk.frames is not None], dim=1)
    assert torch.equal(given[0], pixels[1:])
    with pytest.raises(UserError, match="start_pixels is 'as given' there and was not asked for"):
        streamed(pipe, video=clip, decode_start=True, session=tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="start is "):
        streamed(pipe, video=clip.flip(0), session=tmp_path / "run", resume=True)


def test_a_branch_and_a_rewound_one_go_on_under_other_prompts(pipe: Any, tmp_path: Path) -> None:
    run = {"session": tmp_path / "run"}
    list(streamed(pipe, num_chunks=5, **run))
    other = PromptTimeline((PromptSpan(0.0, RED), PromptSpan(21 / 16, BLUE)))
    expected = list(streamed(pipe, other, num_chunks=5))
    assert_same(list(streamed(pipe, BLUE, num_chunks=5, branch="blue", branch_from=2, **run)), expected)
    assert_same(list(streamed(pipe, BLUE, num_chunks=5, branch="blue", resume=True, **run)), expected)
    with pytest.raises(UserError, match="Chunk 2 of branch 'main' was made with 'a red circle'"):
        streamed(pipe, other, num_chunks=5, resume=True, rewind=3, **run)
    with Session.open(tmp_path / "run", read_only=True) as session:
        assert session.branch().num_chunks == 5  # nothing is given up where it is refused
    assert_same(list(streamed(pipe, other, num_chunks=5, resume=True, rewind=2, **run)), expected)
    assert segments(tmp_path / "run") == segments(tmp_path / "run", "blue")


def test_an_image_or_embeddings_and_several_videos_are_gone_on_with(pipe: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        embeddings, _ = pipe.encode_prompt([RED], [""], max_sequence_length=16)
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    for number, wanted in enumerate(
        (
            {"prompt": None, "prompt_embeds": embeddings, "image": image},
            {"prompt": [RED, BLUE], "seeds": (1, 2)},
            {"guidance_scale": 2.0, "negative_prompt": "the sky", "decode": False},
        )
    ):
        run = {"session": tmp_path / str(number), **wanted}
        list(streamed(pipe, num_chunks=2, **run))
        assert_same(
            list(streamed(pipe, num_chunks=4, resume=True, **run)), list(streamed(pipe, num_chunks=4, **wanted))
        )
    with pytest.raises(UserError, match="which it does not hold; go on with the same `prompt_embeds`"):
        streamed(pipe, BLUE, image=image, session=tmp_path / "0", branch="blue", branch_from=2)


def test_a_session_of_another_model_or_of_changed_weights_is_refused(pipe: Any, tmp_path: Path) -> None:
    list(streamed(pipe, num_chunks=1, session=tmp_path / "run"))
    other = type(pipe)(**pipe.components, num_inference_steps=2)
    assert_same(list(streamed(other, num_chunks=1)), list(streamed(pipe, num_chunks=1)))
    with pytest.raises(
        UserError, match="was made by another model, by other weights"
    ):  # not known to be of that folder
        streamed(other, session=tmp_path / "run", resume=True)
    list(streamed(other, num_chunks=1, session=tmp_path / "other"))
    weight = other.transformer.proj_out.weight
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(UserError, match="was made by another model, by other weights"):
        streamed(other, session=tmp_path / "other", resume=True)
    with torch.no_grad():
        weight.div_(2)
    with pytest.raises(UserError, match="seed is 0 there, asked for 3"):
        streamed(pipe, seeds=(3,), session=tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="max_sequence_length is 16 there, asked for 512"):
        streamed(pipe, max_sequence_length=512, session=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"resume": True}, "--resume is about a saved session"),
        ({"rewind": 1}, "--rewind is about a saved session"),
        ({"session": "run"}, "is a session already; give --resume"),
        ({"session": "none", "resume": True}, "There is no session in .*none; leave out --resume"),
        ({"session": "run", "rewind": 1}, "--rewind gives up chunks of a branch that goes on"),
        ({"session": "run", "resume": True, "rewind": 9}, "has 1 finished chunks; cannot keep 9"),
        ({"session": "run", "branch_from": 1}, "--branch-from makes a new branch"),
        ({"session": "run", "resume": True, "snapshot_every": -1}, "at least 0 chunks"),
        ({"session": "run", "resume": True, "prompt": BLUE}, "asked for is 'a blue square'"),
        ({"session": "run", "resume": True, "rewind": 0.5}, "`rewind` must be a whole number of at least 0 chunks"),
        ({"session": "run", "branch": "b", "branch_from": 0.5}, "`branch_from` must be a whole number"),
        ({"num_chunks": 0}, "`num_chunks` must be a whole number of at least 1, got 0"),
        ({"num_chunks": "3"}, "`num_chunks` must be a whole number of at least 1, got '3'"),
        ({"num_frames": -5}, "`num_frames` must be a whole number of at least 1, got -5"),
        ({"max_sequence_length": 0}, "`max_sequence_length` must be a whole number of at least 1"),
        ({"prompt": 5}, "`prompt` must be a text, or one for each"),
        ({"image": torch.full((3, 32, 48), 200.0)}, r"floating in \[0, 1\], or uint8; got values from 200 to 200"),
        ({"num_chunks": 1, "num_frames": 9}, "`num_chunks` or `num_frames`; give one"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_said_when_the_stream_is_asked_for(
    pipe: Any, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    list(streamed(pipe, num_chunks=1, session=tmp_path / "run", decode=False))
    asked = {name: tmp_path / value if name == "session" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=match):
        streamed(pipe, decode=False, **asked)
    Session.open(tmp_path / "run").close()  # and nothing is locked


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": 3}, "`seeds` must have a whole number for every video"),
        ({"seeds": (1.5,)}, "`seeds` must have a whole number for every video"),
        ({"num_inference_steps": 1.5}, "`num_inference_steps` must be a whole number"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ({"memory": 3}, "`memory` must be a text such as"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_numbers_that_cannot_be_are_refused_by_the_call(pipe: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        streamed(pipe, **changes)


def test_a_stream_keeps_other_writers_out_until_it_is_closed(pipe: Any, tmp_path: Path) -> None:
    run = {"session": tmp_path / "run", "decode": False}
    first = streamed(pipe, **run)
    next(first)
    with pytest.raises(UserError, match=r"is being written by process \d+ \(this one\)"):
        streamed(pipe, resume=True, **run)
    first.close()
    assert [chunk.origin for chunk in islice(streamed(pipe, resume=True, **run), 2)] == ["saved", "made"]


def test_two_threads_that_make_chunks_of_one_branch_do_not_mix_them(pipe: Any, tmp_path: Path) -> None:
    student = pipe.student()
    shots = pipe.shots(RED, max_sequence_length=16)
    errors: list[UserError] = []

    def produce(session: Session, barrier: threading.Barrier) -> None:
        state = pipe.new_state(student, height=32, width=48)
        made = Production(student=student, state=state, shots=shots, num_chunks=4, branch=session.branch())
        barrier.wait()
        try:
            for _ in made.chunks():
                time.sleep(0.01)
        except UserError as error:
            errors.append(error)

    with Session.create(tmp_path / "run", {}) as session:
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=produce, args=(session, barrier)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 1
        assert "somebody else has written to it" in str(errors[0])
        found = [session.branch().latents(index)["latents"] for index in range(session.branch().num_chunks)]
    state = pipe.new_state(student, height=32, width=48)
    alone = list(Production(student=student, state=state, shots=shots, num_chunks=4).chunks())
    assert all(torch.equal(latents, chunk.latents.cpu()) for latents, chunk in zip(found, alone, strict=False))

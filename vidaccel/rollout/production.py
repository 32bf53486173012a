"""The one loop that makes a rollout: for the command line, the page of the demo, and Python.

What a branch of a session holds is not made again. The rollout goes back to the state after it, makes what is missing,
and every finished chunk is encoded beside the making of the next one, then saved, then passed on to a video.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.rollout.branch_camera import camera_of_branch
from vidaccel.rollout.camera import PlacedPath
from vidaccel.rollout.chunk import Chunk, Shot, Student, shot_at
from vidaccel.rollout.kept_session import SessionSettings, open_session
from vidaccel.rollout.loop import check_rollout, ingest, rollout
from vidaccel.rollout.report import RolloutReport
from vidaccel.rollout.resume import restore, save_chunk, shots_of_branch, usual_snapshot_every
from vidaccel.rollout.session_request import SessionRequest
from vidaccel.rollout.start import Start
from vidaccel.rollout.state import RolloutState
from vidaccel.rollout.timeline import ENDLESS, PromptChange, PromptSpan
from vidaccel.sessions.branch import Branch
from vidaccel.sessions.session import Session
from vidaccel.video.streams import encode_segment


class Stream(Protocol):
    """Where encoded chunks go."""

    def append(self, segment: bytes) -> None:
        """Take the frames of the next chunk."""
        ...


@dataclass(kw_only=True)
class Production:
    """A rollout and where its chunks go.

    student, state, shots: as `rollout` takes them; the state before the first chunk, also where the branch has some.
        `shots` are those of the whole rollout (`shots_of_branch`), and may be added to between two chunks.
    num_chunks: of the whole rollout; None: until the caller stops.
    camera: of the whole rollout (`camera_of_branch`), None for a student that is not told of one.
    start: what it begins with.
    branch: of a session that is open for writing; its chunks are gone on from, and new ones appended.
    snapshot_every: chunks between exact states in the branch, 0 for none; None: as many as their size suggests.
    fps: of the encoded frames, which a branch and a stream get; None: nothing is encoded. Of several videos at once
        (seeds) no frames are encoded.
    stream: gets the encoded frames of new chunks.
    """

    student: Student
    state: RolloutState
    shots: Sequence[Shot]
    num_chunks: int | None = None
    camera: PlacedPath | None = None
    start: Start | None = None
    branch: Branch | None = None
    snapshot_every: int | None = None
    fps: float | None = None
    stream: Stream | None = None

    def __post_init__(self) -> None:
        check_rollout(self.student, self.state, self.shots, self.camera)

    def open_session(
        self,
        asked: SessionRequest,
        settings: SessionSettings,
        *,
        encode: Callable[[str], tuple[Tensor, ...]],
        num_given_chunks: int = 0,
    ) -> Session:
        """Open the session that is asked for, for writing, and go on with its branch under the shots that are planned.

        encode: the embeddings of a prompt that the session names. Raises UserError as `kept_session.open_session` does.
        """
        planned = self.shots
        changes = [PromptChange(shot.start_chunk, PromptSpan(0, shot.prompt, shot.cut)) for shot in planned]
        session, self.branch = open_session(
            asked,
            settings,
            changes,
            num_chunks=self.num_chunks,
            num_given_chunks=num_given_chunks,
            camera=self.camera,
        )
        with ExitStack() as stack:
            stack.enter_context(session)
            self.snapshot_every = asked.snapshot_every
            self.shots = shots_of_branch(self.branch, self.num_saved, planned, encode)
            self.camera = camera_of_branch(self.branch, self.num_saved, self.camera)
            stack.pop_all()
        return session

    def session_chunks(self, session: Session, *, replay: bool) -> Generator[Chunk]:
        """What is missing, before it with `replay` what the session holds; it is closed where the iterator ends."""
        with session:
            if replay:
                yield from self.saved_chunks()
            yield from self.chunks()

    @property
    def num_saved(self) -> int:
        """Chunks of the rollout that the branch holds."""
        return 0 if self.branch is None else min(self.branch.num_chunks, self._end)

    def saved_chunks(self) -> Iterator[Chunk]:
        """What the branch holds, as it was made: latents from disk, pixels decoded from them once more.

        To be taken before `chunks`. Raises UserError for damaged files.
        """
        if self.branch is None or not self.num_saved:
            return
        decoder = self.state.decoder
        for index, values in enumerate(self.branch.chunks(0, self.num_saved)):
            latents = self.branch.latents(index)["latents"].to(self.state.memory.device)
            if decoder is not None and index and values["cut"] == "hard" and values["start_chunk"] == index:
                decoder.reset()
            frames = None if decoder is None else decoder.decode(latents).cpu()
            chunk = _saved_chunk(index, values, latents, frames)
            is_given = self.start is not None and chunk.first_frame < self.start.num_latent_frames
            yield self.start.shown(chunk) if is_given and self.start is not None else chunk
        if decoder is not None:
            decoder.reset()

    def restore(self, on_chunk: Callable[[int], None] | None = None) -> None:
        """Bring the state to after what the branch holds, if it is not there yet; see `vidaccel.rollout.resume`."""
        if self.branch is not None and self.state.num_chunks < self.num_saved:
            restore(
                self.student,
                self.state,
                self.branch,
                self.shots,
                num_chunks=self.num_saved,
                camera=self.camera,
                on_chunk=on_chunk,
            )

    def chunks(self) -> Generator[Chunk]:
        """What is missing, chunk after chunk, what the video begins with first.

        A chunk is saved and passed on when the next one is asked for, or this iterator is closed, at the latest: a
        process that is killed loses the chunk in work and at most the one before. Raises UserError for a full disk, a
        branch that somebody else has written to, and as `rollout` does; PlayerClosedError for a player that was closed.
        """
        self.restore()
        if self.branch is not None:
            self.state.archive.read_from(self.branch, is_written=True)
        with _Writer(self) as writer:
            for chunk in self._missing():
                writer.add(chunk)
                yield chunk

    def _missing(self) -> Iterator[Chunk]:
        student, state = self.student, self.state
        if self.start is not None and state.num_frames < self.start.num_latent_frames:
            self.start.say()
            given = ingest(student, state, self.shots[0], self.start.latents(), camera=self.camera)
            yield from map(self.start.shown, given)
        yield from rollout(student, state, self.shots, num_chunks=self._end, camera=self.camera)

    @property
    def _end(self) -> int:
        return ENDLESS if self.num_chunks is None else self.num_chunks

    def is_exact(self, num_chunks: int) -> bool:
        """Whether the state after so many chunks is kept in the branch."""
        every = self.snapshot_every
        if every is None:
            every = usual_snapshot_every(self.state)
        return every > 0 and (num_chunks % every == 0 or num_chunks == self.num_chunks)


def replay_segments(branch: Branch, num_chunks: int, report: RolloutReport, stream: Stream | None) -> None:
    """Pass the first chunks of a branch on as they were saved: their values to a report, their frames to a stream.

    Raises UserError for chunks that were saved without frames, where there is a stream, and for damaged files.
    """
    for index, values in enumerate(branch.chunks(0, num_chunks)):
        report.add_recorded(values)
        if stream is not None:
            segment = branch.segment(index)
            if segment is None:
                raise UserError(
                    f"Chunk {index} of branch {branch.name!r} was saved without its frames, by a rollout that decoded "
                    "none or made several videos; go on with it in Python."
                )
            stream.append(segment)


class _Waiting(NamedTuple):
    """A chunk that is being encoded, and the shot it was made in."""

    chunk: Chunk
    shot: Shot
    encoding: Future[bytes] | None


class _Writer:
    """Encodes a chunk beside the rollout, then saves it, then passes it on; in order, one behind."""

    def __init__(self, production: Production) -> None:
        self._production = production
        self._pool = ThreadPoolExecutor(1)
        self._waiting: _Waiting | None = None

    def __enter__(self) -> _Writer:
        return self

    def add(self, chunk: Chunk) -> None:
        """Take the chunk that the state is after; an exact state is saved at once, the next chunk will change it."""
        self._write()
        fps, encoding = self._production.fps, None
        if fps is not None and chunk.frames is not None and len(chunk.frames) == 1:
            encoding = self._pool.submit(encode_segment, chunk.frames[0], fps=fps)
        self._waiting = _Waiting(chunk, shot_at(self._production.shots, chunk.index), encoding)
        if self._production.branch is not None and self._production.is_exact(chunk.index + 1):
            self._write(is_exact=True)

    def _write(self, *, is_exact: bool = False) -> None:
        if self._waiting is None:
            return
        (chunk, shot, encoding), self._waiting = self._waiting, None
        segment = None if encoding is None else encoding.result()
        made = self._production
        if made.branch is not None:
            save_chunk(made.branch, chunk, shot, made.state, segment=segment, exact=is_exact, camera=made.camera)
        if made.stream is not None and segment is not None:
            made.stream.append(segment)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pool:
            if kind is None or issubclass(kind, KeyboardInterrupt | SystemExit | GeneratorExit):
                self._write()


def _saved_chunk(index: int, values: Mapping[str, Any], latents: Tensor, frames: Tensor | None) -> Chunk:
    """The chunk that `save_chunk` has written down."""
    sink, slow, fast = (tuple(values[part]) for part in ("sink", "slow", "fast"))
    return Chunk(
        index=index,
        first_frame=values["first_frame"],
        latents=latents,
        frames=frames,
        prompt=values["prompt"],
        seconds={},
        sink=sink,
        slow=slow,
        fast=fast,
        is_keyframe=values["is_keyframe"],
        similarity=values["similarity"],
        camera=values.get("camera"),
        origin="saved",
    )

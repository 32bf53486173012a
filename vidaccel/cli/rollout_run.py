"""Carrying out `vidaccel rollout`: chunks go to the video, and to the session if there is one, as they are finished.

A chunk is encoded while the next one is made. With a session the video is put together from the chunks on disk and the
new ones, so that it is the same to the byte however often the rollout was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vidaccel.cli.console import messages, say, say_warning
from vidaccel.cli.jobs import Job, unfinished
from vidaccel.cli.rollout_progress import ChunkCounter, chunk_bar
from vidaccel.cli.rollout_request import RolloutRequest
from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_write
from vidaccel.files.text import plain_values, write_json
from vidaccel.generation.generate import warn_about_words
from vidaccel.generation.loading import load_pipeline, resolve_device
from vidaccel.machine.environment import describe_environment
from vidaccel.models.taehv import StreamingTinyDecoder
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.decode import StreamingDecoder, encode_start
from vidaccel.rollout.loop import ingest, rollout, shot_at
from vidaccel.rollout.passes import speed_up
from vidaccel.rollout.plan import RolloutPlan
from vidaccel.rollout.report import RolloutReport
from vidaccel.rollout.resume import (
    check_prompts,
    past_shots,
    restore,
    save_chunk,
    shots_to_come,
    usual_snapshot_every,
)
from vidaccel.rollout.state import Decoder, RolloutState
from vidaccel.sessions.branch import Branch
from vidaccel.sessions.head import MAIN
from vidaccel.sessions.session import SESSION_FILE, Session
from vidaccel.video.streams import PLAYER, PlayerClosedError, PlayerStream, VideoStream, encode_segment, open_stream


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The session of a rollout.

    resume: go on in a session that there is. branch_from: first make `branch` of so many chunks of `from_branch`.
    snapshot_every: chunks between exact states, 0 for none; None: as many as their size suggests.
    """

    folder: Path
    resume: bool = False
    branch: str = MAIN
    branch_from: int | None = None
    from_branch: str = MAIN
    snapshot_every: int | None = None

    def __post_init__(self) -> None:
        if self.snapshot_every is not None and self.snapshot_every < 0:
            raise UserError(f"`snapshot_every` must be at least 0 chunks, got {self.snapshot_every}.")
        if self.branch_from is not None and self.branch == MAIN:
            raise UserError("`--branch-from` makes a new branch; name it with --branch.")
        if self.branch_from is None and self.from_branch != MAIN:
            raise UserError("`--from-branch` is the branch that a new one begins with; say how far: --branch-from N.")
        if self.branch != MAIN and self.branch_from is None and not self.resume:
            raise UserError(f"Branch {self.branch!r} goes on with --resume, or begins with --branch-from.")

    @property
    def is_new(self) -> bool:
        """Whether the session is to be started."""
        return not self.resume and self.branch_from is None

    def check(self) -> None:
        """Raise UserError where there is a session and should be none, or the other way round."""
        is_there = (self.folder / SESSION_FILE).exists()
        if self.is_new and is_there:
            raise UserError(f"{self.folder} is a session already; give --resume to go on, or another --checkpoint.")
        if not self.is_new and not is_there:
            raise UserError(f"There is no session in {self.folder}; leave out --resume and --branch-from to start one.")

    def open(self, settings: dict[str, Any]) -> Session:
        """The session for writing, with the branch made. Raises UserError for one of other settings and the like."""
        if self.is_new:
            return Session.create(self.folder, settings)
        with ExitStack() as stack:
            session = stack.enter_context(Session.open(self.folder, settings))
            is_made = self.branch in session.branches
            if self.branch_from is not None and is_made and not self.resume:
                raise UserError(f"{self.folder} has a branch {self.branch!r}; give --resume to go on, or another name.")
            if self.branch_from is not None and not is_made:
                session.new_branch(self.branch, self.from_branch, self.branch_from)
            stack.pop_all()
        return session


def run_rollout(
    request: RolloutRequest, *, output: Path | None, checkpoint: Checkpoint | None, report: bool, overwrite: bool
) -> None:
    """Make the video. output: the file; None is standard output, for a player."""
    job = None if output is None else _job(request, output, checkpoint, report=report)
    if job is not None and not unfinished([job], overwrite=overwrite):
        say(f"{job.video}: finished before, skipped")
        return
    for problem in request.timeline.problems(request.grid, num_chunks=request.num_chunks):
        say_warning(problem)
    model = None
    if checkpoint is not None:
        checkpoint.check()
    if checkpoint is None or checkpoint.is_new:  # a session is not begun by a model that cannot be loaded
        model = _load(request)
    try:
        with ExitStack() as stack:
            branch = None
            if checkpoint is not None:
                session = stack.enter_context(checkpoint.open(plain_values(request.settings())))
                branch = _branch(session, checkpoint.branch, request)
                stack.enter_context(_reporting_kept_chunks(branch, session.folder))
            snapshot_every = None if checkpoint is None else checkpoint.snapshot_every
            _Run(request, branch, job, snapshot_every=snapshot_every).run(model)
    except PlayerClosedError as closed:
        messages.print(str(closed), markup=False)


def _branch(session: Session, name: str, request: RolloutRequest) -> Branch:
    """The branch to go on with; one that was interrupted within what it was given to begin with begins again.

    Raises UserError where it was made with other prompts.
    """
    branch, count = session.branch(name), request.num_chunks
    check_prompts(branch, request.timeline.changes(request.grid, num_chunks=count), min(branch.num_chunks, count))
    return session.rewind(name, 0) if 0 < branch.num_chunks < request.grid.num_given_chunks else branch


@contextmanager
def _reporting_kept_chunks(branch: Branch, folder: Path) -> Iterator[None]:
    """Say how to go on where the rollout ends early: by Ctrl-C, SIGTERM, an error, a player that was closed."""
    before = branch.num_chunks
    try:
        yield
    except BaseException as error:
        is_stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        if branch.num_chunks > (0 if is_stopped else before):
            say_warning(f"{branch.num_chunks} chunks are kept in {folder}; go on with the same command and --resume.")
        raise


def _job(request: RolloutRequest, output: Path, checkpoint: Checkpoint | None, *, report: bool) -> Job:
    settings = {
        **request.settings(),
        "model": request.student.spec.name,
        "timeline": request.timeline.to_dict(),
        "num_chunks": request.num_chunks,
    }
    if checkpoint is not None and checkpoint.branch != MAIN:  # what it begins with may be of other prompts
        settings |= {"session": str(checkpoint.folder.resolve()), "branch": checkpoint.branch}
    return Job(request=request.request, video=output, settings=settings, report=report)


class _Run:
    """One rollout from its first new chunk to its files."""

    def __init__(
        self, request: RolloutRequest, branch: Branch | None, job: Job | None, *, snapshot_every: int | None
    ) -> None:
        self.request, self.branch, self.job = request, branch, job
        self.snapshot_every = snapshot_every
        self.done = 0 if branch is None else min(branch.num_chunks, request.num_chunks)
        branches = 2 if request.is_guided else 1
        self.report = RolloutReport(
            request.memory,
            request.grid,
            passes_per_chunk=branches * (request.request.num_inference_steps + 1),
            num_branches=branches,
            decoder=None if request.decoder is None else request.decoder.name,
        )

    def run(self, model: _Model | None = None) -> None:
        """Make what is missing, with the model if it is loaded already, and write the files."""
        request = self.request
        if self.done < request.num_chunks:
            pipe, plan = model or _load(request)
            if self.snapshot_every is None:
                self.snapshot_every = usual_snapshot_every(plan.state_bytes)
            student, state, shots = self._prepare(pipe)
        with open_stream(PLAYER if self.job is None else self.job.video, fps=request.fps) as stream:
            self._replay_saved(stream)
            if self.done < request.num_chunks:
                self._generate_missing(_chunks(pipe, request, student, state, shots), shots, state, stream)
            if self.job is not None:
                self.job.write_sidecar(self._sidecar())
        if self.job is not None:
            self._write_report(self.job)
            say(f"{self.job.video}: {self._summary()}")

    def _prepare(self, pipe: Any) -> tuple[Student, RolloutState, list[Shot]]:
        """The student, the state after the finished chunks, and all shots; then the text encoder is dropped."""
        request, settings = self.request, self.request.request
        student = pipe.student(settings.num_inference_steps, settings.guidance_scale)
        state = pipe.new_state(
            student,
            height=settings.height,
            width=settings.width,
            seeds=(settings.seed,),
            memory=request.memory,
            decoder=_decoder(pipe, request),
        )
        student = speed_up(student, state, request.passes)
        encoding = {
            "negative_prompt": settings.negative_prompt,
            "guided": student.num_branches > 1,
            "max_sequence_length": request.text_tokens,
        }
        prompts = [span.prompt for span in request.timeline.spans]
        warn_about_words(pipe, [*prompts, settings.negative_prompt or ""], request.text_tokens)
        planned = pipe.shots(request.timeline, num_chunks=request.num_chunks, grid=request.grid, **encoding)
        past: list[Shot] = []
        if self.branch is not None:
            past = past_shots(self.branch, self.done, lambda prompt: pipe.shots(prompt, **encoding)[0].embeddings)
        pipe.register_modules(text_encoder=None)
        if self.branch is not None and self.done:
            with messages.status("going back to the last chunk") as status:
                restore(
                    student,
                    state,
                    self.branch,
                    past,
                    num_chunks=self.done,
                    on_chunk=lambda chunk: status.update(f"going back to the last chunk: {chunk + 1} of {self.done}"),
                )
        return student, state, shots_to_come(past, planned, self.done)

    def _replay_saved(self, stream: VideoStream | PlayerStream) -> None:
        """The chunks of earlier processes: into the report, and into a file; a player gets what is new."""
        if self.branch is None:
            return
        for index, values in enumerate(self.branch.chunks(0, self.done)):
            self.report.add_recorded(values)
            if isinstance(stream, VideoStream):
                segment = self.branch.segment(index)
                if segment is None:
                    raise UserError(f"Chunk {index} of branch {self.branch.name!r} was saved without its frames.")
                stream.append(segment)

    def _generate_missing(
        self, chunks: Iterator[Chunk], shots: Sequence[Shot], state: RolloutState, stream: VideoStream | PlayerStream
    ) -> None:
        num_chunks = self.request.num_chunks
        title = "rollout" if self.job is None else self.job.video.stem[:40]
        counter = ChunkCounter(fps=self.request.fps, seconds=self.report.start_seconds()[-1])
        writer = _Writer(self.request.fps, self.branch, state, stream)
        with writer, chunk_bar(title, done=self.done, num_chunks=num_chunks) as show:
            for chunk in chunks:
                number = chunk.index + 1
                every = self.snapshot_every or 0
                is_exact = every > 0 and (number % every == 0 or number == num_chunks)
                writer.add(chunk, shot_at(shots, chunk.index), is_exact=is_exact)
                sizes = _memory_bytes(state)
                self.report.add(chunk, bytes_by_part=sizes)
                show(counter.add(chunk, sizes))

    def _sidecar(self) -> dict[str, Any]:
        assert self.job is not None
        values = self.report.to_dict()
        names = ("num_chunks", "num_pixel_frames", "num_keyframes", "num_passes", "pixel_frames_per_second", "seconds")
        spec = self.request.student.spec
        return {
            "settings": self.job.settings,
            "result": {name: values[name] for name in names} | {"memory_bytes": values["memory_bytes"]},
            "environment": describe_environment(
                device=resolve_device(self.request.device), weights=spec.weights, model=spec.name
            ),
        }

    def _write_report(self, job: Job) -> None:
        if not job.report:
            return
        write_json(job.report_json, self.report.to_dict())
        with atomic_write(job.report_picture) as unfinished:
            self.report.save_picture(unfinished)
        say(f"report: {job.report_json}, {job.report_picture}")

    def _summary(self) -> str:
        report, size = self.report, self.request.request
        seconds = report.start_seconds()[-1]
        rate = report.pixel_frames_per_second
        new = report.num_chunks - self.done
        made = "" if rate is None else f", {rate:.1f} frames a second"
        before = f", {self.done} of them before" if self.done else ""
        return (
            f"{seconds:.2f} s, {report.num_pixel_frames} frames of {size.width}x{size.height}, "
            f"{report.num_chunks} chunks{before}, keyframes: {report.num_keyframes}"
            + (f", {report.num_passes} forwards{made}" if new else "")
        )


class _Writer:
    """Encodes a chunk beside the rollout, then saves it, then passes it on; in order, one behind."""

    def __init__(
        self, fps: float, branch: Branch | None, state: RolloutState, stream: VideoStream | PlayerStream
    ) -> None:
        self.fps, self.branch, self.state, self.stream = fps, branch, state, stream
        self._pool = ThreadPoolExecutor(1)
        self._waiting: tuple[Chunk, Shot, Future[bytes]] | None = None

    def __enter__(self) -> _Writer:
        return self

    def add(self, chunk: Chunk, shot: Shot, *, is_exact: bool) -> None:
        """Take the chunk that the state is after. is_exact: save the state, which the next chunk will change."""
        self._write()
        assert chunk.frames is not None
        self._waiting = (chunk, shot, self._pool.submit(encode_segment, chunk.frames[0], fps=self.fps))
        if is_exact and self.branch is not None:
            self._write(is_exact=True)

    def _write(self, *, is_exact: bool = False) -> None:
        if self._waiting is None:
            return
        (chunk, shot, encoding), self._waiting = self._waiting, None
        segment = encoding.result()
        if self.branch is not None:
            save_chunk(self.branch, chunk, shot, self.state, segment=segment, exact=is_exact)
        self.stream.append(segment)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pool:
            if kind is None or issubclass(kind, KeyboardInterrupt | SystemExit):
                self._write()


class _Model(NamedTuple):
    """The pipeline, and what was planned for it."""

    pipe: Any
    plan: RolloutPlan


def _load(request: RolloutRequest) -> _Model:
    plan = request.plan()
    plan.check()
    with messages.status("loading the model"):
        pipe = load_pipeline(
            request.student.spec.name, device=request.device, dtype=request.dtype, attention=request.attention
        )
    return _Model(pipe, plan)


def _decoder(pipe: Any, request: RolloutRequest) -> Decoder:
    if request.decoder is None:
        return StreamingDecoder(pipe.vae)
    return StreamingTinyDecoder(request.decoder.model.to(pipe.transformer.device, pipe.transformer.dtype))


def _chunks(
    pipe: Any, request: RolloutRequest, student: Student, state: RolloutState, shots: Sequence[Shot]
) -> Iterator[Chunk]:
    """The chunks that are missing, those that the video begins with first."""
    if request.start is not None and not state.num_chunks:
        yield from ingest(student, state, shots[0], encode_start(pipe.vae, request.start))
    yield from rollout(student, state, shots, num_chunks=request.num_chunks)


def _memory_bytes(state: RolloutState) -> dict[str, int]:
    parts = [memory.bytes_by_part() for memory in state.memories]
    return {name: sum(part[name] for part in parts) for name in parts[0]}

"""Carrying out `vidaccel rollout`: chunks go to the video, and to the session if there is one, as they are finished.

A chunk is encoded while the next one is made. With a session the video is put together from the chunks on disk and the
new ones, so that it is the same to the byte however often the rollout was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from vidaccel.cli.console import messages, say, say_warning
from vidaccel.cli.jobs import Job, unfinished
from vidaccel.cli.rollout_progress import ChunkCounter, chunk_bar
from vidaccel.cli.rollout_request import RolloutRequest
from vidaccel.files.atomic import atomic_write
from vidaccel.files.text import write_json
from vidaccel.generation.adapters import merge_loras
from vidaccel.generation.generate import warn_about_words
from vidaccel.generation.loading import load_pipeline, resolve_device
from vidaccel.machine.environment import describe_environment
from vidaccel.models.taehv import StreamingTinyDecoder
from vidaccel.rollout.branch_camera import camera_of_branch
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.kept_session import check_session, open_session
from vidaccel.rollout.passes import speed_up
from vidaccel.rollout.production import Production, replay_segments
from vidaccel.rollout.report import RolloutReport
from vidaccel.rollout.resume import shots_of_branch
from vidaccel.rollout.session_request import SessionRequest
from vidaccel.rollout.start import Start
from vidaccel.rollout.state import Decoder, RolloutState
from vidaccel.sessions import MAIN
from vidaccel.sessions.branch import Branch
from vidaccel.video.paths import PLAYER
from vidaccel.video.streams import PlayerClosedError, PlayerStream, VideoStream, open_stream


def run_rollout(
    request: RolloutRequest, *, output: Path | None, asked: SessionRequest | None, report: bool, overwrite: bool
) -> None:
    """Make the video. output: the file; None is standard output, for a player."""
    job = None if output is None else _job(request, output, asked, report=report)
    if job is not None and not unfinished([job], overwrite=overwrite):
        say(f"{job.video}: finished before, skipped")
        return
    for problem in request.timeline.problems(request.grid, num_chunks=request.num_chunks):
        say_warning(problem)
    pipe = None
    if asked is not None:
        check_session(asked)
    if asked is None or asked.is_new:  # a session is not begun by a model that cannot be loaded
        pipe = _load(request)
    try:
        with ExitStack() as stack:
            branch = None
            if asked is not None:
                session, branch = open_session(
                    asked,
                    request.settings(),
                    request.timeline.changes(request.grid, num_chunks=request.num_chunks),
                    num_chunks=request.num_chunks,
                    num_given_chunks=request.grid.num_given_chunks,
                    camera=request.camera,
                )
                stack.enter_context(session)
                stack.enter_context(_reporting_kept_chunks(branch, session.folder))
            snapshot_every = None if asked is None else asked.snapshot_every
            _RolloutCommand(request, branch, job, snapshot_every=snapshot_every).run(pipe)
    except PlayerClosedError as closed:
        messages.print(str(closed), markup=False)


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


def _job(request: RolloutRequest, output: Path, asked: SessionRequest | None, *, report: bool) -> Job:
    settings = {
        **request.settings().to_dict(),
        "model": request.student.spec.name,
        "timeline": request.timeline.to_dict(),
        "num_chunks": request.num_chunks,
    }
    if asked is not None and asked.branch != MAIN:  # what it begins with may be of other prompts
        settings |= {"session": str(asked.folder.resolve()), "branch": asked.branch}
    return Job(request=request.request, video=output, settings=settings, report=report)


class _RolloutCommand:
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

    def run(self, pipe: Any = None) -> None:
        """Make what is missing, with the pipeline if it is loaded already, and write the files."""
        production = None
        if self.done < self.request.num_chunks:
            production = self._prepare(_load(self.request) if pipe is None else pipe)
        with open_stream(PLAYER if self.job is None else self.job.video, fps=self.request.fps) as stream:
            if self.branch is not None:  # a player gets what is new
                replay_segments(
                    self.branch, self.done, self.report, stream if isinstance(stream, VideoStream) else None
                )
            if production is not None:
                self._generate_missing(production, stream)
            if self.job is not None:
                self.job.write_sidecar(self._sidecar())
        if self.job is not None:
            self._write_report(self.job)
            say(f"{self.job.video}: {self._summary()}")

    def _prepare(self, pipe: Any) -> Production:
        """The rollout after its finished chunks, with all prompts encoded; then the text encoder is dropped."""
        request, settings = self.request, self.request.request
        student = pipe.student(settings.num_inference_steps, settings.guidance_scale, skip_steps=request.skipping)
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
        shots = shots_of_branch(
            self.branch, self.done, planned, lambda prompt: pipe.shots(prompt, **encoding)[0].embeddings
        )
        start = request.start
        production = Production(
            student=student,
            state=state,
            shots=shots,
            num_chunks=request.num_chunks,
            camera=camera_of_branch(self.branch, self.done, request.camera),
            start=None if start is None else Start.of(pipe.vae, start, is_decoded=request.decode_start),
            branch=self.branch,
            snapshot_every=self.snapshot_every,
            fps=request.fps,
        )
        pipe.register_modules(text_encoder=None)
        with messages.status("going back to the last chunk") as status:
            production.restore(lambda chunk: status.update(f"going back to the last chunk: {chunk + 1} of {self.done}"))
        return production

    def _generate_missing(self, production: Production, stream: VideoStream | PlayerStream) -> None:
        production.stream = stream
        title = "rollout" if self.job is None else self.job.video.stem[:40]
        counter = ChunkCounter(fps=self.request.fps, seconds=self.report.start_seconds()[-1])
        with (
            closing(production.chunks()) as chunks,
            chunk_bar(title, done=self.done, num_chunks=self.request.num_chunks) as show,
        ):
            for chunk in chunks:
                sizes = _memory_bytes(production.state)
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


def _load(request: RolloutRequest) -> Any:
    request.plan().check()
    with messages.status("loading the model"):
        pipe = load_pipeline(
            request.student.spec.name,
            device=request.device,
            dtype=request.dtype,
            attention=request.attention,
            loras=request.loras,
        )
        if request.loras and request.passes != "eager":
            merge_loras(pipe)  # layers that are joined with others have weights alone
        return pipe


def _decoder(pipe: Any, request: RolloutRequest) -> Decoder:
    if request.decoder is None:
        return StreamingDecoder(pipe.vae)
    return StreamingTinyDecoder(request.decoder.model.to(pipe.transformer.device, pipe.transformer.dtype))


def _memory_bytes(state: RolloutState) -> dict[str, int]:
    parts = [memory.bytes_by_part() for memory in state.memories]
    return {name: sum(part[name] for part in parts) for name in parts[0]}

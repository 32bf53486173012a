"""One visitor's rollout: shown while it is made, given new prompts, stopped, and gone on with from an earlier second.

All that is a visitor's own is in a `LiveRollout`, its chunks in a session in a private folder. The model belongs to all
of them (`Studio`), who take turns at it chunk by chunk. The page is `rollout_tab`; nothing here knows one.
"""

from __future__ import annotations

import io
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from inputs import MOST_SEED, checked_camera, checked_count, checked_number, checked_prompt
from PIL import Image
from torch import Tensor

from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.errors import UserError
from vidaccel.generation.generate import unknown_words
from vidaccel.memory import MemoryConfig, MemoryPolicy
from vidaccel.rollout.branch_camera import camera_of_branch
from vidaccel.rollout.camera import PlacedPath, check_takes_camera
from vidaccel.rollout.chunk import Chunk, Shot
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.rollout.production import Production, replay_segments
from vidaccel.rollout.report import RolloutReport
from vidaccel.rollout.resume import shots_of_branch
from vidaccel.sessions import MAIN
from vidaccel.sessions.branch import Branch
from vidaccel.sessions.session import Session
from vidaccel.video.streams import VideoStream

MOST_SECONDS = 120
_SNAPSHOT_EVERY = 10  # chunks: a branch passes at most so many again


@dataclass(frozen=True)
class Studio:
    """What all visitors share.

    pipe: a `ContextForcingWanPipeline`. folder: where each visitor gets a private folder.
    turn: held by the visitor whose chunk is being made.
    """

    pipe: Any
    defaults: GenerationDefaults
    folder: Path
    turn: threading.Lock = field(default_factory=threading.Lock)

    def memories(self) -> dict[str, MemoryPolicy]:
        """The memories to choose from by what they are called; all of one size, first the student's own."""
        own = self.pipe.memory_config()
        sink = own.part_frames.get("sink", 0)
        others = (
            MemoryConfig.sink_and_window(sink, own.total_frames - sink, own.chunk_frames),
            MemoryConfig.sliding_window(own.total_frames, own.chunk_frames),
        )
        return {_name(memory): memory for memory in (own, *others)} | {_name(own): own}

    @property
    def grid(self) -> ChunkGrid:
        """Where chunks lie in time."""
        return self.pipe.grid(fps=self.defaults.fps)

    @property
    def takes_camera(self) -> bool:
        """Whether the student is told where its camera is."""
        return bool(self.pipe.transformer.takes_camera)

    def camera(self, text: object) -> PlacedPath | None:
        """The moves of a text on this grid; None for a student that is not told. Raises UserError for another text."""
        path = checked_camera(text)
        check_takes_camera(path, takes_camera=self.takes_camera, student="this student")
        return path.on(self.grid) if self.takes_camera else None

    def shot(self, prompt: str) -> Shot:
        """A prompt, encoded, as the shot from chunk 0 on. To be called in turn: tokenizers are of one thread."""
        guided = self.pipe.student().num_branches > 1
        return self.pipe.shots(prompt, guided=guided)[0]


@dataclass(frozen=True, kw_only=True)
class View:
    """What there is to see of a rollout.

    moving: its newest chunk as an animated WebP, which plays once; nothing before the first and after the last.
    video, picture: of the whole rollout, when it has ended.
    """

    line: str
    moving: bytes = b""
    video: Path | None = None
    picture: Path | None = None


@dataclass
class _Kept:
    """The rollout that a visitor made last. branch: of its session, the one that is shown."""

    folder: tempfile.TemporaryDirectory[str]
    session: Session
    seed: int
    memory: MemoryPolicy
    branch: str = MAIN

    @property
    def path(self) -> Path:
        return Path(self.folder.name)


class _Asked(NamedTuple):
    """What a visitor asks for: the first prompt, the length of the whole video, the camera."""

    prompt: str
    num_chunks: int
    camera: PlacedPath | None


@dataclass(kw_only=True)
class _Show:
    """The running values between the start and the end of making chunks. unknown: words that the model cannot read."""

    production: Production
    shots: list[Shot]
    report: RolloutReport
    num_chunks: int
    unknown: tuple[str, ...] = ()


class LiveRollout:
    """The rollout of one visitor. `change_prompt`, `stop` and `leave` may be called while it runs, from any thread."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._prompts: SimpleQueue[str] = SimpleQueue()
        self._has_left = False
        self._kept: _Kept | None = None

    def start(
        self, prompt: object, *, seconds: object, seed: object, memory: object, camera: object = ""
    ) -> Iterator[View]:
        """Make a new video in place of the one before; a view when it begins, of every chunk, and at the end.

        camera: how it moves, as text; nothing for a student that is not told.

        Raises UserError for values out of range, and in the first view where a rollout is running.
        """
        memories = self._studio.memories()
        if not isinstance(memory, str) or memory not in memories:
            raise UserError(f"The memory must be one of: {'; '.join(memories)}.")
        number = checked_count("The seed", seed, least=0, most=MOST_SEED)
        asked = _Asked(checked_prompt(prompt), self._num_chunks(seconds), self._studio.camera(camera))
        return self._started(asked, number, memories[memory])

    def branch_from(self, prompt: object, *, second: object, seconds: object, camera: object = "") -> Iterator[View]:
        """Go on from an earlier second (its next chunk) to a video of `seconds` in all; views as of `start`.

        What was made after that second stays on disk until the next start, but is no longer shown. The camera goes on
        from where it was there.
        Raises UserError for values out of range, and in the first view where there is nothing to branch from.
        """
        at = self._studio.grid.chunk_from(checked_number("The second", second, least=0, most=MOST_SECONDS))
        asked = _Asked(checked_prompt(prompt), self._num_chunks(seconds), self._studio.camera(camera))
        return self._branched(asked, at)

    def change_prompt(self, prompt: object) -> str:
        """Show something else from the next chunk on; what to tell. Raises UserError if nothing is running."""
        text = checked_prompt(prompt)
        self._check_running()
        self._prompts.put(text)
        return "The new prompt begins with the next chunk."

    def stop(self) -> str:
        """End after the present chunk; what to tell. Raises UserError if nothing is running."""
        self._check_running()
        self._stop.set()
        return "The rollout ends after the present chunk."

    def leave(self) -> None:
        """End, and remove the files: at once, or after the present chunk. There is no way back."""
        self._has_left = True
        self._stop.set()
        if self._busy.acquire(blocking=False):
            try:
                self._forget()
            finally:
                self._busy.release()

    def _check_running(self) -> None:
        if not self._busy.locked():
            raise UserError("No rollout is running; start one, or branch from the last one.")

    def _num_chunks(self, seconds: object) -> int:
        least = 1 / self._studio.defaults.fps
        return self._studio.grid.num_chunks(checked_number("The length", seconds, least=least, most=MOST_SECONDS))

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise UserError("A rollout is running; stop it first.")
        try:
            self._stop.clear()
            self._prompts = SimpleQueue()
            if self._has_left:
                raise UserError("This visit has ended; load the page again.")
            yield
        finally:
            self._busy.release()
            if self._has_left:
                self.leave()

    def _started(self, asked: _Asked, seed: int, memory: MemoryPolicy) -> Iterator[View]:
        with self._at_work():
            yield View(line="Starting.")
            self._forget()
            folder = tempfile.TemporaryDirectory(dir=self._studio.folder)
            settings = {"seed": seed, "memory": memory.to_dict(), "fps": self._studio.defaults.fps}
            session = Session.create(Path(folder.name, "session"), settings, snapshot_every=_SNAPSHOT_EVERY)
            self._kept = _Kept(folder, session, seed, memory)
            yield from self._make(self._kept, session.branch(MAIN), asked)

    def _branched(self, asked: _Asked, at: int) -> Iterator[View]:
        with self._at_work():
            kept, grid = self._kept, self._studio.grid
            if kept is None:
                raise UserError("There is no rollout to branch from; start one.")
            last = kept.session.branch(kept.branch)
            if at > last.num_chunks:
                end = grid.start_seconds(last.num_chunks)
                raise UserError(f"The video ends at {end:g} s; branch from there or before.")
            if asked.num_chunks <= at:
                raise UserError(
                    f"The branch begins at {grid.start_seconds(at):g} s; the length must be more than that."
                )
            yield View(line=f"Going back to {grid.start_seconds(at):g} s.")
            branch = kept.session.new_branch(f"branch-{len(kept.session.branches)}", kept.branch, at)
            yield from self._make(kept, branch, asked)

    def _forget(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.session.close()
            kept.folder.cleanup()

    def _make(self, kept: _Kept, branch: Branch, asked: _Asked) -> Iterator[View]:
        """What is missing of a branch, chunk after chunk, no faster than it can be watched."""
        fps = self._studio.defaults.fps
        with self._studio.turn:
            run = self._prepare(kept, branch, asked)
        shown_until = 0.0
        with VideoStream(kept.path / f"{branch.name}.mp4", fps=fps) as stream:
            replay_segments(branch, branch.num_chunks, run.report, stream)
            run.production.stream = stream
            with closing(self._chunks(run)) as chunks:
                for chunk in chunks:
                    assert chunk.frames is not None
                    kept.branch = branch.name
                    run.report.add(chunk)
                    self._stop.wait(max(0.0, shown_until - time.monotonic()))
                    shown_until = time.monotonic() + chunk.frames.shape[1] / fps
                    yield View(line=self._line(run, chunk), moving=animated(chunk.frames[0], fps=fps))
        with self._studio.turn:  # drawing is of one thread too
            picture = run.report.save_picture(kept.path / f"{branch.name}.png")
        end = "Stopped" if run.report.num_chunks < asked.num_chunks else "Done"
        yield View(line=f"{end}: {self._line(run, chunk)}", video=stream.path, picture=picture)

    def _prepare(self, kept: _Kept, branch: Branch, asked: _Asked) -> _Show:
        """The student, and the state after the chunks that the branch has."""
        studio, pipe, defaults = self._studio, self._studio.pipe, self._studio.defaults
        student = pipe.student()
        state = pipe.new_state(
            student,
            height=defaults.height,
            width=defaults.width,
            seeds=(kept.seed,),
            memory=kept.memory,
            decoder=StreamingDecoder(pipe.vae),
        )
        shots = shots_of_branch(
            branch, branch.num_chunks, [studio.shot(asked.prompt)], lambda text: studio.shot(text).embeddings
        )
        production = Production(
            student=student,
            state=state,
            shots=shots,
            num_chunks=asked.num_chunks,
            camera=camera_of_branch(branch, branch.num_chunks, asked.camera),
            branch=branch,
            snapshot_every=_SNAPSHOT_EVERY,
            fps=defaults.fps,
        )
        production.restore()
        report = RolloutReport(
            kept.memory, studio.grid, passes_per_chunk=student.passes_per_chunk, num_branches=student.num_branches
        )
        return _Show(
            production=production,
            shots=shots,
            report=report,
            num_chunks=asked.num_chunks,
            unknown=unknown_words(pipe, asked.prompt),
        )

    def _chunks(self, run: _Show) -> Generator[Chunk]:
        """At least one chunk, then until all are made or the visitor stops."""
        with closing(run.production.chunks()) as made:
            while run.production.state.num_chunks < run.num_chunks:
                with self._studio.turn:
                    self._take_prompt(run)
                    chunk = next(made)
                yield chunk
                if self._stop.is_set():
                    return

    def _take_prompt(self, run: _Show) -> None:
        """Begin a shot with the next chunk if the visitor has asked for another prompt; the last one counts."""
        wanted = run.shots[-1].prompt
        with suppress(Empty):
            while True:
                wanted = self._prompts.get_nowait()
        if wanted == run.shots[-1].prompt:
            return
        run.unknown = unknown_words(self._studio.pipe, wanted)
        if run.shots[-1].start_chunk == run.production.state.num_chunks:
            run.shots.pop()
        run.shots.append(replace(self._studio.shot(wanted), start_chunk=run.production.state.num_chunks))

    def _line(self, run: _Show, chunk: Chunk) -> str:
        seconds, rate = run.report.start_seconds()[-1], run.report.pixel_frames_per_second
        parts = [
            f"{seconds:.1f} of {self._studio.grid.start_seconds(run.num_chunks):.1f} s",
            f"{'-' if rate is None else f'{rate:.1f}'} frames a second",
            f"frames in memory: sink {len(chunk.sink)}, slow {len(chunk.slow)}, fast {len(chunk.fast)}",
        ]
        if run.unknown:
            parts.append(f"the model does not know: {', '.join(run.unknown)}")
        return " | ".join(parts)


def animated(frames: Tensor, *, fps: float) -> bytes:
    """Frames (f, 3, H, W) uint8 as an animated WebP that plays once and stays at its last frame."""
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    ends = [round(1000 * number / fps) for number in range(len(images) + 1)]
    duration = [max(1, end - start) for start, end in pairwise(ends)]
    with io.BytesIO() as file:
        images[0].save(file, "WEBP", save_all=True, append_images=images[1:], duration=duration, loop=1, quality=90)
        return file.getvalue()


def _name(memory: MemoryPolicy) -> str:
    """What a memory is called: its parts that hold anything."""
    words = {"sink": "the first", "slow": "keyframes:", "fast": "the last"}
    return ", ".join(f"{words[part]} {size}" for part, size in memory.part_frames.items() if size)

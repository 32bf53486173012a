"""Does a rollout of minutes stay as small and as fast, and is a place the same that was left in its first seconds?

The camera of a student's own video sees a place, comes home, and goes to the other side and back as often as the length
allows; at last it goes to the first place again. The rollout is kept in a session, whose disk holds every latent, and
what a process takes is asked after every chunk. An oracle reads the landmark of both visits.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from vidaccel.bench.endless.tables import CHUNK_SECONDS, endless_markdown, save_endless_plot, summarise_endless
from vidaccel.bench.recall.pictures import strip_of
from vidaccel.bench.recall.recall import check_can_be_measured
from vidaccel.bench.recall.trips import CHUNK_FRAMES
from vidaccel.bench.recall.visits import Visits, read_visits
from vidaccel.bench.shared.benchmark import BenchProgress, ModelBenchmark, Tell, changed, option
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.errors import UserError, check_amount, check_count
from vidaccel.memory import MemoryConfig, MemoryPolicy, parse_memory
from vidaccel.rollout.camera import CameraPath
from vidaccel.rollout.report import RolloutReport
from vidaccel.world.trip import frame_of

FPS = 16
HOLD_CHUNKS, MOVE_CHUNKS = 2, 1
FIRST_VISIT = range(HOLD_CHUNKS + MOVE_CHUNKS, 2 * HOLD_CHUNKS + MOVE_CHUNKS)
_TOLD_EVERY = 40  # chunks
MEMORIES = ("window:21", "slow-fast:3+12x3+6", "view-retrieval:3+12x3+6", "view-retrieval:3+3x3+6")


@dataclass(frozen=True, kw_only=True)
class EndlessBench(ModelBenchmark):
    """Finished memories are not measured again, and others may be added later."""

    name = "endless"

    model: str = changed(ModelBenchmark, "model", EMBEDDED_STUDENT)
    memories: tuple[str, ...] = option(
        "As --memory takes them; thresholds are the student's.", MEMORIES, recorded=False
    )
    seconds: float = option("Length of the video.", 600.0)
    num_videos: int = option("Videos that are made together, of seeds 0, 1, ...", 4)
    prompt: str = option("What the video shows.", "a red ball hops up and down on a grassy meadow")

    def __post_init__(self) -> None:
        check_amount("seconds", self.seconds)
        check_count("num_videos", self.num_videos, minimum=1)
        if not self.memories or len(set(self.memories)) < len(self.memories):
            raise UserError(f"`memories` must name different memories, got {', '.join(self.memories) or 'none'}.")
        if self.num_detours < 1:
            least = len(way_of(1)) * CHUNK_SECONDS
            raise UserError(
                f"`seconds` must be at least {least:g}, which one way there and back takes; got {self.seconds:g}."
            )
        for text in self.memories:
            longest = _policy(text, None).max_frames
            if longest is not None and longest < CHUNK_FRAMES * self.num_chunks:
                raise UserError(
                    f"The memory {text} is for {longest} latent frames, and the video has "
                    f"{CHUNK_FRAMES * self.num_chunks}; take another, or fewer `seconds`."
                )

    @property
    def num_detours(self) -> int:
        """How often the camera goes to the other side in between."""
        round_trip = len(way_of(2)) - len(way_of(1))
        return (int(self.seconds / CHUNK_SECONDS) - len(way_of(0))) // round_trip

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole video."""
        return len(way_of(self.num_detours))

    def run(self, *, pipe: Any = None, on_progress: Tell = None) -> dict[str, Any]:
        pipe = self.loaded_student(pipe)
        check_can_be_measured(pipe)
        settled = {"num_chunks": self.num_chunks, "num_detours": self.num_detours}
        results = self.results(self.student_protocol(pipe, **settled), self.environment(pipe))
        tell = on_progress or (lambda progress: None)
        for place, text in enumerate(self.memories):
            if results.find(memory=text) is None:
                begin = BenchProgress(
                    done=place * self.num_chunks, total=len(self.memories) * self.num_chunks, label=text
                )
                results.add({"memory": text, **self._measured(pipe, _policy(text, pipe), tell, begin)})
        summary = results.finish(summarise_endless(results.records))
        self.write_table(endless_markdown(results.content))
        save_endless_plot(self.path("png"), results.content)
        return summary

    @torch.no_grad()
    def _measured(
        self, pipe: Any, memory: MemoryPolicy, tell: Callable[[BenchProgress], None], begin: BenchProgress
    ) -> dict[str, Any]:
        student = pipe.student()
        report = RolloutReport(memory, pipe.grid(fps=FPS), passes_per_chunk=student.passes_per_chunk)
        process, taken, times = psutil.Process(), [], []
        visits: dict[int, Tensor] = {}
        with tempfile.TemporaryDirectory() as folder:
            chunks = pipe.stream(
                self.prompt,
                num_chunks=self.num_chunks,
                camera=path_of(way_of(self.num_detours)),
                memory=memory,
                seeds=tuple(range(self.num_videos)),
                fps=FPS,
                decode=False,
                session=Path(folder) / "session",
            )
            began = time.perf_counter()
            for chunk in chunks:
                if chunk.index % _TOLD_EVERY == 0:
                    tell(replace(begin, done=begin.done + chunk.index))
                now = time.perf_counter()
                times.append(round(now - began, 5))
                taken.append(process.memory_info().rss)
                began = now
                report.add(chunk)
                if chunk.index in FIRST_VISIT or chunk.index >= self.num_chunks - len(FIRST_VISIT):
                    visits[chunk.index] = chunk.latents
                slow = chunk.slow
            on_disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        first, second = (_read(pipe, [visits[number] for number in numbers]) for numbers in self._visits)
        remembered = range(CHUNK_FRAMES * FIRST_VISIT.start, CHUNK_FRAMES * FIRST_VISIT.stop)
        return {
            "attended_frames": memory.total_frames,
            "videos": [{"first": a, "second": b} for a, b in zip(first.readings, second.readings, strict=True)],
            "strips": {"first": strip_of(first.stills), "second": strip_of(second.stills)},
            "in_reach": len(set(remembered) & set(slow)),
            "num_returns": len(report.returns()),
            "process_bytes": taken,
            "chunk_seconds": times,
            "disk_bytes": on_disk,
        }

    @property
    def _visits(self) -> tuple[Sequence[int], Sequence[int]]:
        return FIRST_VISIT, range(self.num_chunks - len(FIRST_VISIT), self.num_chunks)


def way_of(num_detours: int) -> list[int]:
    """Where the camera is at the end of every chunk, in screens."""
    stops = [0, 1, *[0, -1] * num_detours, 0, 1]
    way = [stops[0]] * HOLD_CHUNKS
    for stop in stops[1:]:
        way += [stop] * (MOVE_CHUNKS + HOLD_CHUNKS)
    return way


def path_of(way: Sequence[int]) -> CameraPath:
    """The camera that is at the places of `way` after each chunk."""
    moves = []
    for chunk, (before, here) in enumerate(pairwise(way), 1):
        if here != before:
            start, end = (max(frame_of(number), 0) / FPS for number in (chunk, chunk + MOVE_CHUNKS))
            moves.append(f"{start}-{end} {'right' if here > before else 'left'} {abs(here - before)}")
    return CameraPath.parse(", ".join(moves))


def _policy(text: str, pipe: Any) -> MemoryPolicy:
    """The memory, with the threshold of the student of `pipe`. Raises UserError for what is none."""
    try:
        policy = parse_memory(text, CHUNK_FRAMES)
    except ValueError as error:
        raise UserError(str(error)) from error
    own = None if pipe is None else pipe.memory_config()
    if not isinstance(own, MemoryConfig) or not isinstance(policy, MemoryConfig) or "@" in text:
        return policy
    return replace(policy, similarity_threshold=own.similarity_threshold)


def _read(pipe: Any, latents: Sequence[Tensor]) -> Visits:
    parts = torch.cat(list(latents), dim=2)
    return read_visits(pipe.vae, parts, [0.0] * len(parts), batch=8)

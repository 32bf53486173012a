"""The live line of a rollout: chunks, seconds of video, pixel frames per second, the memory and its keyframes."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vidaccel.cli.console import messages
from vidaccel.machine.footprint import gigabytes
from vidaccel.rollout.chunk import Chunk

_RECENT = 16  # chunks whose speed is shown


class ChunkCounter:
    """What the line says, from finished chunks.

    seconds: of video finished before, by an earlier process. fps: pixel frames a second of the video.
    """

    def __init__(self, *, fps: float, seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.fps, self.seconds = fps, seconds
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT + 1)  # when a chunk was finished, its frames

    def add(self, chunk: Chunk, bytes_by_part: Mapping[str, int]) -> str:
        """Take one finished chunk; the text for the line."""
        frames = 0 if chunk.frames is None else chunk.frames.shape[1]
        self.seconds += frames / self.fps
        self._recent.append((self._clock(), frames))
        parts = [f"{part} {gigabytes(bytes_by_part[part])}" for part in ("sink", "slow", "fast") if bytes_by_part[part]]
        memory = ", ".join(parts) or "empty"
        rate = "" if self.rate is None else f"{self.rate:.1f} frames/s | "
        return f"{self.seconds:.1f} s of video | {rate}memory: {memory} | {len(chunk.slow)} keyframes"

    @property
    def rate(self) -> float | None:
        """Pixel frames per second of work over the last chunks; None before the second."""
        if len(self._recent) < 2:
            return None
        passed = self._recent[-1][0] - self._recent[0][0]
        frames = sum(frames for _, frames in list(self._recent)[1:])
        return frames / passed if passed > 0 else None


@contextmanager
def chunk_bar(title: str, *, done: int, num_chunks: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; called with a text for every finished chunk."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task(title, total=num_chunks, completed=done, text="starting")
        yield lambda text: progress.update(task, advance=1, text=text)

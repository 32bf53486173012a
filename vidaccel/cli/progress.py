"""The live line of a running generation: steps computed and reused, time saved, time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vidaccel.cli.console import messages
from vidaccel.generation.recorder import StepProgress


class StepCounter:
    """Counts of one run, from its finished steps.

    seconds_saved: what the reused steps would have taken at the median time of a computed one, less what they took.
    """

    def __init__(self) -> None:
        self.computed: list[float] = []
        self.reused: list[float] = []
        self._last = 0.0

    def add(self, step: StepProgress) -> None:
        """Take one finished step."""
        (self.computed if step.computed else self.reused).append(step.seconds - self._last)
        self._last = step.seconds

    @property
    def seconds_saved(self) -> float:
        return sum(median(self.computed) - seconds for seconds in self.reused) if self.computed else 0.0

    def text(self) -> str:
        """For the progress line."""
        saved = f", {self.seconds_saved:.1f} s saved" if self.reused else ""
        return f"{len(self.computed)} computed, {len(self.reused)} reused{saved}"


@contextmanager
def step_bar(title: str) -> Iterator[Callable[[StepProgress], None]]:
    """A progress bar on stderr that is fed with finished steps."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    counter = StepCounter()
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task(title, total=None, counts="starting")

        def advance(step: StepProgress) -> None:
            counter.add(step)
            finished = step.step_index + 1
            counts = counter.text() + (", decoding" if finished == step.num_steps else "")
            progress.update(task, total=step.num_steps, completed=finished, counts=counts)

        yield advance

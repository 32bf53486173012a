"""Does a causal student do what it is told, and is what it makes sharp? Read by the oracles on prompts it never saw.

Soft changes of the prompt, places seen for the first time, a minute with one prompt, and prompts a little unusual; by
the path that users run, with the student's own steps, guidance and memory. Everything is decoded by the streaming
decoder, of long videos only the parts that are read, from three latent frames before each on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.benchmark import BenchProgress, ModelBenchmark, Tell, changed, option
from vidaccel.bench.shared.records import ResultFile
from vidaccel.bench.student.changes import measure_changes
from vidaccel.bench.student.rollouts import Filming, Sampler
from vidaccel.bench.student.scenes import SETTINGS, measure_scenes
from vidaccel.bench.student.sheet import Measured, save_rows, save_sheet
from vidaccel.bench.student.subjects import WINDOW_SECONDS, measure_subjects
from vidaccel.bench.student.summary import summarise_student
from vidaccel.bench.student.tables import save_student_plot, student_markdown
from vidaccel.bench.student.visits import BEGINNINGS, TRUTH, measure_visits
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.errors import UserError
from vidaccel.world import CHANGES

GIVEN = "given"  # changes of the world's own video: does the student know, or did it draw what cannot be kept?
USUAL_PARTS = ("changes", "visits", "subjects", "scenes")
PARTS = (*USUAL_PARTS, GIVEN)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One record: a part, which of its kinds, and how the student samples."""

    part: str
    of: str
    sampler: str = "student"

    @property
    def name(self) -> str:
        return "-".join((self.part, self.of, self.sampler)).replace(" ", "-").replace(":", "-")


@dataclass(frozen=True, kw_only=True)
class StudentBench(ModelBenchmark):
    """The protocol; try i of every kind has a prompt and noise of its own, by `seed`."""

    name = "student"

    model: str = changed(ModelBenchmark, "model", EMBEDDED_STUDENT)
    parts: tuple[str, ...] = option(f"What is measured, of {', '.join(PARTS)}.", USUAL_PARTS, recorded=False)
    num_changes: int = option("Soft changes of each attribute.", 32)
    num_visits: int = option("First visits of each beginning.", 64)
    num_subjects: int = option("Prompts that are held for `--seconds`.", 32)
    num_scenes: int = option("Prompts of each unusual setting.", 32)
    seconds: int = option("How long a prompt is held; a multiple of 5.", 60)
    samplers: tuple[str, ...] = option(
        "Of first visits: student, steps:3, euler:8 (without fresh noise), or skip:3.", ("student",), recorded=False
    )
    seed: int = option("Draws the prompts and the noise.", 0)

    def __post_init__(self) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise UserError(f"`parts` must be of {', '.join(PARTS)}; got {', '.join(self.parts) or 'none'}.")
        for name in ("num_changes", "num_visits", "num_subjects", "num_scenes"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}; leave a part out with `parts`."
                )
        if self.seconds < WINDOW_SECONDS or self.seconds % WINDOW_SECONDS:
            raise UserError(f"`seconds` must be a multiple of {WINDOW_SECONDS}, got {self.seconds}.")
        if not self.samplers:
            raise UserError("`samplers` must name at least one, such as `student`.")
        for text in self.samplers:
            Sampler.parse(text)

    def run(self, *, pipe: Any = None, on_progress: Tell = None) -> dict[str, Any]:
        pipe = self.loaded_student(pipe)
        filming = Filming(pipe=pipe)
        results = self.results(self.student_protocol(pipe, has_camera=filming.has_camera), self.environment(pipe))
        cells = self._cells(filming)
        for done, cell in enumerate(cells):
            key = {"part": cell.part, "of": cell.of, "sampler": cell.sampler}
            if results.find(**key) is None:
                if on_progress is not None:
                    on_progress(BenchProgress(done=done, total=len(cells), label=f"{cell.part}: {cell.of}"))
                made = self._measured(filming, cell)
                save_rows(self._picture(cell), made.rows)
                results.add({**key, "window_seconds": WINDOW_SECONDS, "tries": made.tries})
        return self._finished(results, cells)

    def _cells(self, filming: Filming) -> list[_Cell]:
        """What is measured, in the order of the parts; what needs a camera only where the student is told of one."""
        visits = [_Cell(part="visits", of=TRUTH)] + [
            _Cell(part="visits", of=one, sampler=sampler) for sampler in self.samplers for one in BEGINNINGS
        ]
        every = {
            "changes": [_Cell(part="changes", of=one) for one in CHANGES],
            "visits": visits if filming.has_camera else [],
            "subjects": [_Cell(part="subjects", of=f"{self.seconds} s")],
            "scenes": [_Cell(part="scenes", of=one) for one in SETTINGS],
            GIVEN: [_Cell(part=GIVEN, of=one) for one in CHANGES],
        }
        return [cell for part in PARTS if part in self.parts for cell in every[part]]

    def _measured(self, filming: Filming, cell: _Cell) -> Measured:
        if cell.part in ("changes", GIVEN):
            return measure_changes(
                filming, cell.of, count=self.num_changes, seed=self.seed, is_given=cell.part == GIVEN
            )
        if cell.part == "visits":
            filming = Filming(pipe=filming.pipe, sampler=Sampler.parse(cell.sampler))
            return measure_visits(filming, cell.of, count=self.num_visits, seed=self.seed)
        if cell.part == "subjects":
            return measure_subjects(filming, count=self.num_subjects, seed=self.seed, seconds=self.seconds)
        return measure_scenes(filming, cell.of, count=self.num_scenes, seed=self.seed)

    def _picture(self, cell: _Cell) -> Path:
        return self.output / "pictures" / f"{cell.name}.png"

    def _finished(self, results: ResultFile, cells: list[_Cell]) -> dict[str, Any]:
        summary = results.finish(summarise_student(results.records))
        self.write_table(student_markdown(results.content))
        save_student_plot(self.path("png"), results.content)
        pictures = [path for path in map(self._picture, cells) if path.exists()]
        if pictures:
            save_sheet(self.output / "pictures" / "sheet.png", pictures)
        return summary

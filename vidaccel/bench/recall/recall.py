"""Does a causal student show the same place again when the camera comes back to it?

The camera leaves a place A, sees a place B, comes home, and returns to B after an absence. Up to the way back the video
is the world's, encoded; the student makes the rest and is told of the camera as in any rollout. An oracle reads the
landmark at B. **As seen** is a return whose landmark has the kind and colour that the oracle reads in the decoded first
visit, within 8 pixels of its place.

That it is the memory and no luck is shown by controls: the same rollout with no frame of B in its memory (blank), and
with frames of B that show another landmark, which must come back instead (swap). In own videos, which the student makes
from the beginning, the second visit is compared with its own first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vidaccel.bench.recall.cells import CELLS, RecallCell
from vidaccel.bench.recall.pictures import is_pictured, save_places, strip_of
from vidaccel.bench.recall.summary import summarise_recall
from vidaccel.bench.recall.tables import recall_markdown, save_recall_plot
from vidaccel.bench.recall.trips import CHUNK_FRAMES, RecallTrips
from vidaccel.bench.recall.visits import STILL_FRAMES, Visits
from vidaccel.bench.shared.benchmark import BenchProgress, ModelBenchmark, Tell, changed, option
from vidaccel.bench.shared.records import ResultFile
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.errors import UserError, check_count
from vidaccel.world.landmark_oracle import SAME_PLACE, VALID_LIKELIHOOD


@dataclass(frozen=True, kw_only=True)
class RecallBench(ModelBenchmark):
    """The protocol; cells that the result file has are not measured again, and others may be added later."""

    name = "recall"

    model: str = changed(ModelBenchmark, "model", EMBEDDED_STUDENT)
    num_trips: int = option("Unseen trips of every kind.", 128)
    seed: int = option("Draws the trips and the noise.", 0)
    cells: tuple[str, ...] = option(
        "What is measured: return, three, shift or own, behind slashes blank, swap, a memory, uniform, away:CHUNKS, "
        "detours:TIMES, steps:N, skip:STEPS.",
        CELLS,
        recorded=False,
    )

    def __post_init__(self) -> None:
        check_count("num_trips", self.num_trips, minimum=2)
        names = [cell.name for cell in self.parsed_cells]
        if not names or len(set(names)) < len(names):
            raise UserError(f"`cells` must name different cells, got {', '.join(names) or 'none'}.")

    @property
    def parsed_cells(self) -> list[RecallCell]:
        """The cells in the order in which they are asked for."""
        return [RecallCell.parse(text) for text in self.cells]

    def run(self, *, pipe: Any = None, on_progress: Tell = None) -> dict[str, Any]:
        pipe = self.loaded_student(pipe)
        check_can_be_measured(pipe)
        cells = self.parsed_cells
        for cell in cells:
            cell.memory_of(pipe)
        protocol = self.student_protocol(
            pipe, most_shift=SAME_PLACE, still_frames=STILL_FRAMES, valid_likelihood=VALID_LIKELIHOOD
        )
        results = self.results(protocol, self.environment(pipe))
        tell = on_progress or (lambda progress: None)
        done = 0
        for group in _by_trips(cells):
            trips = RecallTrips(pipe, group[0], count=self.num_trips, seed=self.seed)
            for cell in group:
                if results.find(cell=cell.name) is None:
                    tell(BenchProgress(done=done, total=len(cells), label=cell.name))
                    _measure(results, trips, cell, pipe)
                done += 1
        summary = results.finish(summarise_recall(results.records, valid_likelihood=VALID_LIKELIHOOD))
        self.write_table(recall_markdown(results.content))
        save_recall_plot(self.path("png"), results.content)
        save_places(self.path("places.png"), results.content)
        return summary


def check_can_be_measured(pipe: Any) -> None:
    """Raise UserError for a student whose camera cannot be led along a trip."""
    if not pipe.transformer.takes_camera:
        raise UserError(
            "This student is not told of its camera (`camera_dim` of its transformer's config is None), and recall is "
            "measured along given ways of it; take a student that is."
        )
    stride, chunk_frames = pipe.vae_scale_factor_temporal, pipe.memory_config().chunk_frames
    if (stride, chunk_frames) != (4, CHUNK_FRAMES):
        raise UserError(
            f"Trips are counted in chunks of {CHUNK_FRAMES} latent frames of 4 pixel frames; this student has "
            f"{chunk_frames} of {stride}."
        )


def _by_trips(cells: Sequence[RecallCell]) -> list[list[RecallCell]]:
    """Cells with the same trips together: what the world shows is then encoded once."""
    groups: dict[str, list[RecallCell]] = {}
    for cell in cells:
        groups.setdefault(cell.trips_name, []).append(cell)
    return list(groups.values())


def _measure(results: ResultFile, trips: RecallTrips, cell: RecallCell, pipe: Any) -> None:
    """Add the record of a cell, behind those of what the world shows."""
    for name, is_swapped in {cell.trips_name + "/truth": False, cell.truth_name: cell.control == "swap"}.items():
        if results.find(cell=name) is None:
            first, second = trips.truth(is_swapped=is_swapped)
            results.add(_record(name, kind="truth", seeds=trips, first=first, second=second))
    began = time.perf_counter()
    rolled = trips.roll(cell)
    record = _record(cell.name, kind=cell.kind, seeds=trips, first=rolled.first, second=rolled.second)
    for row, in_reach, keyframes in zip(record["trips"], rolled.frames_in_reach, rolled.keyframes, strict=True):
        row |= {"frames_in_reach": in_reach, "keyframes": keyframes}
    results.add(
        record
        | {
            "truth": cell.truth_name,
            "original": cell.trips_name + "/truth",
            "plain": cell.plain_name,
            "control": cell.control,
            "memory": cell.memory or pipe.config.memory,
            "away_chunks": cell.away_chunks,
            "num_inference_steps": pipe.student(cell.num_inference_steps).num_inference_steps,
            "seconds": round(time.perf_counter() - began, 2),
        }
    )


def _record(name: str, *, kind: str, seeds: RecallTrips, first: Visits | None, second: Visits) -> dict[str, Any]:
    visits = {"first": first, "second": second}
    made = {visit: seen for visit, seen in visits.items() if seen is not None}
    rows = [
        {"seed": trip.seed, **{visit: seen.readings[place] for visit, seen in made.items()}}
        for place, trip in enumerate(seeds.trips)
    ]
    strips = {visit: strip_of(seen.stills) for visit, seen in made.items() if is_pictured(name, visit)}
    return {"cell": name, "kind": kind, "trips": rows, "strips": strips}

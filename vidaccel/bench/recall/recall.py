"""Does the memory of a causal student do what it is for: is a place the same when the camera comes back to it?

The camera leaves home, looks at another place, comes home, and goes to the other place again. The sink holds the start
of the video and so can bring back home; the other place is older than the fast memory, and only slow memory can bring
it back. Every prompt is rolled out twice with every memory: from nothing ("own": what the student showed at the first
visit is the truth), and from a clip of the world that ends before the second way out ("clip": truth is what the clip
showed). Memories are compared on the same prompts and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vidaccel.bench.recall.pictures import compare_places, resemblance, sharpness, still, subject_area
from vidaccel.bench.recall.settings import Settings, measure_settings
from vidaccel.bench.recall.summary import summarise_recall
from vidaccel.bench.recall.tables import recall_markdown, save_recall_plot
from vidaccel.bench.recall.trip import (
    NUM_SEGMENTS,
    RETURNS,
    VISITS,
    Trip,
    TripGrid,
    TripVideos,
    encode_trips,
    plan_trips,
    rendered_windows,
    take_trips,
)
from vidaccel.bench.shared.benchmark import BenchProgress, ModelBenchmark, Tell, changed, option
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.catalog.pipelines import WAN_TEXT_TOKENS
from vidaccel.catalog.registry import spec_of
from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_write
from vidaccel.files.text import json_number
from vidaccel.memory import MemoryConfig, parse_slow_fast
from vidaccel.video.frames import rounded_to_uint8
from vidaccel.world import Reading, read_clip
from vidaccel.world.scene import SEGMENT_FRAMES

Begin = Literal["clip", "own"]
GIVEN_SEGMENTS = 5  # of a clip to begin with: home, away, home again
_UNIFORM = "/uniform"


@dataclass(frozen=True, kw_only=True)
class RecallBench(ModelBenchmark):
    """The protocol; the memories but the first are compared with it, and `own_memories` are of them."""

    name = "recall"

    model: str = changed(ModelBenchmark, "model", EMBEDDED_STUDENT)
    num_prompts: int = option("Unseen scenes of the world.", 16)
    own_prompts: int = option(
        "Of these, the first, for videos begun with nothing, which take more chunks, and for --settings.", 8
    )
    seed: int = option("Draws the scenes and the noise.", 0)
    memories: tuple[str, ...] = option(
        "For videos that begin with a clip; /uniform behind: keyframes at equal distances.",
        (
            "slow-fast:3+12+6@0.997",
            "slow-fast:3+12+6@0.99",
            "slow-fast:3+12+6/uniform",
            "sink+window:3+18",
            "window:21",
            "slow-fast:3+3+6@0.99",
            "sink+window:3+9",
            "window:12",
            "full:168",
        ),
    )
    own_memories: tuple[str, ...] = option(
        "Of these, for videos that begin with nothing.",
        (
            "slow-fast:3+12+6@0.997",
            "slow-fast:3+12+6@0.99",
            "slow-fast:3+12+6/uniform",
            "sink+window:3+18",
            "window:21",
        ),
    )
    settings: tuple[str, ...] = option("steps@guidance of short rollouts.", ("4@1", "8@1", "4@3", "8@3"))
    keep_pictures: bool = option("Keep what was compared.", False, recorded=False)

    def __post_init__(self) -> None:
        if not 2 <= self.own_prompts <= self.num_prompts:
            raise UserError(
                f"`own_prompts` must be from 2 to `num_prompts`, got {self.own_prompts} of {self.num_prompts}."
            )
        if not self.memories or len(set(self.memories)) < len(self.memories):
            raise UserError(f"`memories` must name different memories, got {', '.join(self.memories) or 'none'}.")
        if stray := sorted(set(self.own_memories) - set(self.memories)):
            raise UserError(f"`own_memories` must be of `memories`; {', '.join(stray)} is not.")
        for text in self.memories:
            named_memory(text)
        for text in self.settings:
            Settings.parse(text)

    @property
    def cells(self) -> list[tuple[Begin, str]]:
        """How a video begins and its memory, for all rollouts."""
        clips: list[tuple[Begin, str]] = [("clip", memory) for memory in self.memories]
        return clips + [("own", memory) for memory in self.own_memories]

    def run(self, *, pipe: Any = None, on_progress: Tell = None) -> dict[str, Any]:
        pipe = self.loaded(pipe)
        results = self.results(self.protocol(_settled(pipe.student())), self.environment(pipe))
        length = spec_of(self.model).defaults.max_sequence_length or WAN_TEXT_TOKENS
        bench = _Bench(self, pipe, plan_trips(self.num_prompts, seed=self.seed), length)
        tell = on_progress or (lambda progress: None)
        total = len(self.cells) + len(self.settings)
        for done, (begin, memory) in enumerate(self.cells):
            if results.find(kind="trips", begin=begin, memory=memory) is None:
                tell(BenchProgress(done=done, total=total, label=f"{begin}, {memory}"))
                results.add(bench.cell(begin, memory))
        for done, text in enumerate(self.settings, len(self.cells)):
            if results.find(kind="settings", settings=text) is None:
                tell(BenchProgress(done=done, total=total, label=f"settings {text}"))
                trips, settings = bench.trips[: self.own_prompts], Settings.parse(text)
                prompts = measure_settings(pipe, trips, settings, max_sequence_length=length)
                results.add({"kind": "settings", "settings": text, "prompts": prompts})
        summary = results.finish(summarise_recall(results.records, reference=self.memories[0]))
        self.write_table(recall_markdown(results.content))
        save_recall_plot(self.path("png"), results.content)
        return summary


def named_memory(text: str, chunk_frames: int = 3) -> MemoryConfig:
    """The memory that a name of `RecallBench.memories` means. Raises UserError."""
    try:
        memory = parse_slow_fast(text.removesuffix(_UNIFORM), chunk_frames)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not text.endswith(_UNIFORM):
        return memory
    if not memory.slow_frames:
        raise UserError(f"Only slow memory has keyframes that can be uniform; {text!r} has none.")
    return replace(memory, keyframe_rule="uniform")


class _Bench:
    """The trips, and the clips that they begin with, encoded when they are needed first."""

    def __init__(self, config: RecallBench, pipe: Any, trips: list[Trip], max_sequence_length: int) -> None:
        self.config, self.pipe, self.trips, self.length = config, pipe, trips, max_sequence_length
        self.chunk_frames: int = pipe.config.chunk_frames
        self.grid = TripGrid(chunk_frames=self.chunk_frames, stride=pipe.vae_scale_factor_temporal)
        self._clips: Tensor | None = None

    def cell(self, begin: Begin, memory: str) -> dict[str, Any]:
        """The record of one memory on all prompts."""
        given, windows, trips = None, {}, self.trips[: self.config.own_prompts]
        if begin == "clip":
            trips = self.trips
            if self._clips is None:
                self._clips = encode_trips(self.pipe.vae, self.trips, self.grid, GIVEN_SEGMENTS)
            given = self._clips
            windows = rendered_windows(self.trips, self.grid, [visit for visit in VISITS if visit < GIVEN_SEGMENTS])
        config = named_memory(memory, self.chunk_frames)
        videos = take_trips(self.pipe, trips, config, given=given, max_sequence_length=self.length)
        looked_at = Visits({**windows, **videos.windows})
        places = [place for place, (_, second) in RETURNS.items() if second in videos.windows]
        if self.config.keep_pictures:
            self._keep(looked_at, places, begin, memory)
        return {
            "kind": "trips",
            "begin": begin,
            "memory": memory,
            "attended_frames": config.total_frames,
            "seconds": videos.seconds,
            "prompts": [self._prompt(number, looked_at, videos, places) for number in range(len(trips))],
        }

    def _prompt(self, number: int, visits: Visits, videos: TripVideos, places: Sequence[str]) -> dict[str, Any]:
        trip = self.trips[number]
        return {
            "prompt": trip.prompts[0],
            "asked": {
                "colour": trip.scene.subject.colour,
                "shape": trip.scene.subject.shape,
                "background": trip.scene.background,
            },
            "visits": {str(segment): visits.seen(segment, number) for segment in sorted(videos.windows)},
            "returns": {
                place: visits.compared(place, number) | {"remembered_frames": videos.remembered[place][number]}
                for place in places
            },
            "similarities": [None if x is None else round(x, 5) for x in videos.similarities[number]],
            "keyframes": "".join("K" if is_keyframe else "." for is_keyframe in videos.keyframes[number]),
        }

    def _keep(self, visits: Visits, places: Sequence[str], begin: Begin, memory: str) -> None:
        """Two rows for a place, first and second visit; a column for each prompt."""
        rows = [visits.stills[segment] for place in places for segment in RETURNS[place]]
        picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
        name = memory.replace(":", "-").replace("/", "-")
        with atomic_write(self.config.output / "pictures" / f"{begin}-{name}.png") as unfinished:
            Image.fromarray(rounded_to_uint8(picture).permute(1, 2, 0).numpy()).save(unfinished, format="PNG")


class Visits:
    """What is seen at the visits of one cell: frames, what the oracle reads in them, and their still pictures."""

    def __init__(self, windows: dict[int, Tensor]) -> None:
        """windows: by segment, (B, f, 3, H, W); the first frame is left out, because a decoder begins with it."""
        self.readings: dict[int, list[Reading]] = {}
        self.stills: dict[int, list[Tensor]] = {}
        for segment, clips in windows.items():
            self.readings[segment] = [read_clip(clip[1:]) for clip in clips]
            self.stills[segment] = [still(clip[1:]) for clip in clips]

    def seen(self, segment: int, number: int) -> dict[str, Any]:
        """What the oracle reads, and how sharp the picture is."""
        reading = self.readings[segment][number]
        names = ("colour", "shape", "background")
        return {name: getattr(reading, name) for name in names} | {"sharpness": sharpness(self.stills[segment][number])}

    def compared(self, place: str, number: int) -> dict[str, Any]:
        """The second visit against the first of the same prompt.

        At home the subject moves before the landmarks: it is hidden, and what is left is too little to recognise a
        place by. Away the second visit is also set beside the first ones of other prompts.
        """
        first, second = RETURNS[place]
        before, after = self.stills[first], self.stills[second][number]
        areas = None
        if place == "home":
            size = after.shape[1:]
            before_area, after_area = (subject_area(self.readings[one][number], *size) for one in (first, second))
            areas = (before_area, after_area)
        values = asdict(compare_places(before[number], after, hidden=areas))
        values |= dict.fromkeys(("resemblance", "resemblance_of_others", "recognised"))
        if place == "away":
            values["resemblance"] = own = resemblance(before[number], after)
            others = [resemblance(picture, after) for other, picture in enumerate(before) if other != number]
            values["resemblance_of_others"] = sum(others) / len(others)
            values["recognised"] = sum(own > other for other in others) / len(others)
        return {name: json_number(value) if isinstance(value, float) else value for name, value in values.items()}


def _settled(student: Any) -> dict[str, Any]:
    return {
        "segments": NUM_SEGMENTS,
        "segment_frames": SEGMENT_FRAMES,
        "given_segments": GIVEN_SEGMENTS,
        "num_inference_steps": student.num_inference_steps,
        "guidance_scale": student.guidance_scale,
    }

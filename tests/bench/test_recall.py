"""The recall benchmark: students that remember all or nothing get the figures they must; then all of it at toy size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_models import save_student, tiny_student, tiny_transformer
from vidaccel.bench.recall import trips as trips_module
from vidaccel.bench.recall.blank import MemoryWithout
from vidaccel.bench.recall.cells import CELLS, RecallCell
from vidaccel.bench.recall.pictures import COLUMNS, pixels_of, save_places, strip_of
from vidaccel.bench.recall.recall import RecallBench
from vidaccel.bench.recall.summary import chance_of, summarise_recall
from vidaccel.bench.recall.tables import recall_markdown
from vidaccel.bench.recall.trips import RecallTrips, batches, target_frames, trip_camera
from vidaccel.cli import run
from vidaccel.errors import UserError
from vidaccel.memory import parse_memory
from vidaccel.memory.index import MemoryIndex
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.rollout.chunk import Chunk
from vidaccel.world import FRAME_SIZE, ReturnTrip, render_trips
from vidaccel.world import test_trip as unseen_trip
from vidaccel.world.sprites import LANDMARK_SIZE

SHORT = "away:1"  # one chunk between the visits: ten chunks in all
PIXELS = 3 * 8 * 8  # channels of latents that are pixels


# Cells


@pytest.mark.parametrize("text", CELLS)
def test_a_cell_is_written_as_it_is_read(text: str) -> None:
    assert RecallCell.parse(text).name == text


def test_words_of_a_cell_come_in_any_order_and_usual_ones_are_left_out() -> None:
    cell = RecallCell.parse("return/steps:8/blank/window:9/away:20")
    assert cell.name == "return/window:9/blank/away:20/steps:8"
    assert (cell.trips_name, cell.truth_name, cell.plain_name) == ("return/away:20", "return/away:20/truth", "return")
    assert RecallCell.parse("own/skip:2+3/steps:8").name == "own/steps:8/skip:2+3"
    assert RecallCell.parse("return/away:6") == RecallCell(kind="return")
    assert RecallCell.parse("three/detours:1") == RecallCell(kind="three")
    assert RecallCell.parse("three/detours:8/window:21/away:2").name == "three/window:21/away:2/detours:8"
    assert RecallCell.parse("three/detours:8").trips_name == "three/detours:8"
    assert RecallCell.parse("own").trips_name == RecallCell.parse("return/swap").trips_name == "return"
    assert RecallCell.parse("return/swap").truth_name == "return/swap/truth"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("returns", "A cell begins with return, three, shift, own; got 'returns'"),
        ("return/blank/swap", "says twice what its control is"),
        ("return/away:0", "at least 1 chunk away"),
        ("return/steps:x", "steps must be a whole number, as steps:8"),
        ("return/detours:2", "Only trips to three places have detours, and at least 1; got return/detours:2"),
        ("three/detours:0", "and at least 1"),
        ("return/huge", "A memory must be slow-fast"),
        ("own/blank", "has no prefix that could be a blank"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        RecallBench(output=Path("x"), cells=(text,))


def test_cells_twice_none_and_a_single_trip_are_refused() -> None:
    for changes, words in [
        ({"cells": ("return", "return/away:6")}, "`cells` must name different cells, got return, return"),
        ({"cells": ()}, "got none"),
        ({"num_trips": 1}, "`num_trips` must be a whole number of at least 2; got 1"),
    ]:
        with pytest.raises(UserError, match=words):
            RecallBench(output=Path("x"), **changes)  # type: ignore[arg-type]


# Trips


@pytest.mark.parametrize("kind", ["return", "three", "shift"])
def test_blank_hides_exactly_the_chunks_that_show_the_place(kind: Any) -> None:
    half = (FRAME_SIZE + LANDMARK_SIZE[1]) / 2
    for seed in range(6):
        trip = unseen_trip(seed, kind=kind)
        hidden = set(target_frames(trip))
        for chunk in range(trip.prefix_chunks):
            frames = range(max(12 * chunk - 3, 0), 12 * chunk + 9)
            is_seen = any(abs(trip.target_x - trip.camera_x(frame) - FRAME_SIZE / 2) < half - 1 for frame in frames)
            assert {3 * chunk + place in hidden for place in range(3)} == {is_seen}, (seed, chunk)
        assert set(range(3 * trip.first_visit.start, 3 * trip.first_visit.stop)) <= hidden
        assert not hidden & {0, 1, 2}


def test_trips_that_go_the_same_way_are_together_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trips_module, "_BATCH", 4)
    trips = [unseen_trip(seed, kind="shift") for seed in range(12)]
    found = list(batches(trips))
    assert sorted(place for places in found for place in places) == list(range(12))
    for places in found:
        assert len(places) <= 4
        ways = [trip_camera(trips[place])(0, 0, 45) for place in places]
        for screens, motions in ways:
            assert (screens, motions) == (pytest.approx(ways[0][0], abs=1e-5), pytest.approx(ways[0][1], abs=1e-5))


def test_the_camera_is_told_in_screens_from_where_it_stands_first() -> None:
    trip = unseen_trip(0, kind="return")
    camera = trip_camera(trip)
    screens, motions = camera(0, 0, 45)
    assert screens[:3] == motions[:3] == [0, 0, 0]
    first, second = (screens[3 * visit.stop - 1] for visit in (trip.first_visit, trip.second_visit))
    assert abs(first) == 1
    assert first == second
    assert camera(4, 12, 3) == (screens[12:15], motions[12:15])
    assert sum(motions) == pytest.approx(screens[-1])


# The memory without some frames


def indexes_along(policy: Any, other: Any, num_chunks: int) -> Iterator[tuple[MemoryIndex, MemoryIndex]]:
    pair = MemoryIndex(policy), MemoryIndex(other)
    for chunk in range(num_chunks):
        for index in pair:
            index.begin_chunk()
        yield pair
        for index in pair:
            index.commit(0.1 if chunk % 2 else 0.9)


@pytest.mark.parametrize("text", ["slow-fast:3+6+6@0.5", "window:21", "full:36"])
def test_a_memory_without_frames_is_the_other_one_but_for_them(text: str) -> None:
    memory, left_out = parse_memory(text), (0, 1, 9, 10, 11, 15)
    without = MemoryWithout(memory=memory, frames=left_out, chunk_frames=3)
    assert (without.total_frames, without.max_frames) == (memory.total_frames, memory.max_frames)
    for whole, index in indexes_along(memory, without, 12):
        kept = [entry for entry in whole.entries if entry.frame not in left_out or entry.part == "current"]
        assert list(index.entries) == kept
        assert index.positions == tuple(range(len(kept)))
        assert index.is_keyframe == whole.is_keyframe


def test_frames_that_are_left_out_do_not_come_back() -> None:
    memory = parse_memory("view-retrieval:3+6+6")
    without = MemoryWithout(memory=memory, frames=(9, 10), chunk_frames=3)
    assert without.retrieval == memory.retrieval
    pair = MemoryIndex(memory), MemoryIndex(without)
    for index in pair:
        for _ in range(8):
            index.begin_chunk()
            index.commit(0.99)
        index.begin_chunk()
        index.retrieve([10, 7])
    assert [index.slow for index in pair] == [(7, 10), (7,)]


# Figures


def reading(kind: str = "mill", colour: str = "rose", x: float = 60.0, likelihood: float = 0.2) -> dict[str, Any]:
    return {"kind": kind, "colour": colour, "x": x, "likelihood": likelihood}


def record(cell: str, second: Sequence[dict[str, Any]], first: Any = None, **changes: Any) -> dict[str, Any]:
    parsed = RecallCell.parse(cell.removesuffix("/truth"))
    rows = [
        {"seed": place, "second": one, "frames_in_reach": place, "keyframes": 2} for place, one in enumerate(second)
    ]
    for place, one in enumerate(first or ()):
        rows[place]["first"] = one
    return {
        "cell": cell,
        "kind": "truth" if cell.endswith("truth") else parsed.kind,
        "trips": rows,
        "strips": {},
        "truth": parsed.truth_name,
        "original": parsed.trips_name + "/truth",
        "plain": parsed.plain_name,
        "control": parsed.control,
        "memory": "window:21",
        "away_chunks": parsed.away_chunks,
        "num_inference_steps": 4,
        "seconds": 1.0,
    } | changes


FIRST = [
    reading("mill", "rose", 60),
    reading("tree", "sage", 70),
    reading("mill", "sage", 80),
    reading("tent", "rose", 50),
]
SECOND = [
    reading("mill", "rose", 67),
    reading("tree", "sage", 79),
    reading("mill", "rose", 80),
    reading("tree", "rose", 50, 0.01),
]


def test_as_seen_wants_kind_colour_and_place_and_every_part_is_told() -> None:
    truth = record("return/truth", FIRST, FIRST)
    summary = summarise_recall([truth, record("return", SECOND)], valid_likelihood=0.1)
    (row,) = summary["cells"]
    counts = {name: row[name]["correct"] for name in ("as_seen", "same_kind", "same_colour", "same_place")}
    assert counts == {"as_seen": 1, "same_kind": 3, "same_colour": 3, "same_place": 3}
    assert row["second"]["valid"]["correct"] == 3
    assert row["second"]["likelihood_share"] == pytest.approx((0.6 + 0.01) / 0.8)
    assert row["frames_in_reach"] == 1.5
    assert row["ceiling"]["share"] == 1
    assert row["difference"] is None
    assert summary["truths"][0]["first"]["kinds_entropy"] == pytest.approx(1.5)


def test_chance_pairs_returns_with_all_other_trips() -> None:
    alike = [reading()] * 3
    assert chance_of(alike, alike) == 1
    assert chance_of(FIRST, FIRST) == 0
    assert chance_of([reading(), reading("tree")], [reading("tree"), reading("tree")]) == pytest.approx(1 / 2)


def test_swap_wants_the_other_landmark_and_own_videos_their_own() -> None:
    truth, swapped = record("return/truth", FIRST, FIRST), record("return/swap/truth", SECOND, SECOND)
    rows = summarise_recall(
        [truth, swapped, record("return/swap", SECOND), record("own", SECOND, SECOND)], valid_likelihood=0.1
    )["cells"]
    assert [row["as_seen"]["correct"] for row in rows] == [4, 4]
    assert rows[0]["original"]["correct"] == 1
    assert rows[1]["first"]["valid"]["correct"] == 3
    assert rows[1]["first"]["truth_entropy"] == pytest.approx(1.5)


def test_cells_are_compared_trip_by_trip_where_the_trips_are_the_same() -> None:
    truth, far = record("return/truth", FIRST, FIRST), record("return/away:20/truth", FIRST, FIRST)
    records = [truth, far, record("return", FIRST), record("return/blank", SECOND), record("return/away:20", SECOND)]
    plain, blank, away = summarise_recall(records, valid_likelihood=0.1)["cells"]
    assert plain["difference"] is away["difference"] is None
    assert blank["difference"]["mean"] == pytest.approx(-0.75)
    assert blank["difference"]["low"] == -1


def test_a_strip_is_read_back_and_without_rows_there_is_no_picture(tmp_path: Path) -> None:
    ramp = torch.linspace(0, 1, 32).expand(COLUMNS + 1, 3, 32, 32)
    pixels = torch.from_numpy(pixels_of(strip_of(ramp)).copy())
    assert pixels.shape == (32, 32 * COLUMNS, 3)
    assert (pixels[:, :32].float() / 255 - ramp[0].permute(1, 2, 0)).abs().max() < 0.05
    content = {"records": [{"cell": "return/window:21", "strips": {}}], "environments": []}
    assert save_places(tmp_path / "places.png", content) is None
    assert not list(tmp_path.iterdir())


# Students that remember everything or nothing, with latents that are pixels


@cache
def drawn(trip: ReturnTrip, start: int, num_frames: int) -> Tensor:
    return render_trips([trip], start=start, num_frames=num_frames)


@pytest.fixture(autouse=True)
def _every_trip_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def render(trips: Sequence[ReturnTrip], *, start: int, num_frames: int, device: object) -> Tensor:
        return torch.cat([drawn(trip, start, num_frames) for trip in trips])

    monkeypatch.setattr(trips_module, "render_trips", render)


@pytest.fixture
def pixel_student(tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A student whose latents are the last pixel frame of each group, so that what it makes can be said in pixels."""

    def encode(vae: object, frames: Tensor) -> Tensor:
        return torch.nn.functional.pixel_unshuffle(frames[:, ::4], 8).transpose(1, 2)

    class Decoder:
        def __init__(self, vae: object) -> None:
            pass

        def decode(self, latents: Tensor) -> Tensor:
            frames = torch.nn.functional.pixel_shuffle(latents.transpose(1, 2), 8).repeat_interleave(4, dim=1)
            return (frames[:, 3:].clamp(0, 1) * 255).round().to(torch.uint8)

    monkeypatch.setattr("vidaccel.bench.recall.trips.encode_start", encode)
    monkeypatch.setattr("vidaccel.bench.recall.visits.StreamingDecoder", Decoder)
    pipe = tiny_student(tiny_wan_folder)
    settings = {"camera_dim": 8, "clean_pass": "frame", "in_channels": PIXELS, "out_channels": PIXELS}
    config = {**tiny_transformer().config, **settings, "rope_max_seq_len": 64}
    pipe.register_modules(transformer=CausalWanTransformer3DModel.from_config(config).eval())
    pipe.register_to_config(memory="full:45")
    return pipe


Maker = Callable[[Any, list[float]], Tensor]


def with_maker(monkeypatch: pytest.MonkeyPatch, make: Maker) -> None:
    """Let chunks be made by `make` of the rollout's state and the camera's way so far; nothing else of it runs."""

    def made(student: Any, state: Any, shots: Any, *, num_chunks: int, camera: Any) -> Iterator[Chunk]:
        while state.num_chunks < num_chunks:
            state.num_chunks, state.num_frames = state.num_chunks + 1, state.num_frames + 3
            way, _ = camera(0, 0, state.num_frames)
            yield type("Made", (), {"latents": make(state, way), "skipped": ()})  # type: ignore[misc]

    monkeypatch.setattr("vidaccel.bench.recall.trips.rollout", made)


def remembered_place(state: Any, way: list[float]) -> Tensor:
    """For every frame of the chunk one that is remembered from the same place, or noise."""
    generator = torch.Generator().manual_seed(state.num_frames)
    shape = (len(state.seeds), state.size[0], *state.size[1:])
    frames = []
    for place in way[-3:]:
        found = [frame for frame in state.remembered if abs(way[frame] - place) < 1e-6]
        frames.append(state.remembered[found[-1]] if found else torch.rand(shape, generator=generator))
    return torch.stack(frames, dim=2)


def shares(pipe: Any, output: Path, *cells: str, num_trips: int = 4) -> dict[str, dict[str, Any]]:
    summary = RecallBench(output=output, device="cpu", num_trips=num_trips, cells=cells).run(pipe=pipe)
    return {row["cell"]: row for row in summary["cells"]}


def test_a_student_that_remembers_all_is_as_good_as_the_world_follows_the_swap_and_is_lost_without_its_memory(
    pixel_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_maker(monkeypatch, remembered_place)
    words = ("", "/blank", "/swap", "/window:6")
    rows = shares(pixel_student, tmp_path, *(f"return{word}/{SHORT}" for word in words))
    plain, blank, swap, window = rows.values()
    assert plain["as_seen"]["share"] == plain["ceiling"]["share"] == 1
    assert plain["second"]["valid"]["share"] == 1
    assert (swap["as_seen"]["share"], swap["original"]["share"]) == (1, 0)
    assert blank["as_seen"]["share"] == window["as_seen"]["share"] == 0
    assert [row["frames_in_reach"] for row in rows.values()] == [6, 0, 6, 0]
    assert plain["chance"] < 0.3
    text = (tmp_path / "recall.md").read_text()
    assert f"`return/swap/{SHORT}` shows the landmark that was there before in 0.0% of 4" in text


def test_a_student_that_ignores_its_memory_is_at_chance(
    pixel_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = RecallTrips(pixel_student, RecallCell.parse(f"return/{SHORT}"), count=4).world().roll(1, 0)
    seeds = [unseen_trip(seed, away_chunks=1).seed for seed in range(4)]

    def other_world(state: Any, way: list[float]) -> Tensor:
        rows = [seeds.index(seed) for seed in state.seeds]
        return worlds[rows, :, state.num_frames - 3 : state.num_frames]

    with_maker(monkeypatch, other_world)
    (row,) = shares(pixel_student, tmp_path, f"return/{SHORT}").values()
    assert row["as_seen"]["share"] <= row["chance"] + 1 / 4
    assert row["second"]["valid"]["share"] == 1
    assert row["ceiling"]["share"] == 1


def test_an_own_video_is_compared_with_its_own_first_visit(
    pixel_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = RecallTrips(pixel_student, RecallCell.parse(f"own/{SHORT}"), count=4).world()

    def always_the_first_world(state: Any, way: list[float]) -> Tensor:
        return worlds[[0] * len(state.seeds), :, state.num_frames - 3 : state.num_frames]

    with_maker(monkeypatch, always_the_first_world)
    (row,) = shares(pixel_student, tmp_path, f"own/{SHORT}").values()
    assert row["as_seen"]["share"] == 1
    assert row["chance"] == 1  # all show one landmark, which the figure alone would not tell
    assert row["first"]["kinds_entropy"] == 0 < row["first"]["truth_entropy"]
    assert row["first"]["commonest"]["share"] == 1


def test_swapped_frames_are_those_of_the_place_and_no_others(pixel_student: Any) -> None:
    trips = RecallTrips(pixel_student, RecallCell.parse(f"three/swap/{SHORT}"), count=2)
    plain, swapped = trips.prefix(), trips.prefix(is_swapped=True)
    for row, trip in enumerate(trips.trips):
        differs = (plain[row] != swapped[row]).any(0).flatten(1).any(1)
        assert set(differs.nonzero().flatten().tolist()) <= set(target_frames(trip))
        assert all(differs[3 * chunk] for chunk in trip.first_visit)


# All of it


@pytest.fixture
def student_folder(tiny_wan_folder: Path, tmp_path: Path) -> Path:
    pipe = tiny_student(tiny_wan_folder, camera_dim=8)
    return save_student(pipe, tmp_path / "student", height=FRAME_SIZE, width=FRAME_SIZE)


def test_all_of_it_at_toy_size_and_nothing_is_made_twice(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "results"
    arguments = ["bench", "recall", "--output", str(output), "--model", str(student_folder), "--device", "cpu"]
    arguments += ["--num-trips", "2", "--cells"]
    assert run([*arguments, f"return/uniform/{SHORT},own/window:9/steps:1/{SHORT}"]) == 0
    assert {path.name for path in output.iterdir()} == {"recall.json", "recall.md", "recall.png"}
    result = json.loads((output / "recall.json").read_text())
    truth, made, own = result["records"]
    assert [one["cell"] for one in (truth, made, own)] == [
        f"return/{SHORT}/truth",
        f"return/uniform/{SHORT}",
        f"own/window:9/{SHORT}/steps:1",
    ]
    assert [one.get("num_inference_steps") for one in (truth, made, own)] == [None, 2, 1]
    assert ["first" in one["trips"][0] for one in (truth, made, own)] == [True, False, True]
    assert recall_markdown(result) == (output / "recall.md").read_text()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    for name in ("rollout", "encode_start"):
        monkeypatch.setattr(f"vidaccel.bench.recall.trips.{name}", never)
    assert run([*arguments, f"return/uniform/{SHORT}"]) == 0
    assert json.loads((output / "recall.json").read_text())["records"] == result["records"]


def test_a_trip_is_the_same_alone_and_in_a_batch(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidaccel.generation.loading import load_pipeline

    pipe = load_pipeline(str(student_folder), device="cpu")
    cell = RecallCell.parse(f"return/{SHORT}")
    trips = RecallTrips(pipe, cell, count=3)
    together = trips.roll(cell)
    monkeypatch.setattr(trips_module, "_BATCH", 1)
    alone = trips.roll(cell)
    torch.testing.assert_close(together.second.stills, alone.second.stills, atol=4 / 255, rtol=0)
    assert together.keyframes == alone.keyframes


def test_a_student_without_a_camera_or_with_other_chunks_is_refused_in_a_line(
    tiny_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_student(tiny_wan_folder).save_pretrained(tmp_path / "student")
    arguments = ["bench", "recall", "--output", str(tmp_path / "results"), "--model", str(tmp_path / "student")]
    assert run([*arguments, "--device", "cpu"]) == 2
    assert "not told of its camera" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not any((tmp_path / "results").iterdir())

"""The recall benchmark: its measures on pictures with a known shift, its way there and back, all of it at toy size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_models import tiny_student
from vidaccel.bench.recall.pictures import (
    BAND,
    compare_places,
    landmark_map,
    resemblance,
    sharpness,
    still,
    subject_area,
)
from vidaccel.bench.recall.recall import RecallBench, Visits, named_memory
from vidaccel.bench.recall.settings import Settings
from vidaccel.bench.recall.summary import similarity_rows, summarise_recall
from vidaccel.bench.recall.trip import (
    NUM_SEGMENTS,
    RETURNS,
    TripGrid,
    encode_trips,
    plan_trips,
    rendered_windows,
    take_trips,
)
from vidaccel.cli import run
from vidaccel.errors import UserError
from vidaccel.rollout.grid import pixel_frames
from vidaccel.world import FRAME_SIZE, read_clip, render
from vidaccel.world.scene import SEGMENT_FRAMES
from vidaccel.world.sprites import LANDMARK_KINDS

GRID = TripGrid(chunk_frames=3, stride=4)


def place(*, posts: dict[int, tuple[float, float, float]], seed: int | None = None) -> Tensor:
    """A picture (3, 128, 128) with a grey background and posts, 14 pixels wide, at these columns."""
    picture = torch.full((3, FRAME_SIZE, FRAME_SIZE), 0.5)
    for column, colour in posts.items():
        picture[:, 50:100, column : column + 14] = torch.tensor(colour)[:, None, None]
    if seed is not None:
        picture += 0.02 * torch.rand(picture.shape, generator=torch.Generator().manual_seed(seed))
    return picture


RED, BLUE = (0.8, 0.2, 0.2), (0.2, 0.2, 0.8)


@pytest.mark.parametrize("shift", [-30, -7, 0, 12, 32])
def test_a_place_that_is_seen_again_from_beside_is_the_same_at_the_known_shift(shift: int) -> None:
    earlier = place(posts={40: RED, 70: BLUE}, seed=0)
    later = earlier.roll(shift, dims=2)
    found = compare_places(earlier, later)
    assert found.shift == shift
    assert found.psnr == math.inf
    assert found.ssim == pytest.approx(1)
    assert found.colour_difference == pytest.approx(0, abs=1e-4)
    assert resemblance(earlier, later) == pytest.approx(1, abs=0.01)


def test_a_shift_beyond_the_search_is_another_place() -> None:
    earlier = place(posts={20: RED}, seed=0)
    assert resemblance(earlier, earlier.roll(60, dims=2)) < 0.1


def test_landmarks_of_other_colours_and_at_other_distances_resemble_less() -> None:
    earlier = place(posts={40: RED, 70: BLUE})
    recoloured, moved = place(posts={40: BLUE, 70: RED}), place(posts={40: RED, 100: BLUE})
    assert resemblance(earlier, recoloured) < 0.8
    assert resemblance(earlier, moved) == pytest.approx(0.5, abs=0.05)  # one of two posts fits
    difference = compare_places(earlier, recoloured).colour_difference
    assert difference is not None
    assert difference > 20


def test_the_colour_difference_is_that_of_the_landmarks_alone_in_levels() -> None:
    earlier, later = place(posts={50: RED}), place(posts={50: (0.8, 0.2, 0.5)})
    assert compare_places(earlier, later).colour_difference == pytest.approx(0.3 * 255 / 3, abs=0.01)


def test_an_empty_picture_has_no_landmarks_to_resemble() -> None:
    empty = place(posts={})
    assert compare_places(empty, place(posts={50: RED})).colour_difference is None
    assert resemblance(empty, place(posts={50: RED})) == 0
    assert resemblance(place(posts={50: RED}), empty) == 0


def test_what_is_hidden_does_not_count() -> None:
    earlier = place(posts={20: RED, 80: BLUE})
    later = place(posts={20: RED, 80: (0.9, 0.9, 0.1)})
    hidden = torch.zeros(FRAME_SIZE, FRAME_SIZE, dtype=torch.bool)
    hidden[:, 78:96] = True
    nothing = torch.zeros_like(hidden)
    assert compare_places(earlier, later).psnr < 20
    for areas in ((hidden, nothing), (nothing, hidden), (hidden, hidden)):
        found = compare_places(earlier, later, hidden=areas)
        assert (found.shift, found.psnr) == (0, math.inf)
        assert found.ssim == pytest.approx(1)
        assert found.colour_difference == pytest.approx(0, abs=1e-4)
    with pytest.raises(UserError, match="everything is hidden"):
        compare_places(earlier, later, hidden=(~nothing, nothing))


def test_rows_above_and_below_the_band_do_not_count() -> None:
    earlier = place(posts={50: RED})
    later = earlier.clone()
    later[:, : BAND.start], later[:, BAND.stop :] = 0, 1
    assert compare_places(earlier, later).psnr == math.inf
    assert torch.equal(landmark_map(earlier), landmark_map(later))


def test_a_blur_costs_sharpness_and_a_still_forgets_what_passes() -> None:
    picture = place(posts={40: RED}, seed=1)
    blurred = torch.nn.functional.avg_pool2d(picture[None], 5, stride=1, padding=2, count_include_pad=False)[0]
    assert sharpness(blurred) < sharpness(picture) / 5
    assert sharpness(place(posts={})) == 0
    frames = torch.stack([place(posts={10 + 16 * t: BLUE}) for t in range(7)])
    assert torch.equal(still(frames), place(posts={}))


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UserError, match="one size, wider than 64"):
        compare_places(torch.zeros(3, 128, 64), torch.zeros(3, 128, 64))
    with pytest.raises(UserError, match="one size"):
        compare_places(torch.zeros(3, 128, 128), torch.zeros(3, 128, 96))


def test_the_world_itself_is_recognised_and_the_hidden_area_covers_its_subject() -> None:
    trips = plan_trips(2)
    windows = rendered_windows(trips, GRID, (0, 2, 4, 6))
    visits = Visits(windows)
    for number, trip in enumerate(trips):
        away = visits.compared("away", number)
        assert (away["resemblance"], away["recognised"], away["shift"]) == (pytest.approx(1), 1, 0)
        assert away["psnr"] == "inf"
        home = visits.compared("home", number)
        assert float(home["psnr"]) > 35
        assert home["resemblance"] is None
        seen = visits.seen(0, number)
        assert seen["colour"] == trip.scene.subject.colour
        assert seen["background"] == trip.scene.background
        assert visits.seen(2, number)["colour"] is None
        assert away["resemblance_of_others"] < 0.9


def test_the_hidden_area_lies_around_the_subject_and_is_empty_without_one() -> None:
    trip = plan_trips(1)[0]
    clip = render([trip.scene], start=60, num_frames=17)[0]
    reading = read_clip(clip)
    area = subject_area(reading, FRAME_SIZE, FRAME_SIZE)
    for frame in range(60, 77):
        subject = trip.scene.state(frame).objects[0]
        assert area[round(subject.screen_y), round(subject.screen_x)]
    assert 0.05 < float(area.float().mean()) < 0.5
    assert not subject_area(replace(reading, colour=None), FRAME_SIZE, FRAME_SIZE).any()


def test_the_way_leads_to_the_same_two_places_twice_and_no_prompt_names_a_landmark() -> None:
    for trip in plan_trips(6, seed=2):
        scene = trip.scene
        holds = {place: [scene.camera_x(s * SEGMENT_FRAMES + 50) for s in RETURNS[place]] for place in RETURNS}
        assert holds["home"][0] == holds["home"][1]
        assert holds["away"][0] == holds["away"][1]
        assert abs(holds["home"][0] - holds["away"][0]) > FRAME_SIZE
        assert [scene.camera_move(s * SEGMENT_FRAMES) == "hold" for s in range(NUM_SEGMENTS)] == [True, False] * 3 + [
            True
        ]
        assert len(trip.prompts) == NUM_SEGMENTS
        assert scene.subject.colour in trip.prompts[0]
        assert not any(kind in text.split() for kind in LANDMARK_KINDS for text in trip.prompts)
    assert plan_trips(2, seed=1)[0].seed != plan_trips(2)[0].seed


def test_segments_begin_with_the_chunk_whose_middle_shows_them() -> None:
    assert [GRID.start_chunk(segment) for segment in range(4)] == [0, 8, 16, 24]
    for grid in (GRID, TripGrid(chunk_frames=1, stride=4), TripGrid(chunk_frames=4, stride=2)):
        for segment in range(1, NUM_SEGMENTS + 1):
            chunk = grid.start_chunk(segment)

            def middle(chunk: int, grid: TripGrid = grid) -> int:
                """The middle one of the pixel frames of the chunk's middle latent frame."""
                latent = chunk * grid.chunk_frames + grid.chunk_frames // 2
                return pixel_frames(latent, grid.stride) + 1

            assert middle(chunk) >= segment * SEGMENT_FRAMES > middle(chunk - 1)
    assert list(GRID.window(2)) == [67, 68, 69, 70, 71]
    assert rendered_windows(plan_trips(1), GRID, [0])[0].shape == (1, 17, 3, FRAME_SIZE, FRAME_SIZE)


def test_similarities_are_told_apart_by_the_part_of_the_way() -> None:
    values = [None, *[0.1] * 7, *[0.2] * 2, *[0.3] * 6, *[0.2] * 2, *[0.4] * 6, *[0.5] * 32]
    rows = {row["part"]: row for row in similarity_rows([{"begin": "own", "prompts": [{"similarities": values}]}])}
    assert rows["hold at home"]["count"] == 7 + 6
    assert rows["hold away"]["percentile_5"] == pytest.approx(0.4, abs=1e-6)
    assert rows["change of segment"]["count"] == 12
    assert rows["pan"]["below"]["0.95"] == 1
    assert similarity_rows([{"begin": "clip", "prompts": [{"similarities": values}]}]) == []
    assert similarity_rows([{"begin": "own", "prompts": [{"similarities": [None] * 56}]}]) == []


def made_up(memory: str, resemblances: list[float], **changes: Any) -> dict[str, Any]:
    values = {"psnr": 20.0, "ssim": 0.5, "resemblance_of_others": 0.3, "recognised": 1.0, "colour_difference": None}
    prompts = [
        {
            "prompt": f"prompt {number}",
            "asked": {"colour": "red", "shape": "ball", "background": "snow"},
            "visits": {"6": {"colour": None, "shape": None, "background": "snow", "sharpness": 10.0}},
            "returns": {"away": values | {"resemblance": value, "remembered_frames": 2, **changes}},
            "similarities": [None],
            "keyframes": ".",
        }
        for number, value in enumerate(resemblances)
    ]
    cell = {"kind": "trips", "begin": "clip", "memory": memory, "attended_frames": 21, "seconds": 1.0}
    return cell | {"prompts": prompts}


def test_memories_are_compared_prompt_by_prompt() -> None:
    cells = [made_up("a", [0.1, 0.5, 0.9]), made_up("b", [0.2, 0.6, 1.0], psnr="inf")]
    rows = summarise_recall(cells, reference="a")["returns"]
    assert [row["memory"] for row in rows] == ["a", "b"]
    assert rows[0]["differences"] == {}
    difference = rows[1]["differences"]["resemblance"]
    assert difference["mean"] == pytest.approx(0.1)
    assert difference["low"] == pytest.approx(0.1)  # the same for each prompt, although prompts differ widely
    assert difference["high"] == pytest.approx(0.1)
    assert rows[1]["differences"]["psnr"]["mean"] == "inf"
    assert rows[1]["differences"]["colour_difference"] is None
    assert rows[0]["subject"] == {
        "correct": 3,
        "count": 3,
        "share": 1.0,
        "low": pytest.approx(0.438, abs=0.001),
        "high": 1,
    }


def test_it_says_what_it_cannot_do() -> None:
    for changes, words in [
        ({"num_prompts": 1}, "`own_prompts` must be from 2 to `num_prompts`, got 8 of 1"),
        ({"own_prompts": 1}, "got 1 of 16"),
        ({"memories": ()}, "`memories` must name different memories, got none"),
        ({"memories": ("window:21", "window:21")}, "must name different memories"),
        ({"memories": ("window:21", "huge"), "own_memories": ()}, "A memory must be"),
        ({"memories": ("window:21/uniform",), "own_memories": ()}, "Only slow memory has keyframes"),
        ({"own_memories": ("window:9",)}, "must be of `memories`; window:9 is not"),
        ({"settings": ("4",)}, "`settings` must be steps@guidance"),
        ({"settings": ("0@1",)}, "at least 1 step"),
    ]:
        with pytest.raises(UserError, match=words):
            RecallBench(output=Path("x"), **changes)  # type: ignore[arg-type]
    assert named_memory("slow-fast:3+12+6/uniform").keyframe_rule == "uniform"
    assert named_memory("sink+window:3+9") == named_memory("sink+window")
    assert Settings.parse("8@1.5") == Settings(num_inference_steps=8, guidance_scale=1.5)


SMALL = ("--num-prompts", "2", "--own-prompts", "2", "--settings", "1@1,1@2")
MEMORIES = ("--memories", "slow-fast:3+3+6@0.9999,window:6", "--own-memories", "window:6")


@pytest.fixture
def one_chunk_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("world.scene", "bench.recall.trip"):
        monkeypatch.setattr(f"vidaccel.{module}.SEGMENT_FRAMES", 12)
    monkeypatch.setattr("vidaccel.bench.recall.trip.WINDOW_FRAMES", 2)
    assert [GRID.start_chunk(segment) for segment in range(NUM_SEGMENTS + 1)] == list(range(NUM_SEGMENTS + 1))


@pytest.fixture
def student_folder(tiny_wan_folder: Path, tmp_path: Path) -> Path:
    tiny_student(tiny_wan_folder).save_pretrained(tmp_path / "student")
    settings = {"defaults": {"height": FRAME_SIZE, "width": FRAME_SIZE, "fps": 16, "max_sequence_length": 16}}
    (tmp_path / "student" / "vidaccel.json").write_text(json.dumps(settings))
    return tmp_path / "student"


@pytest.mark.usefixtures("one_chunk_a_segment")
def test_all_of_it_at_toy_size_and_nothing_is_made_twice(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidaccel.bench.recall.settings.NUM_CHUNKS", 1)
    monkeypatch.setattr("vidaccel.bench.recall.trip._BATCH", 1)
    output = tmp_path / "results"
    arguments = ["bench", "recall", "--output", str(output), "--model", str(student_folder), "--device", "cpu"]
    arguments += [*SMALL, *MEMORIES, "--keep-pictures"]
    assert run(arguments) == 0
    assert {path.name for path in output.iterdir()} == {"recall.json", "recall.md", "recall.png", "pictures"}
    assert len(list((output / "pictures").iterdir())) == 3
    result = json.loads((output / "recall.json").read_text())
    slow, window, own, *settings = result["records"]
    assert [record["settings"] for record in settings] == ["1@1", "1@2"]
    assert [len(cell["prompts"]) for cell in (slow, window, own)] == [2, 2, 2]
    assert list(slow["prompts"][0]["returns"]) == ["away"]
    assert list(slow["prompts"][0]["visits"]) == ["6"]
    assert list(own["prompts"][0]["returns"]) == ["home", "away"]
    assert list(own["prompts"][0]["visits"]) == ["0", "2", "4", "6"]
    assert all(len(prompt["similarities"]) == len(prompt["keyframes"]) == 7 for prompt in slow["prompts"])
    assert slow["prompts"][1]["similarities"][1] < 1  # chunks of the clip are noted too
    assert window["prompts"][0]["similarities"] == [None] * 7
    assert [prompt["returns"]["away"]["remembered_frames"] for prompt in window["prompts"]] == [0, 0]
    assert own["prompts"][0]["returns"]["home"]["remembered_frames"] == 0
    assert window["attended_frames"] == 6
    text = (output / "recall.md").read_text()
    assert "Less slow-fast:3+3+6@0.9999, prompt by prompt:" in text
    assert "| window:6 | 6 | 0.0 |" in text

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    for name in ("take_trips", "measure_settings"):
        monkeypatch.setattr(f"vidaccel.bench.recall.recall.{name}", never)
    assert run(arguments) == 0
    assert json.loads((output / "recall.json").read_text())["records"] == result["records"]


@pytest.mark.usefixtures("one_chunk_a_segment")
def test_what_is_remembered_at_the_return_is_counted_as_the_memory_keeps_it(tiny_wan_folder: Path) -> None:
    pipe, trips = tiny_student(tiny_wan_folder), plan_trips(1)
    counts = {
        name: take_trips(pipe, trips, named_memory(name), max_sequence_length=16).remembered
        for name in ("full:21", "sink+window:3+3", "slow-fast:3+3+3/uniform", "window:6")
    }
    assert counts["full:21"] == {"home": [3], "away": [3]}
    assert counts["window:6"] == {"home": [0], "away": [0]}
    assert counts["sink+window:3+3"] == {"home": [3], "away": [0]}
    assert counts["slow-fast:3+3+3/uniform"] == {"home": [3], "away": [1]}


@pytest.mark.usefixtures("one_chunk_a_segment")
def test_trips_are_the_same_alone_and_in_a_batch_and_go_on_from_a_clip(tiny_wan_folder: Path) -> None:
    pipe, trips = tiny_student(tiny_wan_folder), plan_trips(2)
    memory = named_memory("slow-fast:3+3+6@0.9999")
    given = encode_trips(pipe.vae, trips, GRID, 5)
    assert given.shape[2] == GRID.start_chunk(5) * 3
    together = take_trips(pipe, trips, memory, given=given, max_sequence_length=16)
    assert list(together.windows) == [6]
    alone = take_trips(pipe, trips[1:], memory, given=given[1:], max_sequence_length=16)
    torch.testing.assert_close(together.windows[6][1:], alone.windows[6], atol=2 / 255, rtol=0)
    assert together.keyframes[1] == alone.keyframes[0]
    fresh = take_trips(pipe, trips[1:], memory, max_sequence_length=16)
    assert not torch.equal(fresh.windows[6], alone.windows[6])

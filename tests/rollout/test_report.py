"""The record of a rollout against the chunks it was made from, its bounded size, and its picture."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from vidaccel.memory import MemoryConfig, MemoryIndex
from vidaccel.rollout.chunk import Chunk
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.rollout.report import RolloutReport, spread

PARTS = ("sink", "slow", "fast")


def made_chunks(num_chunks: int, config: MemoryConfig, *, prompt_every: int = 1000, decode: bool = True) -> list[Chunk]:
    """Chunks without contents, with the bookkeeping of a real memory."""
    random_numbers = random.Random(0)
    index = MemoryIndex(config)
    chunks = []
    for number in range(num_chunks):
        first_frame = index.num_frames
        similarity = None if number == 0 else random_numbers.uniform(0.9, 1)
        index.begin_chunk()
        index.commit(similarity)
        pixels = torch.zeros(1, 9 if number == 0 else 12, 3, 1, 1, dtype=torch.uint8)
        chunks.append(
            Chunk(
                index=number,
                first_frame=first_frame,
                latents=torch.zeros(1, 1, config.chunk_frames, 1, 1),
                frames=pixels if decode else None,
                prompt=f"prompt {number // prompt_every}",
                seconds={"denoising": random_numbers.uniform(0.2, 0.3), "clean_pass": 0.05, "decoding": 0.1},
                sink=index.sink,
                slow=index.slow,
                fast=index.fast,
                is_keyframe=index.is_keyframe,
                similarity=similarity if config.keyframe_rule == "similarity" else None,
            )
        )
    return chunks


def reported(chunks: list[Chunk], config: MemoryConfig, passes_per_chunk: int = 5) -> RolloutReport:
    report = RolloutReport(config, ChunkGrid(chunk_frames=3, fps=16), passes_per_chunk=passes_per_chunk)
    for chunk in chunks:
        report.add(chunk, bytes_by_part={"sink": 3 * chunk.index, "reserved": 21})
    return report


def test_frames_that_came_back_are_counted_and_no_others() -> None:
    config = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6)
    chunks = made_chunks(8, config)
    chunks[6] = replace(chunks[6], slow=(4, 5))
    chunks[7] = replace(chunks[7], slow=(4,))
    report = reported(chunks, config)
    assert reported(made_chunks(60, config), config).returns() == []
    assert [pair for pair in report.returns() if pair[0] in (4, 5)] == [(4, 6), (5, 6)]
    assert report.to_dict()["num_returns"] == len(report.returns())


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(),
        MemoryConfig(prefill="linear"),
        MemoryConfig(keyframe_rule="uniform"),
        MemoryConfig(mode="official"),
        MemoryConfig.sliding_window(12),
    ],
    ids=["similarity", "linear", "uniform", "official", "window"],
)
def test_the_stays_say_of_every_chunk_what_was_remembered(config: MemoryConfig) -> None:
    chunks = made_chunks(60, config)
    report = reported(chunks, config)
    for part in PARTS:
        stays = report.stays(part)
        for chunk in chunks:
            inside = [
                stay.frame
                for stay in stays
                if stay.entered <= chunk.index and (stay.left is None or chunk.index < stay.left)
            ]
            assert sorted(inside) == sorted(set(getattr(chunk, part)))
    assert report.keyframe_chunks == tuple(chunk.index for chunk in chunks if chunk.is_keyframe)


def test_totals_are_those_of_the_chunks() -> None:
    chunks = made_chunks(40, MemoryConfig(), prompt_every=15)
    values = reported(chunks, MemoryConfig()).to_dict()
    assert values["num_chunks"] == 40
    assert values["decoder"] is None
    assert values["num_pixel_frames"] == 9 + 39 * 12
    assert values["num_keyframes"] == sum(chunk.is_keyframe for chunk in chunks) > 5
    assert values["memory_bytes"] == {"sink": 117, "reserved": 21}
    assert values["prompts"] == [{"chunk": start, "prompt": f"prompt {start // 15}"} for start in (0, 15, 30)]
    times = [sum(chunk.seconds.values()) for chunk in chunks]
    assert values["seconds"]["chunk"]["total"] == pytest.approx(sum(times))
    assert values["seconds"]["clean_pass"] == pytest.approx({"total": 2, "p50": 0.05, "p95": 0.05})
    assert values["pixel_frames_per_second"] == pytest.approx(39 * 12 / sum(times[1:]))  # the first one warms up
    assert values["chunks"]["first_frame"] == [chunk.first_frame for chunk in chunks]
    assert values["chunks"]["similarity"] == [chunk.similarity for chunk in chunks]


def test_the_median_and_the_95th_percentile_are_those_of_torch() -> None:
    torch.manual_seed(0)
    seconds = torch.rand(37, dtype=torch.float64)
    found = spread([*seconds.tolist(), math.nan])
    assert found is not None
    assert found["p50"] == pytest.approx(float(seconds.quantile(0.5)))
    assert found["p95"] == pytest.approx(float(seconds.quantile(0.95)))
    assert spread([math.nan]) is None


def test_every_chunk_counts_its_steps_and_the_pass_that_writes_the_memory() -> None:
    config = MemoryConfig()
    chunks = made_chunks(7, config)
    num_frames = 7 * config.chunk_frames
    assert reported(chunks, config).num_passes == (4 + 1) * num_frames // 3
    given = [replace(chunk, origin="given") for chunk in chunks[:2]]
    assert reported([*given, *chunks[2:]], config).num_passes == 2 + 5 * 5
    saved = [replace(chunk, origin="saved", seconds={}) for chunk in chunks[:2]]
    assert reported([*saved, *chunks[2:]], config).num_passes == 5 * 5


def test_a_report_survives_strict_json_without_times_and_similarities() -> None:
    config = MemoryConfig(keyframe_rule="none")
    chunks = made_chunks(5, config, decode=False)
    report = RolloutReport(config, ChunkGrid(chunk_frames=3, fps=16), passes_per_chunk=5)
    for chunk in chunks:
        report.add_recorded({**vars(chunk), "num_pixel_frames": 0})
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["chunks"]["similarity"] == [None] * 5
    assert values["chunks"]["seconds"] == {"chunk": [None] * 5}
    assert values["pixel_frames_per_second"] is None
    assert values["num_passes"] == 0
    assert report.start_seconds() == [0, 9 / 16, 21 / 16, 33 / 16, 45 / 16, 57 / 16]  # by the grid


def test_a_rollout_that_went_on_has_the_memory_of_all_and_the_times_of_what_was_measured() -> None:
    config = MemoryConfig()
    chunks = made_chunks(30, config)
    whole = reported(chunks, config)
    resumed = RolloutReport(config, ChunkGrid(chunk_frames=3, fps=16), passes_per_chunk=5)
    for chunk in chunks[:20]:
        recorded: dict[str, Any] = {**vars(chunk), "num_pixel_frames": 9 if chunk.index == 0 else 12}
        resumed.add_recorded(json.loads(json.dumps({**recorded, "latents": None, "frames": None})))
    for chunk in chunks[20:]:
        resumed.add(chunk)
    assert all(resumed.stays(part) == whole.stays(part) for part in PARTS)
    assert [math.isnan(value) for value in resumed.chunk_seconds()] == [True] * 20 + [False] * 10
    assert resumed.chunk_seconds()[20:] == whole.chunk_seconds()[20:]
    times = [sum(chunk.seconds.values()) for chunk in chunks]
    assert resumed.pixel_frames_per_second == pytest.approx(9 * 12 / sum(times[21:]))
    assert resumed.num_passes == 10 * 5


def test_the_way_of_the_camera_is_written_down_for_every_latent_frame() -> None:
    config = MemoryConfig()
    chunks = made_chunks(4, config)
    assert "camera" not in reported(chunks, config).to_dict()
    told = [replace(chunk, camera=([chunk.index, 0.5, 0.25], [0.0] * 3)) for chunk in chunks]
    expected = [position for chunk in range(4) for position in (chunk, 0.5, 0.25)]
    assert reported(told, config).to_dict()["camera"] == expected
    # Of chunks that were made before the camera was told, it held.
    assert reported([*chunks[:2], *told[2:]], config).to_dict()["camera"] == [0.0] * 6 + expected[6:]


def test_a_phase_that_comes_later_took_no_time_before() -> None:
    config = MemoryConfig()
    chunks = made_chunks(4, config)
    chunks[2] = replace(chunks[2], seconds={**chunks[2].seconds, "recache": 1.5})
    report = reported(chunks, config)
    assert report.phase_seconds()["recache"] == [0, 0, 1.5, 0]
    assert report.chunk_seconds()[2] == pytest.approx(sum(chunks[2].seconds.values()))


def test_a_chunk_costs_about_a_hundred_bytes_however_long_the_video_is() -> None:
    import tracemalloc

    config = MemoryConfig()
    chunks = made_chunks(1200, config)
    report = RolloutReport(config, ChunkGrid(chunk_frames=3, fps=16), passes_per_chunk=5)
    for chunk in chunks[:200]:
        report.add(chunk)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for chunk in chunks[200:]:
        report.add(chunk)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / 1000 < 200


@pytest.mark.parametrize(
    ("num_chunks", "config"),
    [
        (1, MemoryConfig()),
        (30, MemoryConfig()),
        (30, MemoryConfig.sliding_window(9)),
        (12, MemoryConfig(keyframe_rule="uniform")),
        (400, MemoryConfig()),
    ],
    ids=["one", "similarity", "window", "uniform", "long"],
)
def test_the_picture_is_drawn_for_every_kind_of_memory(tmp_path: Path, num_chunks: int, config: MemoryConfig) -> None:
    report = reported(made_chunks(num_chunks, config, prompt_every=10), config)
    path = report.save_picture(tmp_path / "report.png")
    with Image.open(path) as picture:
        assert picture.size[0] == 1650
        colours = {pixel for _, pixel in picture.convert("RGB").getcolors(2**24) or ()}
    assert (0x8F, 0xBF, 0x9A) in colours  # fast
    assert ((0xE0, 0x8A, 0x2E) in colours) == bool(config.slow_frames)  # at least in the legend
    assert [file.name for file in tmp_path.iterdir()] == ["report.png"]


def test_a_report_without_chunks_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chunks to draw"):
        reported([], MemoryConfig()).save_picture(tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


def test_long_prompts_are_written_in_as_many_lines_as_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "a small red ball hops up and down on a grassy meadow while the camera holds, and it begins to snow"
    chunks = [replace(chunk, prompt=f"{chunk.index // 9} {long}") for chunk in made_chunks(19, MemoryConfig())]
    figures, save = [], Figure.savefig

    def noting(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noting)
    reported(chunks, MemoryConfig()).save_picture(tmp_path / "report.png")
    written = [label.get_text() for label in figures[0].axes[0].texts]
    assert [text.replace("\n", " ") for text in written[:2]] == [f"{number} {long}" for number in range(2)]
    assert all(text.count("\n") == 2 for text in written[:2])
    assert written[2].endswith(" ...")
    assert written[2].count("\n") < 2

"""The bank of encoded trips: what is in it, and which of its chunks are returns, arrivals and changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vidaccel.training import trip_bank
from vidaccel.training.causal_student import load_donor
from vidaccel.training.latents import caption_tokens
from vidaccel.training.trip_bank import (
    CHUNK_FRAMES,
    Clip,
    DrawnClips,
    build_trip_bank,
    clip_caption,
    landmark_coverage,
    long_scene,
    pixels_per_column,
    training_clips,
)
from vidaccel.training.trip_rows import row_tables
from vidaccel.training.vae_clip import encode_clip
from vidaccel.world import FRAME_SIZE, Scene, render, subject_mask
from vidaccel.world.trip import Trip, latent_cameras
from vidaccel.world.trip_render import render_trips, trip_mask
from vidaccel.world.trips import random_trip

CHUNKS = 3


def test_clips_are_trips_and_every_fifth_run_holds_old_scenes_of_the_same_length() -> None:
    clips = training_clips(range(160), num_chunks=CHUNKS)
    scenes = [index for index, clip in enumerate(clips) if isinstance(clip, Scene)]
    assert scenes == [*range(64, 80), *range(144, 160)]
    assert {clip.num_frames for clip in clips} == {12 * CHUNKS - 3}
    holds = [clip.camera == "hold" for clip in training_clips(range(80), num_chunks=15) if isinstance(clip, Scene)]
    assert any(holds)
    assert not all(holds)


def test_a_bank_holds_what_encoding_each_clip_alone_gives(donor_folder: str) -> None:
    donor = load_donor(donor_folder)
    clips = [random_trip(1, num_chunks=CHUNKS), random_trip(2, num_chunks=CHUNKS), long_scene(3, num_frames=33)]
    counted: list[tuple[int, int]] = []
    bank = build_trip_bank(donor.vae, donor.tokenizer, trips=clips, on_progress=lambda *count: counted.append(count))
    assert counted == [(2, 3), (3, 3)]
    assert bank.clips == tuple(clips)
    assert (bank.num_chunks, bank.latents.dtype, pixels_per_column(donor.vae)) == (CHUNKS, torch.float16, 16)
    video = render_trips([clips[1]]).transpose(1, 2) * 2 - 1
    expected = (encode_clip(donor.vae, video).chunk(2, dim=1)[0] - 0.1) / 0.5
    torch.testing.assert_close(bank.latents[1].float(), expected[0].transpose(0, 1), atol=2e-3, rtol=2e-3)
    for row, clip in enumerate(clips):
        columns, motions = latent_cameras(clip)
        assert bank.columns[row].tolist() == pytest.approx([x / 16 for x in columns], abs=1e-5)
        assert bank.motions[row].tolist() == pytest.approx([x / 16 for x in motions], abs=1e-5)
        texts = [clip_caption(clip, chunk) for chunk in range(CHUNKS)]
        assert torch.equal(bank.tokens[row], caption_tokens(donor.tokenizer, texts))
        mask = trip_mask([clip]) if isinstance(clip, Trip) else subject_mask([clip])
        assert bank.coverage[row, 0].float().mean() == pytest.approx(float(mask[0, 0].mean()), abs=1e-3)


def test_building_ends_when_its_time_is_over_with_the_clips_it_has(
    donor_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trip_bank, "_CHUNKS_AT_A_TIME", 8)
    donor = load_donor(donor_folder)
    for num_frames, together in ((9, 8), (33, 2)):
        clips = [long_scene(seed, num_frames=num_frames) for seed in range(9)]
        bank = build_trip_bank(donor.vae, donor.tokenizer, trips=clips, seconds=0.0)
        assert len(bank.latents) == len(bank.clips) == together
    with pytest.raises(ValueError, match="at least one clip"):
        build_trip_bank(donor.vae, donor.tokenizer, trips=[])


def test_clips_there_is_no_time_for_are_not_drawn(donor_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trip_bank, "_CHUNKS_AT_A_TIME", 4)
    donor = load_donor(donor_folder)
    drawn: list[int] = []

    def draw(place: int) -> Clip:
        drawn.append(place)
        return random_trip(place, num_chunks=2)

    counted: list[tuple[int, int]] = []
    bank = build_trip_bank(
        donor.vae,
        donor.tokenizer,
        trips=DrawnClips(10**9, draw),
        seconds=0.0,
        on_progress=lambda *count: counted.append(count),
    )
    assert (len(bank.clips), counted) == (2, [(2, 10**9)])
    assert max(drawn) <= 2
    assert DrawnClips(5, draw)[1:3] == [random_trip(1, num_chunks=2), random_trip(2, num_chunks=2)]


def test_landmarks_cover_the_cells_that_change_when_they_are_taken_away() -> None:
    scene = long_scene(4, num_frames=9)
    cameras = torch.tensor([latent_cameras(scene)[0]])
    covered = landmark_coverage([scene], cameras, cells=(16, 16))[0, 0]
    away = replace(scene, landmarks=tuple(replace(mark, x=-999.0) for mark in scene.landmarks))
    shown = (render([scene], num_frames=1) - render([away], num_frames=1)).abs().amax(2)[0, 0] > 0.02
    cells = shown.float().unflatten(0, (16, -1)).unflatten(2, (16, -1)).mean((1, 3))
    assert (cells - covered).abs().mean() < 0.03
    assert cells.mean() > 0.02


def seen_by_hand(clip: Trip, chunk: int) -> tuple[bool, bool]:
    """Whether a chunk shows 32 new pixels that older chunks of its prompt showed, and 32 that none did."""

    def pixels(chunks: list[int]) -> set[int]:
        columns, _ = latent_cameras(clip)
        lefts = [columns[frame] for number in chunks for frame in range(3 * number, 3 * number + CHUNK_FRAMES)]
        return {
            bin for left in lefts for bin in range(-20, 60) if left <= 16 * bin and 16 * bin + 16 <= left + FRAME_SIZE
        }

    new = pixels([chunk]) - pixels([chunk - 1])
    older = list(range(chunk - 1))
    same = [number for number in older if clip.span_at(number) == clip.span_at(chunk)]
    return len(new & pixels(same)) >= 2, len(new - pixels(older)) >= 2


def test_returns_and_arrivals_are_found_as_by_hand() -> None:
    trips = [random_trip(seed, num_chunks=15) for seed in range(12)]
    tables = row_tables(trips, chunk_frames=CHUNK_FRAMES)
    by_hand = {(row, chunk): seen_by_hand(trip, chunk) for row, trip in enumerate(trips) for chunk in range(1, 15)}
    assert set(tables.returns) == {pair for pair, (is_return, _) in by_hand.items() if is_return}
    new = {pair for pair, (_, is_new) in by_hand.items() if is_new} | {(row, 0) for row in range(12)}
    assert new <= set(tables.arrivals)
    later = set(tables.arrivals) - new
    assert later
    assert all((row, chunk - 1) in new and trips[row].holds(chunk) is not None for row, chunk in later)
    assert len(tables.returns) > 12


def test_changes_and_keyframes_follow_from_prompts_and_camera() -> None:
    trips = [random_trip(seed, num_chunks=15, change_share=1.0) for seed in range(12)]
    tables = row_tables(trips, chunk_frames=CHUNK_FRAMES)
    assert tables.changes
    for row, chunk in tables.changes:
        span = trips[row].span_at(chunk)
        assert 0 <= chunk - span.start_chunk < 4
        assert span.start_chunk > 0
        assert abs(trips[row].holds(chunk) - FRAME_SIZE * trips[row].subject_stop) <= 32
        assert tables.changes.count((row, chunk)) == (5 if chunk == span.start_chunk else 1)
    for trip, keyframes in zip(trips, tables.keyframes, strict=True):
        starts = {span.start_chunk for span in trip.spans[1:]}
        turns = {c for c in range(1, 15) if (trip.holds(c) is None) != (trip.holds(c - 1) is None)}
        assert set(keyframes) == starts | turns

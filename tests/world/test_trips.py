"""Trips: the camera comes back, prompts change on the way, and every frame is drawn as its span says."""

import itertools

import pytest
import torch

from vidaccel import world
from vidaccel.world.scene import COMBINATIONS, FRAME_SIZE, Scene

TRIPS = [world.random_trip(seed) for seed in range(300)]


def combination(span):
    return span.subject.colour, span.subject.shape, span.subject.motion, span.background


def frames_of(chunk):
    return range(max(12 * chunk - 3, 0), 12 * chunk + 9)


def changed(before, after, trip):
    pairs = zip(world.CHANGES, combination(before), combination(after), strict=False)
    found = {name for name, old, new in pairs if old != new}
    kinds = [span.landmarks[trip.subject_stop].kind for span in (before, after)]
    return found | ({"landmark"} if kinds[0] != kinds[1] else set())


def test_the_same_seed_gives_the_same_trip_twice():
    assert world.random_trip(3) == TRIPS[3] != TRIPS[4]
    assert world.test_trip(3, kind="shift") == world.test_trip(3, kind="shift")
    assert torch.equal(world.render_trips(TRIPS[:1], num_frames=2), world.render_trips(TRIPS[:1], num_frames=2))


def test_a_trip_is_one_frame_and_chunks_of_three_latent_frames_long():
    assert (TRIPS[0].num_chunks, TRIPS[0].num_frames) == (15, 177)
    columns, motions = world.latent_cameras(TRIPS[0])
    assert len(columns) == len(motions) == 45


def test_the_camera_rests_or_moves_for_whole_chunks():
    for trip in TRIPS:
        for chunk in range(trip.num_chunks):
            seen = {trip.camera_x(frame) for frame in frames_of(chunk)}
            rest = trip.holds(chunk)
            assert (seen == {rest}) if rest is not None else (len(seen) == 12), (trip.seed, chunk)


def test_the_camera_never_jumps_and_pans_at_most_24_pixels_a_frame():
    for trip in TRIPS:
        x = [trip.camera_x(frame) for frame in range(trip.num_frames)]
        assert max(abs(b - a) for a, b in itertools.pairwise(x)) < 24, trip.seed


def test_the_camera_of_a_latent_frame_is_the_mean_of_its_pixel_frames():
    trip = next(trip for trip in TRIPS if trip.holds(2) is None)
    columns, motions = world.latent_cameras(trip)
    assert columns[0] == trip.camera_x(0)
    assert columns[7] == pytest.approx(sum(trip.camera_x(frame) for frame in range(25, 29)) / 4)
    assert motions[0] == 0
    assert motions[7] == pytest.approx(columns[7] - columns[6])
    assert motions[7] != 0


def test_most_pans_lead_back_and_two_in_five_rests_stand_beside_the_stop():
    back = new = shifted = rests = 0
    for trip in TRIPS:
        seen = set()
        for move in trip.camera_moves:
            if move.distance == 0:
                stop, rests, shifted = round(move.x / FRAME_SIZE), rests + 1, shifted + (move.x % FRAME_SIZE != 0)
                assert seen or move.x == FRAME_SIZE * trip.subject_stop
                assert abs(move.x - FRAME_SIZE * stop) <= 40
                back, new = back + (stop in seen), new + (stop not in seen)
                seen.add(stop)
    assert 0.3 < shifted / (rests - len(TRIPS)) < 0.45
    assert back / (back + new - len(TRIPS)) > 0.55


def test_two_in_five_trips_change_and_every_change_is_named():
    counts = dict.fromkeys(world.CHANGES, 0)
    for trip in TRIPS:
        for before, after in itertools.pairwise(trip.spans):
            what = changed(before, after, trip)
            assert 1 <= len(what) <= 2
            for name in what:
                counts[name] += 1
            assert after.names_landmark or "landmark" not in what
            assert after.names_place or "background" not in what
            texts = [world.trip_caption(trip, chunk) for chunk in (after.start_chunk - 1, after.start_chunk)]
            assert texts[0] != texts[1]
    assert 0.3 < sum(len(trip.spans) > 1 for trip in TRIPS) / len(TRIPS) < 0.5
    assert min(counts.values()) > 10
    assert all(len(world.random_trip(seed, change_share=0).spans) == 1 for seed in range(40))


def test_most_changes_happen_while_the_subject_is_in_view():
    in_view = []
    for trip in TRIPS:
        for span in trip.spans[1:]:
            frame = 12 * span.start_chunk
            in_view.append(8 < trip.subject_xy(frame)[0] - trip.camera_x(frame) < 120)
    assert sum(in_view) / len(in_view) > 0.7


def test_the_subject_stays_in_its_home_screen_and_never_jumps():
    for trip in TRIPS:
        path = [trip.subject_xy(frame) for frame in range(trip.num_frames)]
        left = FRAME_SIZE * trip.subject_stop
        assert all(10 <= x - left <= 118 and 36 <= y <= 84 for x, y in path), trip.seed
        assert max(abs(b - a) for one, two in itertools.pairwise(path) for a, b in zip(one, two, strict=True)) < 8


def test_a_walker_walks_at_walking_speed_until_its_span_ends():
    walks = [move for trip in TRIPS for move in trip.subject_moves if move.kind in ("left", "right")]
    assert len(walks) > 50
    for move in walks:
        speed = move.distance / move.num_frames * (1 if move.kind == "right" else -1)
        assert 0.3 <= speed <= 0.5


def test_a_trip_of_minutes_has_a_subject_that_need_not_walk_out_of_its_home():
    for seed in range(20):
        trip = world.test_trip(seed, away_chunks=160)
        assert trip.spans[0].subject.motion in ("still", "hop", "loop")
        assert trip.num_frames / 16 > 120


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_span_of_a_trip_is_a_combination_of_its_split(split):
    trips = [world.random_trip(seed, split=split, change_share=1) for seed in range(200)]
    assert {combination(span) for trip in trips for span in trip.spans} <= set(COMBINATIONS[split])


def test_landmarks_are_drawn_with_replacement_one_a_stop():
    repeats = 0
    for trip in TRIPS:
        marks = trip.spans[0].landmarks
        assert [int(mark.x // FRAME_SIZE) for mark in marks] == list(range(5))
        assert all(36 <= mark.x % FRAME_SIZE <= 94 for mark in marks)
        repeats += len({mark.kind for mark in marks}) < 5
    assert repeats > 100


def test_captions_of_trips_stay_in_the_vocabulary_and_say_nothing_of_the_camera():
    known = set(world.vocabulary()) - {"camera", "view", "pans", "holds"}
    without_place, texts = 0, set()
    places = {"meadow", "desert", "night", "snowy", "snow", "beach", "seaside"}
    for trip in TRIPS:
        for span in trip.spans:
            text = world.trip_caption(trip, span.start_chunk)
            words = set(text.replace(",", "").split())
            assert words <= known, words - known
            assert {span.subject.colour, span.subject.shape} <= words
            assert (f", near a {span.landmarks[trip.subject_stop].kind}" in text) == span.names_landmark
            assert bool(words & places) == span.names_place
            without_place += not span.names_place
            texts.add(text)
    assert 0.03 < without_place / len(TRIPS) < 0.15
    named = next(trip for trip in TRIPS if trip.spans[0].names_place)
    assert len({world.trip_caption(named, 0, paraphrase=index) for index in range(40)}) > 8


def test_what_a_change_leaves_alone_is_worded_alike():
    for seed in range(20):
        trip = world.change_trip(seed, "colour")
        before, after = (world.trip_caption(trip, chunk).replace("an orange", "a orange") for chunk in (3, 4))
        old, new = (span.subject.colour for span in trip.spans)
        assert before.replace(old, new) == after


@pytest.mark.parametrize("attribute", world.CHANGES)
def test_a_change_trip_holds_and_changes_one_thing_after_four_chunks(attribute):
    for seed in range(32):
        trip = world.change_trip(seed, attribute)
        assert [span.start_chunk for span in trip.spans] == [0, 4]
        assert {trip.holds(chunk) for chunk in range(16)} == {float(FRAME_SIZE * trip.subject_stop)}
        assert changed(*trip.spans, trip) == {attribute}
        assert {combination(span) for span in trip.spans} <= set(COMBINATIONS["test"])


@pytest.mark.parametrize(("kind", "length"), [("return", 15), ("three", 21), ("shift", 15)])
def test_a_test_trip_leaves_a_place_and_ends_there(kind, length):
    for seed in range(40):
        trip = world.test_trip(seed, kind=kind)
        assert trip.num_chunks == length
        first, second = ({trip.holds(chunk) for chunk in visit} for visit in (trip.first_visit, trip.second_visit))
        assert first == {float(FRAME_SIZE * trip.target_stop)}
        shift = {abs(place - FRAME_SIZE * trip.target_stop) for place in second}
        assert shift == ({24.0} if kind == "shift" else {0.0})
        assert trip.second_visit.stop == length
        assert trip.holds(trip.prefix_chunks - 1) is not None
        assert trip.holds(trip.prefix_chunks) is None
        assert trip.subject_stop != trip.target_stop
        shows = [trip.shows_target(chunk) for chunk in range(length)]
        assert all(shows[chunk] for chunk in (*trip.first_visit, *trip.second_visit))
        assert not any(shows[6 : trip.prefix_chunks])
        stops = {round(trip.holds(chunk) / FRAME_SIZE) for chunk in range(length) if trip.holds(chunk) is not None}
        assert len(stops) == (3 if kind == "three" else 2)
        assert combination(trip.spans[0]) in COMBINATIONS["test"]


def test_the_target_is_seen_in_no_chunk_that_is_said_not_to_show_it():
    trip = world.test_trip(5)
    other = world.swapped(trip, 1)
    for chunk in range(trip.num_chunks):
        pictures = [world.render_trips([one], start=frames_of(chunk)[0], num_frames=12)[0] for one in (trip, other)]
        assert trip.shows_target(chunk) == (not torch.equal(*pictures)), chunk


def test_a_swapped_trip_differs_in_the_target_alone():
    trip = world.test_trip(2, kind="three")
    other = world.swapped(trip, 7)
    assert other.target.kind != trip.target.kind
    assert other.target.colour != trip.target.colour
    assert other.target_x == trip.target_x
    assert (other.camera_moves, other.subject_moves) == (trip.camera_moves, trip.subject_moves)
    stop = trip.target_stop
    assert [mark for at, mark in enumerate(other.spans[0].landmarks) if at != stop] == [
        mark for at, mark in enumerate(trip.spans[0].landmarks) if at != stop
    ]


def test_detours_go_to_the_third_place_again_and_again_and_change_nothing_else():
    once, often = (world.test_trip(2, kind="three", detours=count) for count in (1, 4))
    assert often.num_chunks == once.num_chunks + 3 * 6
    assert (often.first_visit, often.target_stop, often.spans[0].landmarks) == (
        once.first_visit,
        once.target_stop,
        once.spans[0].landmarks,
    )
    rests = [often.holds(chunk) for chunk in range(often.num_chunks)]
    stops = [place for place, _ in itertools.groupby(place for place in rests if place is not None)]
    b, a, c = (stops[place] for place in (1, 0, 3))
    assert stops == [a, b, *[a, c] * 4, a, b]
    assert world.test_trip(3, kind="return", detours=1) == world.test_trip(3, kind="return")
    with pytest.raises(ValueError, match="`detours` must be at least 1, got 0"):
        world.test_trip(3, kind="three", detours=0)
    with pytest.raises(ValueError, match='Only trips of the kind "three" have `detours`, got 2'):
        world.test_trip(3, kind="shift", detours=2)


class Twin(Scene):
    """A scene that stands where a trip stands in one frame; `render` draws it."""

    def camera_x(self, frame):
        return self.camera_moves.camera_x(frame)

    def subject_xy(self, frame):
        return self.camera_moves.subject_xy(frame)


def twin(trip, span):
    return Twin(
        seed=0, num_frames=trip.num_frames, background=span.background, camera="hold", subject=span.subject,
        landmarks=span.landmarks, subject_moves=(), camera_moves=trip, phases=trip.phases,
    )  # fmt: skip


def test_a_trip_without_change_is_drawn_as_a_scene_frame_by_frame():
    trips = [world.random_trip(seed, num_chunks=4, change_share=0) for seed in (1, 2, 5)]
    together = world.render_trips(trips)
    for trip, frames in zip(trips, together, strict=True):
        for frame in range(0, trip.num_frames, 4):
            alone = world.render([twin(trip, trip.spans[0])], start=frame, num_frames=1)[0, 0]
            torch.testing.assert_close(frames[frame], alone, atol=5e-4, rtol=0)


def test_a_part_of_a_trip_is_rendered_as_in_the_whole():
    trips = [world.change_trip(1, "background"), world.random_trip(8, num_chunks=16, change_share=1)]
    whole = world.render_trips(trips, start=20, num_frames=60)
    for start in (20, 41, 50, 70):
        part = world.render_trips(trips, start=start, num_frames=8)
        torch.testing.assert_close(part, whole[:, start - 20 : start - 12], atol=5e-4, rtol=0)


def test_a_change_fades_over_the_first_chunk_of_its_span_and_is_pure_on_both_sides():
    for attribute in ("colour", "shape", "background", "landmark"):
        trip = world.change_trip(3, attribute)
        first, last = frames_of(4)[0], frames_of(4)[-1]
        frames = world.render_trips([trip], start=first - 1, num_frames=14)[0]
        looks = [world.render([twin(trip, span)], start=first - 1, num_frames=14)[0] for span in trip.spans]
        torch.testing.assert_close(frames[0], looks[0][0], atol=5e-4, rtol=0)
        torch.testing.assert_close(frames[-1], looks[1][-1], atol=5e-4, rtol=0)
        distance = [(frame - look).abs().mean() for frame, look in zip(frames[1:-1], looks[1][1:-1], strict=True)]
        total = (looks[0] - looks[1]).abs().mean((1, 2, 3))[1:-1]
        shares = 1 - torch.stack(distance) / total
        assert len(shares) == last - first + 1 == 12
        torch.testing.assert_close(shares, (torch.arange(12) + 0.5) / 12, atol=0.01, rtol=0)


def test_the_mask_of_a_trip_is_where_its_subject_is():
    trip = world.change_trip(4, "shape")
    mask = world.trip_mask([trip], start=30, num_frames=40)
    assert mask.shape == (1, 40, 128, 128)
    for frame in (30, 69):
        subject = trip.subject_xy(frame)[0] - trip.camera_x(frame), trip.subject_xy(frame)[1]
        assert mask[0, frame - 30, round(subject[1]), round(subject[0])] > 0.99
    pure = world.subject_mask([twin(trip, trip.spans[1])], start=69, num_frames=1)[0, 0]
    torch.testing.assert_close(mask[0, 39], pure, atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: world.random_trip(0, num_chunks=0), "`num_chunks` must be at least 1, got 0"),
        (lambda: world.random_trip(0, split="dev"), "got 'dev'"),
        (lambda: world.random_trip(0, change_share=1.5), "from 0 to 1, got 1.5"),
        (lambda: world.test_trip(0, kind="there"), "got 'there'"),
        (lambda: world.test_trip(0, away_chunks=0), "`away_chunks` must be at least 1, got 0"),
        (lambda: world.change_trip(0, "camera"), "got 'camera'"),
        (lambda: world.render_trips([TRIPS[0]], start=170, num_frames=10), "177 frames"),
    ],
)
def test_wrong_requests_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()

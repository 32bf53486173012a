"""The storybook world: scenes are exact, deterministic and drawn as their state says."""

import re
from pathlib import Path

import pytest
import torch

from vidaccel import world
from vidaccel.world.palette import SUBJECT_COLOURS
from vidaccel.world.scene import CANVAS_WIDTH, FRAME_SIZE


def attributes(scene):
    return scene.subject.colour, scene.subject.shape, scene.subject.motion, scene.background


def test_the_same_seed_gives_the_same_clip_twice():
    first, second = world.make_clip(3, num_frames=9), world.make_clip(3, num_frames=9)
    assert (first.scene, first.caption, first.states) == (second.scene, second.caption, second.states)
    assert torch.equal(first.video, second.video)


def test_a_part_of_a_scene_is_rendered_as_in_the_whole():
    scenes = [world.random_scene(seed, num_frames=400) for seed in (1, 2)]
    whole = world.render(scenes, start=90, num_frames=30)
    part = world.render(scenes, start=100, num_frames=3)
    torch.testing.assert_close(part, whole[:, 10:13], atol=2e-4, rtol=0)


def test_scenes_rendered_together_equal_scenes_rendered_alone():
    scenes = [world.random_scene(seed, num_frames=5) for seed in range(3)]
    together = world.render(scenes)
    for scene, frames in zip(scenes, together, strict=True):
        torch.testing.assert_close(world.render([scene])[0], frames, atol=2e-4, rtol=0)


def test_the_subject_has_its_colour_where_the_state_says():
    for seed in range(20):
        clip = world.make_clip(seed, num_frames=49)
        for frame in (0, 20, 48):
            subject = clip.states[frame].objects[0]
            x, y = round(subject.screen_x), round(subject.screen_y)
            patch = clip.video[frame, :, y + 6 : y + 9, x - 2 : x + 3].mean((1, 2))
            expected = torch.tensor(SUBJECT_COLOURS[clip.scene.subject.colour]) / 255
            assert (patch - expected).abs().max() < 0.12, (seed, frame)


def test_the_subject_of_a_short_clip_stays_in_view():
    for seed in range(200):
        scene = world.random_scene(seed)
        shown = [scene.state(frame).objects[0].visible for frame in range(49)]
        assert min(shown) > 0.95, seed


def test_the_mask_covers_the_subject_and_nothing_else():
    scene = world.random_scene(5, num_frames=3)
    mask = world.subject_mask([scene])[0]
    subject = scene.state(1).objects[0]
    assert mask[1, round(subject.screen_y), round(subject.screen_x)] > 0.99
    assert 0.03 < mask.mean() < 0.09
    assert mask[:, :20].max() == 0


def test_in_a_long_scene_the_subject_and_landmarks_leave_the_view_and_return():
    scene = world.random_scene(4, num_frames=960)
    subject = [scene.state(frame).objects[0].visible for frame in range(960)]
    gone = subject.index(0.0)
    assert subject[0] == 1.0
    assert max(subject[gone:]) == 1.0
    assert all(0 <= scene.camera_x(frame) <= CANVAS_WIDTH - FRAME_SIZE for frame in range(960))
    landmarks = [[mark.visible for mark in scene.state(frame).objects[1:]] for frame in range(960)]
    shown_and_gone = [max(mark) == 1.0 and min(mark) == 0.0 for mark in zip(*landmarks, strict=True)]
    assert sum(shown_and_gone) >= 2


def test_paths_of_a_long_scene_do_not_jump():
    for seed in range(10):
        scene = world.random_scene(seed, num_frames=600)
        steps = [
            max(abs(a - b) for a, b in zip(scene.subject_xy(f), scene.subject_xy(f + 1), strict=True))
            for f in range(599)
        ]
        assert max(steps) < 7, seed
        assert max(abs(scene.camera_x(f) - scene.camera_x(f + 1)) for f in range(599)) < 5, seed


def test_test_scenes_use_combinations_that_training_never_has():
    train = {attributes(world.random_scene(seed)) for seed in range(3000)}
    test = {attributes(world.random_scene(seed, split="test")) for seed in range(600)}
    assert not train & test
    assert len(test) == 60


def test_captions_name_every_attribute_and_stay_in_the_vocabulary():
    known = set(world.vocabulary())
    texts = set()
    for seed in range(500):
        scene = world.random_scene(seed)
        text = world.caption(scene)
        words = set(text.replace(",", "").split())
        assert words <= known, words - known
        assert {scene.subject.colour, scene.subject.shape} <= words
        texts.add(text)
    assert len(texts) > 400


def test_the_caption_of_a_frame_describes_the_segment_it_lies_in():
    scene = world.random_scene(5, num_frames=385)
    texts = [world.caption(scene, frame=frame, paraphrase=3) for frame in range(385)]
    assert [frame for frame in range(1, 385) if texts[frame] != texts[frame - 1]] == [96, 192, 288, 384]
    for seed in range(20):
        scene = world.random_scene(seed, num_frames=385)
        away, back = (scene.camera_x(start + 95) - scene.camera_x(start) for start in (96, 288))
        assert ("right" if away > 0 else "left") in scene.camera_move(100)
        assert ("right" if back > 0 else "left") in scene.camera_move(300)
        wordings = [world.caption(scene, frame=100, paraphrase=index) for index in range(20)]
        assert any(f"pans {scene.camera_move(100).removeprefix('pan ')}" in text for text in wordings)
        assert not any("comes back" in text or "returns" in text for text in wordings)
        assert all(scene.subject.colour in text and scene.subject.shape in text for text in wordings)
    words = {word for text in texts for word in text.replace(",", "").split()}
    assert words <= set(world.vocabulary())


def test_the_caption_of_the_first_frame_of_a_short_scene_is_that_of_the_scene():
    for seed in range(100):
        scene = world.random_scene(seed)
        assert world.caption(scene, frame=0) == world.caption(scene, frame=48) == world.caption(scene)
        assert world.caption(scene, frame=0, paraphrase=seed) == world.caption(scene, paraphrase=seed)


def test_a_scene_has_several_wordings():
    scene = world.random_scene(1)
    assert len({world.caption(scene, paraphrase=index) for index in range(30)}) > 8


def test_no_two_landmarks_of_a_canvas_are_alike():
    for seed in range(50):
        landmarks = world.random_scene(seed).landmarks
        assert len({mark.kind for mark in landmarks}) == len({mark.colour for mark in landmarks}) == len(landmarks) >= 7


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: world.random_scene(0, num_frames=0), "at least 1, got 0"),
        (lambda: world.random_scene(0, split="dev"), "got 'dev'"),
        (lambda: world.render([world.random_scene(0, num_frames=5)], start=3, num_frames=4), "scene of 5 frames"),
        (lambda: world.unseen_prompts(0), "at least 1, got 0"),
        (lambda: world.caption(world.random_scene(0, num_frames=5), frame=5), "from 0 to 4, got 5"),
    ],
)
def test_wrong_requests_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_the_page_about_the_world_quotes_a_real_caption_and_every_word():
    page = (Path(__file__).parents[2] / "docs" / "world.md").read_text(encoding="utf-8")
    assert f'"{world.make_clip(7, num_frames=1).caption}"' in page
    assert set(world.vocabulary()) <= set(re.findall(r"[a-z]+", page))


def test_a_prompt_in_the_words_of_the_captions_is_read_back_into_what_it_asks_for():
    for seed in range(300):
        scene = world.random_scene(seed)
        asked = world.asked_by(world.caption(scene))
        assert (asked.colour, asked.shape, asked.motion, asked.background) == attributes(scene)
        assert asked.camera == scene.camera or (asked.camera is None and scene.camera == "hold")
        assert (asked.landmark is not None) == (" near " in world.caption(scene))
    for seed in range(100):
        trip = world.change_trip(seed, "landmark")
        asked = world.asked_by(world.trip_caption(trip, 5))
        assert asked.landmark == trip.span_at(5).landmarks[trip.subject_stop].kind
        assert asked.camera is None
    assert world.asked_by("stars in the street, near a house of cards") == world.Asked(
        colour=None, shape=None, motion=None, background=None, landmark="house", camera=None
    )

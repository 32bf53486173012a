"""The oracle reads rendered truth back."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vidaccel import world


def accuracy(scenes, videos):
    hits = dict.fromkeys(("colour", "shape", "motion", "background", "camera"), 0)
    for scene, video in zip(scenes, videos, strict=True):
        reading = world.read_clip(video)
        wanted = {
            "colour": scene.subject.colour,
            "shape": scene.subject.shape,
            "motion": scene.subject.motion,
            "background": scene.background,
            "camera": scene.camera,
        }
        for name, value in wanted.items():
            hits[name] += getattr(reading, name) == value
    return {name: count / len(scenes) for name, count in hits.items()}


def scenes_of(count, split, start=0):
    return [world.random_scene(start + seed, split=split) for seed in range(count)]


def test_the_oracle_reads_at_least_99_percent_of_rendered_clips():
    # Half a minute on a busy core: 60 clips, because with fewer 99 % could not be told from 95 %.
    scenes = scenes_of(40, "test") + scenes_of(20, "train", start=900)
    videos = torch.cat([world.render(scenes[i : i + 10]) for i in range(0, 60, 10)])
    assert min(accuracy(scenes, videos).values()) >= 0.99


def test_the_oracle_is_robust_to_blur_and_noise():
    scenes = scenes_of(12, "test", start=300)
    videos = world.render(scenes)
    soft = F.interpolate(F.avg_pool2d(videos.flatten(0, 1), 2), scale_factor=2, mode="bilinear")
    noise = torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    assert min(accuracy(scenes, (soft + 0.06 * noise).reshape(videos.shape)).values()) >= 0.9


def test_the_oracle_follows_the_subject_and_the_camera_to_the_pixel():
    scene = world.random_scene(11)
    reading = world.read_clip(world.render([scene])[0])
    camera = torch.tensor([scene.camera_x(frame) - scene.camera_x(0) for frame in range(49)])
    assert (reading.camera_path - camera).abs().max() < 2
    truth = torch.tensor([scene.subject_xy(frame) for frame in range(49)]) - torch.tensor([scene.camera_x(0), 0])
    assert (reading.path - truth).abs().max() < 4


def test_an_empty_world_has_no_subject():
    video = torch.full((9, 3, 128, 128), 0.5)
    reading = world.read_clip(video)
    assert (reading.colour, reading.shape, reading.motion) == (None, None, None)


def test_the_oracle_sees_a_wrong_colour():
    scene = next(s for s in map(world.random_scene, range(100)) if s.subject.colour == "red")
    video = world.render([scene])[0]
    assert world.read_clip(video.flip(1)).colour != "red"


def test_a_clip_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"got \(9, 3, 64, 64\)"):
        world.read_clip(torch.zeros(9, 3, 64, 64))


def test_sky_and_ground_are_near_to_those_of_the_background_and_far_in_a_mixture():
    scenes = [next(s for s in scenes_of(60, "train") if s.background == name) for name in world.BACKGROUNDS]
    clips = [world.render([scene], num_frames=5)[0] for scene in scenes]
    for place, clip in enumerate(clips):
        distances = world.background_distances(clip)[:, [0, 2]].amax(1)
        assert int(distances.argmin()) == place
        assert float(distances[place]) < 5
    for one, other in itertools.combinations(clips, 2):
        assert float(world.background_distances((one + other) / 2)[:, [0, 2]].amax(1).min()) > 12

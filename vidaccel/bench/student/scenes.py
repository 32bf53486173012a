"""Prompts and beginnings that are a little unusual: no place is named, a landmark is, or stands behind the subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count as numbers
from itertools import islice

from torch import Tensor

from vidaccel.bench.student.readings import read_part
from vidaccel.bench.student.rollouts import Filming, Script, first_pixel
from vidaccel.bench.student.sheet import Measured, Row
from vidaccel.bench.student.subjects import MOTIONS, staying_prompts
from vidaccel.rollout.decode import encode_start
from vidaccel.world import FPS, Prompt, Scene, asked_by, caption, random_scene, render
from vidaccel.world.sprites import LANDMARK_KINDS

SETTINGS = ("no place", "a landmark", "a landmark behind the subject")
NUM_CHUNKS = 8
PART = 2 * FPS
GIVEN_CHUNKS = 2
_OVERLAP = 20.0  # pixels between the middles of subject and landmark
_WORDS = {"still": "stands still", "hop": "hops up and down", "loop": "flies in circles"}
_PLACES = {
    "meadow": "on a grassy meadow",
    "desert": "in a sandy desert",
    "night": "under a starry night sky",
    "snow": "on a snowy field",
    "beach": "on a beach by the sea",
}


def measure_scenes(filming: Filming, setting: str, *, count: int, seed: int) -> Measured:
    """`count` videos of one of `SETTINGS`, read in their last two seconds."""
    end = first_pixel(NUM_CHUNKS)
    given: Sequence[Tensor | None] = [None] * count
    if setting == SETTINGS[2]:
        scenes = list(islice(covering_scenes(seed), count))
        vae = filming.pipe.vae
        start = render(scenes, num_frames=first_pixel(GIVEN_CHUNKS), device=vae.device)
        given = list(encode_start(vae, start).cpu())
        texts, seeds = [caption(scene) for scene in scenes], [scene.seed for scene in scenes]
    else:
        prompts = staying_prompts(count, seed=seed)
        texts, seeds = (
            [scene_prompt(one, setting, number) for number, one in enumerate(prompts)],
            [one.seed for one in prompts],
        )
    scripts = [
        Script(seed=one, prompts=((0, text),), given=latents)
        for one, text, latents in zip(seeds, texts, given, strict=True)
    ]
    frames = filming.decode(filming.film(scripts, NUM_CHUNKS), end - PART, end)
    tries = [
        {"prompt": text, "asked": vars(asked_by(text)), "shown": read_part(clip).to_dict()}
        for text, clip in zip(texts, frames, strict=True)
    ]
    return Measured(tries=tries, rows=[Row(label=setting, pictures=frames[:, -1])])


def scene_prompt(prompt: Prompt, setting: str, number: int) -> str:
    """The subject of a prompt, without a place or with a landmark beside it."""
    article = "an" if prompt.colour[0] in "aeiou" else "a"
    subject = f"{article} {prompt.colour} {prompt.shape} {_WORDS[prompt.motion]}"
    if setting == SETTINGS[0]:
        return subject
    return f"{subject} {_PLACES[prompt.background]}, near a {LANDMARK_KINDS[number % len(LANDMARK_KINDS)]}"


def covering_scenes(seed: int) -> Iterator[Scene]:
    """Unseen scenes in which the subject stays before a landmark and the camera holds."""
    for number in numbers():
        scene = random_scene(seed * 1_000_003 + number, num_frames=first_pixel(NUM_CHUNKS), split="test")
        stays = scene.camera == "hold" and scene.subject.motion in MOTIONS
        middle = scene.subject_moves[0].x
        if stays and any(abs(mark.x - middle) <= _OVERLAP for mark in scene.landmarks):
            yield scene

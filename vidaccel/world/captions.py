"""Captions of the storybook world: a small grammar in which every attribute has several wordings."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vidaccel.world.scene import COLOURS, FRAME_SIZE, Scene, random_scene
from vidaccel.world.sprites import LANDMARK_KINDS
from vidaccel.world.trip import Trip

_SUBJECTS = {
    "ball": ("{colour} ball", "round {colour} ball"),
    "box": ("{colour} box", "square {colour} box"),
    "triangle": ("{colour} triangle", "pointed {colour} triangle"),
    "star": ("{colour} star", "{colour} star with five tips"),
}
_MOTIONS = {
    "still": ("stands still", "rests quietly", "does not move"),
    "left": ("moves to the left", "slides left", "walks to the left"),
    "right": ("moves to the right", "slides right", "walks to the right"),
    "hop": ("hops up and down", "jumps up and down", "bounces up and down"),
    "loop": ("flies in circles", "circles in the air", "flies round and round"),
}
_PLACES = {
    "meadow": ("on a grassy meadow", "in a sunny meadow"),
    "desert": ("in a sandy desert", "in the hot desert"),
    "night": ("under a starry night sky", "at night under the stars"),
    "snow": ("on a snowy field", "in the cold snow"),
    "beach": ("on a beach by the sea", "at the seaside"),
}
_CAMERAS = {
    "hold": ("", "the camera holds still"),
    "pan left": ("the camera pans left", "the view pans to the left"),
    "pan right": ("the camera pans right", "the view pans to the right"),
    "pan and return": ("the camera pans away and comes back", "the view pans away and returns"),
}
_SENTENCES = (
    "a {subject} {motion} {place}{near}{camera}",
    "{place}, a {subject} {motion}{near}{camera}",
    "a {subject} {place} {motion}{near}{camera}",
)
_SENTENCE_WITHOUT_PLACE = "a {subject} {motion}{near}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and what it asks for."""

    text: str
    colour: str
    shape: str
    motion: str
    background: str
    camera: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the words of a prompt ask for; None where they say nothing of it. landmark: its kind."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None
    landmark: str | None
    camera: str | None


def asked_by(prompt: str) -> Asked:
    """Read a prompt in the words of the captions back into what it asks for."""
    words = re.findall(r"[a-z]+", prompt.lower())
    text = " ".join(words)
    near = re.search(r"\bnear an? (\w+)", text)
    return Asked(
        colour=next((word for word in words if word in COLOURS), None),
        shape=next((word for word in words if word in _SUBJECTS), None),
        motion=_named_in(text, _MOTIONS),
        background=_named_in(text, _PLACES),
        landmark=near[1] if near and near[1] in LANDMARK_KINDS else None,
        camera=_named_in(text, _CAMERAS),
    )


def caption(scene: Scene, *, frame: int | None = None, paraphrase: int | None = None) -> str:
    """Describe a scene in one lower-case sentence.

    frame: describe the segment that this frame lies in, with its motion and its part of the camera's way; None
        describes the beginning and the camera's whole way, which is the same in a short scene.
    paraphrase: which wording; None takes the one that belongs to the scene's seed.
    Raises ValueError for a frame outside the scene.
    """
    if frame is not None and not 0 <= frame < scene.num_frames:
        raise ValueError(f"`frame` must be from 0 to {scene.num_frames - 1}, got {frame}.")
    draw = random.Random(f"vidaccel caption {scene.seed if paraphrase is None else paraphrase}")
    camera = draw.choice(_CAMERAS[scene.camera if frame is None else scene.camera_move(frame)])
    near = _landmark_in_view(scene, frame or 0) if draw.random() < 0.4 else None
    return draw.choice(_SENTENCES).format(
        subject=_with_article(draw.choice(_SUBJECTS[scene.subject.shape]).format(colour=scene.subject.colour)),
        motion=draw.choice(_MOTIONS[scene.motion(frame or 0)]),
        place=draw.choice(_PLACES[scene.background]),
        near=f", near a {near}" if near else "",
        camera=f", {camera}" if camera else "",
    ).replace("a an ", "an ")  # fmt: skip


def trip_caption(trip: Trip, chunk: int, *, paraphrase: int | None = None) -> str:
    """Describe a chunk of a trip in one lower-case sentence: the subject, its motion and where it is, all along.

    It never says what the camera does or sees: the landmark it may name is that of the subject's stop.
    paraphrase: which wording; None takes the one that belongs to the trip's seed. What two spans have in common is
        worded alike. Raises IndexError for a chunk outside the trip.
    """
    span = trip.span_at(chunk)
    draw = random.Random(f"vidaccel trip caption {trip.seed if paraphrase is None else paraphrase}")
    sentence = draw.choice(_SENTENCES)
    subject, motion, place = draw.random(), draw.random(), draw.random()
    return (sentence if span.names_place else _SENTENCE_WITHOUT_PLACE).format(
        subject=_with_article(_wording(_SUBJECTS[span.subject.shape], subject).format(colour=span.subject.colour)),
        motion=_wording(_MOTIONS[span.subject.motion], motion),
        place=_wording(_PLACES[span.background], place),
        near=f", near a {span.landmarks[trip.subject_stop].kind}" if span.names_landmark else "",
        camera="",
    ).replace("a an ", "an ")  # fmt: skip


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can contain, in lower case, sorted."""
    tables = (_SUBJECTS, _MOTIONS, _PLACES, _CAMERAS)
    texts = [text for table in tables for wordings in table.values() for text in wordings]
    texts += ["a", "an", "near"]
    words = " ".join(texts).replace("{colour}", " ").replace(",", " ").split()
    return tuple(sorted({*words, *COLOURS, *LANDMARK_KINDS}))


def unseen_prompts(count: int, *, seed: int = 0) -> tuple[Prompt, ...]:
    """Prompts over combinations of attributes that training never sees. Raises ValueError for `count` under 1."""
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    scenes = [random_scene(seed * 1_000_003 + index, split="test") for index in range(count)]
    return tuple(
        Prompt(
            text=caption(scene),
            colour=scene.subject.colour,
            shape=scene.subject.shape,
            motion=scene.subject.motion,
            background=scene.background,
            camera=scene.camera,
            seed=scene.seed,
        )
        for scene in scenes
    )


def _wording(wordings: tuple[str, ...], share: float) -> str:
    return wordings[int(share * len(wordings))]


def _named_in(text: str, table: Mapping[str, tuple[str, ...]]) -> str | None:
    """The value of which the text has a wording."""
    return next((value for value, wordings in table.items() for one in wordings if one and one in text), None)


def _with_article(subject: str) -> str:
    """The sentences say "a"; before a vowel that becomes "an"."""
    return f"an {subject}" if subject[0] in "aeiou" else subject


def _landmark_in_view(scene: Scene, frame: int) -> str | None:
    """One that stands well inside the screen when the segment of `frame` begins."""
    left = scene.camera_x(scene.segment_start(frame))
    inside = [landmark for landmark in scene.landmarks if 20 < landmark.x - left < FRAME_SIZE - 20]
    return inside[0].kind if inside else None

"""Arguments of one small seeded call of any family: a prompt, and synthetic images and videos where it takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vidaccel.catalog.families.family import Family
from vidaccel.catalog.pipelines import is_modular, named_class
from vidaccel.catalog.table import family_named

PROMPT = "a red ball hops over a green hill"
_FRAME_COUNTS = ("num_frames", "frames", "video_length")
_STEPS_BY_SIZE = "pyramid_num_inference_steps_list"
_IMAGES = ("image", "last_image")


def call_inputs(family: Family | str, *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Arguments of one call of `family`'s pipeline, the same for the same seed; `changes` replace or add some.

    Images are PIL images of the row's size, videos lists of them, `num_frames` long; frames come back as a tensor
    (`output_type="pt"`). A pipeline of blocks returns them, or with `output_type="latent"` its latents, as they are.
    `num_frames` and `num_inference_steps` go to what a pipeline has in their place (SANA-Video's `frames`, the steps
    for each size of Helios) and are left out where it has nothing, as are other settings of the row it does not take.
    Raises `UserError` for a name that is no family.
    """
    family = family_named(family) if isinstance(family, str) else family
    taken = taken_arguments(named_class(family.pipeline))
    numbers = np.random.default_rng(seed)
    settings = dict(family.defaults) | changes
    arguments: dict[str, Any] = {
        "prompt": PROMPT,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed),
        **{name: _media(name, settings, numbers) for name in family.inputs},
        **dict.fromkeys(_FRAME_COUNTS, settings["num_frames"]),
        **settings,
    }
    if _STEPS_BY_SIZE in taken:
        arguments.setdefault(_STEPS_BY_SIZE, [settings["num_inference_steps"]] * 3)
    if "output" in taken:
        is_latent = arguments["output_type"] == "latent"
        arguments |= {"output": "latents" if is_latent else "videos", "output_type": "pt"}
    asked_for = taken | (changes.keys() - {"num_frames", "num_inference_steps"})
    return {name: value for name, value in arguments.items() if name in asked_for}


def taken_arguments(pipeline: Any) -> set[str]:
    """The names of what a call of this pipeline class takes."""
    if is_modular(pipeline):
        return {"output", *pipeline().blocks.input_names}
    return set(inspect.signature(pipeline.__call__).parameters)


def _media(name: str, settings: Mapping[str, Any], numbers: np.random.Generator) -> Any:
    size = (settings["height"], settings["width"])
    if name in _IMAGES:
        return _pictures(1, size, numbers)[0]
    pictures = _pictures(settings["num_frames"], size, numbers)
    return [picture.convert("L") for picture in pictures] if name == "mask" else pictures


def _pictures(count: int, size: tuple[int, int], numbers: np.random.Generator) -> list[Any]:
    """Soft coloured waves that move from one picture to the next."""
    from PIL import Image

    rows, columns = np.mgrid[0 : size[0], 0 : size[1]] / 8
    phases = numbers.uniform(0, 2 * np.pi, 3)
    waves = [
        np.stack([np.sin(rows + phase + time / 2) * np.cos(columns - phase) for phase in phases], -1)
        for time in range(count)
    ]
    return [Image.fromarray((127.5 * (1 + wave)).astype(np.uint8)) for wave in waves]

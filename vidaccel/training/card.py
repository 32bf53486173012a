"""The model card and the settings file of an exported pipeline."""

import json
from typing import Any

from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.training.checkpoint import TrainingState
from vidaccel.training.loop import finished_round

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-video
license: apache-2.0
---

# A small Wan model of the storybook world

Text to video, 128 x 128 pixels, 49 frames, 16 frames a second; small enough for a CPU. Made to try and to measure
acceleration methods on trained weights, not to make films: it knows six colours, four shapes, five motions and five
places, and nothing else. `<unk>` stands for every other word. Use 20 steps or more.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("path/to/this/folder")
video = pipe("a red ball hops up and down on a grassy meadow", num_frames=49, height=128, width=128).frames
```

## Data

Scenes of `vidaccel.world`, rendered from seeds while training. One tenth of all combinations of colour, shape, motion
and place was never shown; the results below are on that tenth.

## Training

`vidaccel train vae`, `vidaccel train transformer`, `vidaccel train export`; flow matching with shift 3 and logit-normal
times for the transformer, and the text encoder with it.

{table}

{recipes}

## Results while training

Averaged weights in float32, unseen combinations; measurements of the exported weights are in `docs/results`.

{results}
"""
_UNITS = {"psnr": "PSNR of 49 frames in dB", "image_psnr": "PSNR of single frames in dB"}


def model_card(vae: TrainingState, transformer: TrainingState) -> str:
    """The README of the exported folder, in Markdown."""
    rows = ["| network | round | steps | seconds |", "|---|---|---|---|"]
    recipes = []
    for state in (vae, transformer):
        rows += round_rows(state)
        if state.origin:
            recipes.append(f"The {state.kind}: {state.origin}")
        for number, past in enumerate([*state.history, finished_round(state)], start=1):
            recipes.append(f"{state.kind}, round {number}: {recipe_text(past['recipe'])}.")
    results = ["| what | value |", "|---|---|"]
    results += [f"| {_UNITS.get(name, name)} | {value:.2f} |" for name, value in vae.results.items()]
    results += [f"| {name} read by the oracle | {value:.1%} |" for name, value in transformer.results.items()]
    return _CARD.format(table="\n".join(rows), recipes="\n\n".join(recipes), results="\n".join(results))


def round_rows(state: TrainingState) -> list[str]:
    """Steps and seconds of every round of a training, as rows of a table."""
    return [
        f"| {state.kind} | {number} | {past['steps']} | {past['seconds']:.0f} |"
        for number, past in enumerate([*state.history, finished_round(state)], start=1)
    ]


def settings_text(defaults: GenerationDefaults, *, weights: str) -> str:
    """The content of `vidaccel.json`."""
    return json.dumps({"weights": weights, "defaults": defaults.to_dict()}, indent=2) + "\n"


def recipe_text(recipe: dict[str, Any]) -> str:
    """The settings of a round in one line; of the nested ones schedule and phases."""
    flat = {**{k: v for k, v in recipe.items() if not isinstance(v, dict | list | tuple)}, **recipe.get("schedule", {})}
    phases = [
        f"until {p['until']:.0%} of the time {p['batch_size']} crops of {p['size']} pixels and {p['num_frames']} frames"
        for p in recipe.get("phases") or ()
    ]
    return ", ".join([*(f"{name} {value}" for name, value in flat.items() if value is not None), *phases])

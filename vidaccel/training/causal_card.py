"""The model card of an exported causal student: what it remembers, how it was trained, what its results mean."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.catalog.registry import spec_of
from vidaccel.catalog.shares import shared_folder
from vidaccel.catalog.spec import ASSET
from vidaccel.training.card import recipe_text, round_rows
from vidaccel.training.checkpoint import TrainingState
from vidaccel.training.chunk_batch import SLOTS
from vidaccel.training.loop import finished_round
from vidaccel.training.trip_bank import CHUNK_FRAMES

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-video
license: apache-2.0
---

# A small causal Wan student of the storybook world

Makes video chunk after chunk, {chunk} latent frames at a time, and attends to at most {attended} latent frames, its own
chunk included: the first ones, keyframes of the past and the latest. 128 x 128 pixels, 16 frames a second, any length.
It is told where its camera stands and how it moves, and every frame is remembered alone, so that what it remembers does
not depend on what came before. Text encoder, tokenizer and autoencoder are those of `{shares}`.

```
vidaccel rollout "a red ball hops up and down on a grassy meadow" --seconds 60 --output ball.mp4
```

It knows what `{shares}` knows, and was made to try a bounded memory on trained weights, not to make films. It takes
{steps} {sampler} steps a chunk and no guidance.

## Data

Clips of {num_chunks} chunks of `vidaccel.world`, rendered from seeds before the training: four in five are trips, on
which the camera leaves places and comes back and prompts change, the others are long scenes in which it holds or pans
away. Captions describe the chunk. One tenth of all combinations of colour, shape, motion and place was never shown; the
results below are on that tenth.

## Training

`vidaccel train causal`, `vidaccel train export-causal`; begun from {layers} of the transformer of
{init}.

Teacher forcing by flow matching: several noisy copies of a chunk see what is remembered, which is the truth with a
little noise, or the student's own estimate of the chunk before. What is remembered is drawn for every sample: first
frames of all chunks or of every second one, keyframes, any frames, the last ones or none.

{table}

{recipes}

## Results while training

Averaged weights in float32, {validation}, no guidance.

{results}

{measured}
"""
_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "as_seen": "the landmark oracle reads the place that the camera comes back to as it was at the first visit",
        "blank": "the same when the frames that showed it are not remembered",
        "valid": "where the camera comes back there is a landmark at all",
        "first_visit_valid": "the same of places seen for the first time",
        "own_recall": "as_seen in videos made from their first chunk on",
        "first_visit_likelihood": "how clear places seen for the first time are, log-likelihood ratio a pixel",
        "true_likelihood": "the same in decoded truth",
        "kept": "colour, shape and place are still right in the last 33 frames of such a rollout",
    }
)
_MIXED = (
    "What is exported is {share:.0%} of the teacher's weights and the rest of the student's, which keeps more of what "
    "is remembered; the results below are of the student alone."
)
_ATTRIBUTES = ("colour", "shape", "motion", "background")


def student_card(
    state: TrainingState, *, name: str, num_steps: int, stochastic: bool, teacher_share: float = 0.0
) -> str:
    """The README of the folder `name`, in Markdown, for a student that samples in `num_steps` steps.

    stochastic: its steps add fresh noise. teacher_share: how much of its weights are its teacher's. How the results of
    the checkpoint were sampled is read from its recipe.
    """
    rounds = [*state.history, finished_round(state)]
    recipes = [f"round {number}: {recipe_text(past['recipe'])}." for number, past in enumerate(rounds, start=1)]
    first, last = rounds[0]["recipe"], rounds[-1]["recipe"]
    mixed = [_MIXED.format(share=teacher_share)] if teacher_share else []
    return _CARD.format(
        chunk=CHUNK_FRAMES,
        attended=SLOTS + CHUNK_FRAMES,
        shares=shared_model(first["init"]) or first["init"],
        init=_beginning(first, name),
        steps=num_steps,
        sampler="stochastic" if stochastic else "deterministic",
        layers=f"layers {', '.join(map(str, first['layers']))}" if first.get("layers") else "all layers",
        num_chunks=last["num_chunks"],
        validation=f"{last['validation_steps']} {last.get('validation_sampler', 'Euler')} steps",
        table="\n".join(["| network | round | steps | seconds |", "|---|---|---|---|", *round_rows(state)]),
        recipes="\n\n".join([*([state.origin] if state.origin else []), *recipes, *mixed]),
        results="\n".join(["| what | value | meaning |", "|---|---|---|", *_result_rows(state.results, last)]),
        measured=_measured(name),
    )


def shared_model(init: str) -> str | None:
    """The embedded model that lends the other networks to a student that began from `init`; None for a folder."""
    spec = spec_of(init)
    if not spec.source.startswith(ASSET) or spec.folder is None:
        return None
    shared = shared_folder(spec.folder)
    return spec.folder.name if shared is None else shared.name


def _beginning(recipe: Mapping[str, Any], name: str) -> str:
    """What the first round began from; a student may carry the name of the one that it began from and replaces."""
    replaced = ", the student that this one replaces" if recipe["init"] == name else ""
    version = f", as of vidaccel {recipe['version']}" if recipe.get("version") else ""
    return f"`{recipe['init']}`{replaced}{version}"


def _result_rows(results: Mapping[str, float], recipe: Mapping[str, Any]) -> list[str]:
    return [f"| {name} | {_result_text(name, value)} | {_meaning(name, recipe)} |" for name, value in results.items()]


def _result_text(name: str, value: float) -> str:
    is_share = not name.startswith(("held_out", "trained")) and not name.endswith("likelihood")
    return f"{value:.1%}" if is_share else f"{value:.4f}"


def _meaning(name: str, recipe: Mapping[str, Any]) -> str:
    if name in _ATTRIBUTES:
        frames = recipe["validation_chunks"] * CHUNK_FRAMES
        return f"right in the first 49 frames of a rollout of {frames} latent frames with one prompt"
    if name == "held_out_end_distance":
        return "squared distance to where the teacher ends, on states that were held out"
    if name.startswith("trained"):
        return "loss at high noise, of clips it was trained on"
    return "loss at high noise" if name.startswith("held_out") else _MEANINGS.get(name, "")


def _measured(name: str) -> str:
    """Where measurements of the exported weights are, or how they are made."""
    if name != EMBEDDED_STUDENT:
        return "The exported weights are measured by `vidaccel bench recall` and `vidaccel bench student`."
    results = "../../docs/results"
    return (
        f"Measurements of the exported weights: [recall]({results}/recall-{name}/recall.md) and "
        f"[what it does with what it is told]({results}/student-{name}/student.md)."
    )

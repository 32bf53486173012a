"""From a causal checkpoint to a folder that holds the student only and names the model it shares the rest with."""

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vidaccel.catalog.pipelines import STUDENT_PIPELINE, STUDENT_TRANSFORMER
from vidaccel.catalog.registry import SETTINGS_FILE, spec_of
from vidaccel.catalog.shares import shared_folder
from vidaccel.catalog.spec import ASSET, GenerationDefaults
from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_folder
from vidaccel.training.architecture import FLOW_SHIFT, NUM_TRAIN_TIMESTEPS, Transformer
from vidaccel.training.card import recipe_text, round_rows, settings_text
from vidaccel.training.causal_student import load_donor
from vidaccel.training.causal_trainer import trained_student
from vidaccel.training.checkpoint import TrainingState
from vidaccel.training.chunk_batch import FAST_FRAMES, SINK_FRAMES, SLOTS, SLOW_FRAMES
from vidaccel.training.curves import draw_curves, read_records
from vidaccel.training.device import training_device
from vidaccel.training.keyframe_threshold import KeyframeThreshold, calibrate_threshold
from vidaccel.training.loop import METRICS_FILE, finished_round
from vidaccel.training.trip_bank import CHUNK_FRAMES, build_trip_bank
from vidaccel.world import FPS, FRAME_SIZE
from vidaccel.world.trips import random_trip

_NUM_FRAMES = 97
_STEPS = 4
_GUIDANCE_SCALE = 1.0
_CALIBRATION_SEED, _CALIBRATION_TRIPS = 78_000_000, 12
_TEXT_LENGTH = 64
_COMPONENTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": tuple(STUDENT_TRANSFORMER.split(":")),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
_CARD = """---
library_name: diffusers
pipeline_tag: text-to-video
license: apache-2.0
---

# A small causal Wan student of the storybook world

Makes video chunk after chunk, {chunk} latent frames at a time, and looks back to at most {memory} latent frames: the
first ones, keyframes of the past and the latest. 128 x 128 pixels, 16 frames a second, any length. It is told where its
camera stands and how it moves, and every frame is remembered alone, so that what it remembers does not depend on what
came before. Text encoder, tokenizer and autoencoder are those of `{shares}`.

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

`vidaccel train causal`, `vidaccel train export-causal`; begun from {layers} of the transformer of `{init}`. Teacher
forcing by flow matching: several noisy copies of a chunk see what is remembered, which is the truth with a little
noise, or the student's own estimate of the chunk before. What is remembered is drawn for every sample: first frames of
all chunks or of every second one, keyframes, any frames, the last ones or none.

{table}

{recipes}

## Results while training

Averaged weights in float32, {num_steps} Euler steps, no guidance. as_seen: the landmark oracle reads the place that the
camera comes back to as it was at the first visit; blank: the same when the frames that showed it are not remembered;
own_recall: as_seen in videos made from their first chunk on; likelihoods: how clear landmarks of places seen for the
first time are, and in decoded truth. Attributes are read in the first 49 frames of a rollout of {rollout} latent frames
with one prompt; kept: colour, shape and place are still right in the last 33. held_out: loss at high noise.

{results}
"""


def export_student(
    output: Path,
    *,
    causal: Path,
    weights: Literal["trained", "toy"] = "trained",
    stochastic: bool = False,
    threshold: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> KeyframeThreshold | None:
    """Write the student of the checkpoint `causal` in bf16, its settings, card and curves; all or nothing.

    The networks that stay as they were are shared with the model it began from if that is an embedded one, and else
    written too. weights: what `vidaccel.json` says about them. stochastic: its scheduler adds fresh noise in every
    step, for a student that was distilled. threshold: of the similarity below which a chunk is a keyframe; None
    measures it on held-out trips, on `device`, and returns what was found.
    Raises `UserError` if `output` is there already or the checkpoint cannot be used.
    """
    if output.exists() and not overwrite:
        raise UserError(f"{output} is there already; give another output or --overwrite.")
    state, student = trained_student(causal)
    found = None
    if threshold is None:
        found = _measured_threshold(student, state.recipe["init"], device=device)
        threshold = found.threshold
    with atomic_folder(output) as folder:
        student.cpu().to(torch.bfloat16).eval().save_pretrained(folder / "transformer")
        _write_settings(folder, state, memory=_memory_text(threshold), stochastic=stochastic, weights=weights)
        (folder / "README.md").write_text(student_card(state, stochastic=stochastic), encoding="utf-8")
        if (causal / METRICS_FILE).is_file():
            records = read_records(causal / METRICS_FILE)
            draw_curves(records, folder / "transformer_curves.png", title="training of the causal student")
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)
    return found


def student_card(state: TrainingState, *, stochastic: bool) -> str:
    """The README of the exported folder, in Markdown."""
    rounds = [*state.history, finished_round(state)]
    recipes = [f"round {number}: {recipe_text(past['recipe'])}." for number, past in enumerate(rounds, start=1)]
    first, last = rounds[0]["recipe"], rounds[-1]["recipe"]
    layers = f"layers {', '.join(map(str, first['layers']))}" if first.get("layers") else "all layers"
    return _CARD.format(
        chunk=CHUNK_FRAMES,
        memory=SLOTS,
        shares=_shared_model(first["init"]) or first["init"],
        init=first["init"],
        steps=_STEPS,
        sampler="stochastic" if stochastic else "deterministic",
        layers=layers,
        num_chunks=last["num_chunks"],
        num_steps=last["validation_steps"],
        rollout=last["validation_chunks"] * CHUNK_FRAMES,
        table="\n".join(["| network | round | steps | seconds |", "|---|---|---|---|", *round_rows(state)]),
        recipes="\n\n".join([*([state.origin] if state.origin else []), *recipes]),
        results="\n".join(["| what | value |", "|---|---|", *itertools.starmap(_result_row, state.results.items())]),
    )


def _result_row(name: str, value: float) -> str:
    is_share = not name.startswith("held_out") and not name.endswith("likelihood")
    return f"| {name} | {value:.1%} |" if is_share else f"| {name} | {value:.4f} |"


def _measured_threshold(student: Transformer, init: str, *, device: str) -> KeyframeThreshold:
    where, donor = training_device(device), load_donor(init)
    trips = [random_trip(_CALIBRATION_SEED + index, split="test") for index in range(_CALIBRATION_TRIPS)]
    bank = build_trip_bank(donor.vae.to(where), donor.tokenizer, trips=trips)
    return calibrate_threshold(student.to(where), donor.text_encoder.to(where), bank)


def _write_settings(folder: Path, state: TrainingState, *, memory: str, stochastic: bool, weights: str) -> None:
    """Scheduler, `model_index.json` and `vidaccel.json`; what cannot be shared is written too."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=FLOW_SHIFT, stochastic_sampling=stochastic
    )
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": STUDENT_PIPELINE,
        "_diffusers_version": diffusers.__version__,
        **{name: list(row) for name, row in _COMPONENTS.items()},
        "memory": memory,
        "chunk_frames": CHUNK_FRAMES,
        "num_inference_steps": _STEPS,
        "guidance_scale": _GUIDANCE_SCALE,
    }
    settings = _settings(state.recipe["init"], folder, weights=weights)
    for name, values in (("model_index.json", index), (SETTINGS_FILE, settings)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _settings(init: str, folder: Path, *, weights: str) -> dict[str, Any]:
    """The content of `vidaccel.json`; what cannot be shared is written to `folder`."""
    defaults = GenerationDefaults(
        num_frames=_NUM_FRAMES,
        height=FRAME_SIZE,
        width=FRAME_SIZE,
        fps=FPS,
        guidance_scale=_GUIDANCE_SCALE,
        num_inference_steps=_STEPS,
        max_sequence_length=_TEXT_LENGTH,
    )
    settings: dict[str, Any] = json.loads(settings_text(defaults, weights=weights))
    if (shares := _shared_model(init)) is not None:
        return settings | {"shares": shares}
    donor = load_donor(init)
    for name in ("vae", "text_encoder", "tokenizer"):
        getattr(donor, name).save_pretrained(folder / name)
    return settings


def _shared_model(init: str) -> str | None:
    """The embedded model that lends the other networks to a student that began from `init`; None for a folder."""
    spec = spec_of(init)
    if not spec.source.startswith(ASSET) or spec.folder is None:
        return None
    shared = shared_folder(spec.folder)
    return spec.folder.name if shared is None else shared.name


def _memory_text(threshold: float) -> str:
    return f"slow-fast:{SINK_FRAMES}+{SLOW_FRAMES}+{FAST_FRAMES + CHUNK_FRAMES}@{threshold:.6f}"

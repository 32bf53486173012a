"""From a causal checkpoint to a folder that holds the student only and names the model it shares the rest with."""

import json
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vidaccel.catalog.pipelines import STUDENT_PIPELINE, STUDENT_TRANSFORMER
from vidaccel.catalog.registry import SETTINGS_FILE, spec_of
from vidaccel.catalog.spec import ASSET, GenerationDefaults
from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_folder
from vidaccel.training.architecture import FLOW_SHIFT, NUM_TRAIN_TIMESTEPS
from vidaccel.training.card import recipe_text, round_rows, settings_text
from vidaccel.training.causal_student import load_donor
from vidaccel.training.causal_trainer import trained_student
from vidaccel.training.checkpoint import TrainingState
from vidaccel.training.curves import draw_curves, read_records
from vidaccel.training.loop import METRICS_FILE, finished_round
from vidaccel.world import FPS, FRAME_SIZE

_NUM_FRAMES = 97
_STEPS = 4
_GUIDANCE_SCALE = 1.0
_SIMILARITY_THRESHOLD = 0.997  # a still camera stays above it, a pan below: keys of a small model differ little
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
first ones, keyframes of the past and the latest. 128 x 128 pixels, 16 frames a second, any length. Text encoder,
tokenizer and autoencoder are those of `{shares}`.

```
vidaccel rollout "a red ball hops up and down on a grassy meadow" --seconds 60 --output ball.mp4
```

It knows what `{shares}` knows, and was made to try a bounded memory on trained weights, not to make films. It takes
a few deterministic steps a chunk and no guidance; it is trained by teacher forcing and not distilled.

## Data

Scenes of `vidaccel.world` with {num_frames} frames, rendered from seeds while training: the camera holds, pans away,
holds there and comes back; in a share of them (hold_share) it holds all the time. Captions describe the segment that
the chunk lies in. One tenth of all combinations of colour, shape, motion and place was never shown; the results below
are on that tenth.

## Training

`vidaccel train causal`, `vidaccel train export-causal`; begun as layers {layers} of the transformer of `{shares}`.
One pass sees the remembered frames and several noisy copies of the next chunk; keyframes are drawn at random.

{table}

{recipes}

## Results while training

Averaged weights in float32, {num_steps} Euler steps, guidance 1 (g1) and 3 (g3). Attributes are read by the oracle in
the first 49 frames of a rollout of {rollout} latent frames with one prompt; kept: colour, shape and place are still
right in the last 33.

{results}
"""


def export_student(
    output: Path, *, causal: Path, weights: Literal["trained", "toy"] = "trained", overwrite: bool = False
) -> Path:
    """Write the student of the checkpoint `causal` in bf16, its settings, card and curves; all or nothing.

    The networks that stay as they were are shared with the model it began from if that is an embedded one, and else
    written too. weights: what `vidaccel.json` says about them. Returns `output`.
    Raises `UserError` if `output` is there already or the checkpoint cannot be used.
    """
    if output.exists() and not overwrite:
        raise UserError(f"{output} is there already; give another output or --overwrite.")
    state, student = trained_student(causal)
    with atomic_folder(output) as folder:
        student.to(torch.bfloat16).eval().save_pretrained(folder / "transformer")
        scheduler: Any = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=FLOW_SHIFT, stochastic_sampling=False
        )
        scheduler.save_pretrained(folder / "scheduler")
        index: dict[str, Any] = {
            "_class_name": STUDENT_PIPELINE,
            "_diffusers_version": diffusers.__version__,
            **{name: list(row) for name, row in _COMPONENTS.items()},
            "memory": _memory_text(state.recipe["memory"]),
            "chunk_frames": state.recipe["memory"]["chunk_frames"],
            "num_inference_steps": _STEPS,
            "guidance_scale": _GUIDANCE_SCALE,
        }
        settings = _settings(state.recipe["init"], folder, weights=weights)
        for name, values in (("model_index.json", index), (SETTINGS_FILE, settings)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(student_card(state), encoding="utf-8")
        if (causal / METRICS_FILE).is_file():
            records = read_records(causal / METRICS_FILE)
            draw_curves(records, folder / "transformer_curves.png", title="training of the causal student")
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)
    return output


def student_card(state: TrainingState) -> str:
    """The README of the exported folder, in Markdown."""
    recipe = state.recipe
    memory = recipe["memory"]
    rounds = [*state.history, finished_round(state)]
    recipes = [
        f"round {number}: {recipe_text(past['recipe'])}, memory {_memory_text(past['recipe']['memory'])}."
        for number, past in enumerate(rounds, start=1)
    ]
    results = ["| what | value |", "|---|---|"]
    results += [
        f"| {name} | {value:.4f} |" if name.endswith("loss") else f"| {name} | {value:.1%} |"
        for name, value in state.results.items()
    ]
    first = rounds[0]["recipe"]
    return _CARD.format(
        chunk=memory["chunk_frames"],
        memory=memory["sink_frames"] + memory["slow_frames"] + memory["fast_frames"],
        shares=first["init"],
        layers=", ".join(map(str, first["layers"])),
        num_frames=recipe["num_frames"],
        num_steps=recipe["validation_steps"],
        rollout=recipe["validation_chunks"] * memory["chunk_frames"],
        table="\n".join(["| network | round | steps | seconds |", "|---|---|---|---|", *round_rows(state)]),
        recipes="\n\n".join([*([state.origin] if state.origin else []), *recipes]),
        results="\n".join(results),
    )


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
    source = spec_of(init).source
    if source.startswith(ASSET):
        return settings | {"shares": source.removeprefix(ASSET)}
    donor = load_donor(init)
    for name in ("vae", "text_encoder", "tokenizer"):
        getattr(donor, name).save_pretrained(folder / name)
    return settings


def _memory_text(memory: dict[str, Any]) -> str:
    sizes = "+".join(str(memory[part]) for part in ("sink_frames", "slow_frames", "fast_frames"))
    return f"slow-fast:{sizes}@{_SIMILARITY_THRESHOLD}"

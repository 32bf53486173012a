"""From a causal checkpoint to a folder that holds the student only and names the model it shares the rest with."""

import json
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vidaccel.catalog.pipelines import STUDENT_PIPELINE, STUDENT_TRANSFORMER
from vidaccel.catalog.registry import SETTINGS_FILE
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.files.atomic import atomic_folder, check_model_folder
from vidaccel.machine.progress_bars import without_progress_bars
from vidaccel.training.architecture import FLOW_SHIFT, NUM_TRAIN_TIMESTEPS, Transformer
from vidaccel.training.card import settings_text
from vidaccel.training.causal_card import shared_model, student_card
from vidaccel.training.causal_student import load_donor
from vidaccel.training.causal_trainer import trained_student
from vidaccel.training.checkpoint import TrainingState
from vidaccel.training.chunk_batch import FAST_FRAMES, SINK_FRAMES, SLOW_FRAMES
from vidaccel.training.curves import draw_curves, read_records
from vidaccel.training.device import training_device
from vidaccel.training.keyframe_threshold import KeyframeThreshold, calibrate_threshold
from vidaccel.training.loop import METRICS_FILE
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


def export_student(
    output: Path,
    *,
    causal: Path,
    weights: Literal["trained", "toy"] = "trained",
    stochastic: bool = False,
    teacher_share: float = 0.0,
    threshold: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> KeyframeThreshold | None:
    """Write the student of the checkpoint `causal` in bf16, its settings, card and curves; all or nothing.

    The networks that stay as they were are shared with the model it began from if that is an embedded one, and else
    written too. weights: what `vidaccel.json` says about them. stochastic: its scheduler adds fresh noise in every
    step, for a student that was distilled. teacher_share: see `trained_student`. threshold: of the similarity below
    which a chunk is a keyframe; None measures it on held-out trips, on `device`, and returns what was found.
    Raises `UserError` if `output` cannot be made or replaced, or the checkpoint cannot be used.
    """
    check_model_folder(output, (causal,), overwrite=overwrite)
    state, student = trained_student(causal, teacher_share=teacher_share)
    found = None
    if threshold is None:
        found = _measured_threshold(student, state.recipe["init"], device=device)
        threshold = found.threshold
    with atomic_folder(output) as folder:
        student.cpu().to(torch.bfloat16).eval().save_pretrained(folder / "transformer")
        _write_settings(folder, state, memory=_memory_text(threshold, student), stochastic=stochastic, weights=weights)
        card = student_card(
            state, name=output.name, num_steps=_STEPS, stochastic=stochastic, teacher_share=teacher_share
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        if (causal / METRICS_FILE).is_file():
            records = read_records(causal / METRICS_FILE)
            draw_curves(records, folder / "transformer_curves.png", title="training of the causal student")
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)
    return found


def _measured_threshold(student: Transformer, init: str, *, device: str) -> KeyframeThreshold:
    where, donor = training_device(device), load_donor(init)
    trips = [random_trip(_CALIBRATION_SEED + index, split="test") for index in range(_CALIBRATION_TRIPS)]
    bank = build_trip_bank(donor.vae.to(where), donor.tokenizer, trips=trips)
    return calibrate_threshold(student.to(where), donor.text_encoder.to(where), bank)


def _write_settings(folder: Path, state: TrainingState, *, memory: str, stochastic: bool, weights: str) -> None:
    """Scheduler, `model_index.json` and `vidaccel.json`; what cannot be shared is written too."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        shift=state.recipe.get("shift", FLOW_SHIFT),  # of a distillation
        stochastic_sampling=stochastic,
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
    if (shares := shared_model(init)) is not None:
        return settings | {"shares": shares}
    donor = load_donor(init)
    with without_progress_bars():
        for name in ("vae", "text_encoder", "tokenizer"):
            getattr(donor, name).save_pretrained(folder / name)
    return settings


def _memory_text(threshold: float, student: Transformer) -> str:
    every = student.config.depth_every
    sizes = f"slow-fast:{SINK_FRAMES}+{SLOW_FRAMES}x{CHUNK_FRAMES}+{FAST_FRAMES + CHUNK_FRAMES}@{threshold:.6f}"
    return sizes if every == 1 else f"{sizes}%{every}"

"""From two checkpoints to a folder that the stock `WanPipeline.from_pretrained(folder)` loads, weights in bf16."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanPipeline

from vidaccel.catalog.registry import SETTINGS_FILE
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_folder, check_model_folder
from vidaccel.machine.progress_bars import without_progress_bars
from vidaccel.training.architecture import new_scheduler, new_tokenizer
from vidaccel.training.card import model_card, settings_text
from vidaccel.training.checkpoint import load_checkpoint
from vidaccel.training.curves import draw_curves, read_records
from vidaccel.training.loop import METRICS_FILE
from vidaccel.training.transformer_trainer import trained_networks, trained_vae
from vidaccel.world import FPS, FRAME_SIZE, vocabulary

_MOST_FILE_BYTES = 16_000_000
_TEXT_LENGTH = 64


def export_pipeline(
    output: Path,
    *,
    vae: Path,
    transformer: Path,
    weights: Literal["trained", "toy"] = "trained",
    overwrite: bool = False,
) -> Path:
    """Write the pipeline of the checkpoints `vae` and `transformer`, its settings, card and curves; all or nothing.

    weights: what `vidaccel.json` says about them. Returns `output`.
    Raises `UserError` if `output` cannot be made or replaced, or a checkpoint cannot be used.
    """
    check_model_folder(output, (vae, transformer), overwrite=overwrite)
    with atomic_folder(output) as folder:
        _write(folder, vae=vae, transformer=transformer, weights=weights)
    return output


def _write(folder: Path, *, vae: Path, transformer: Path, weights: str) -> None:
    vae_state, _ = load_checkpoint(vae, kind="vae")
    state, denoiser, text_encoder = trained_networks(transformer)
    if state.latents_mean is None or state.latents_std is None:
        raise UserError(f"The checkpoint in {transformer} has no normalisation of the latents; train it again.")
    autoencoder = trained_vae(vae)
    autoencoder.register_to_config(latents_mean=list(state.latents_mean), latents_std=list(state.latents_std))
    pipeline: Any = WanPipeline(
        tokenizer=new_tokenizer(vocabulary()),
        text_encoder=text_encoder.to(torch.bfloat16).eval(),
        vae=autoencoder.to(torch.bfloat16).eval(),
        scheduler=new_scheduler(),
        transformer=denoiser.to(torch.bfloat16).eval(),
    )
    with without_progress_bars():
        pipeline.save_pretrained(folder, max_shard_size=_MOST_FILE_BYTES)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    defaults = GenerationDefaults(
        num_frames=state.recipe.get("num_frames", 49),
        height=FRAME_SIZE,
        width=FRAME_SIZE,
        fps=FPS,
        max_sequence_length=_TEXT_LENGTH,
    )
    (folder / SETTINGS_FILE).write_text(settings_text(defaults, weights=weights), encoding="utf-8")
    (folder / "README.md").write_text(model_card(vae_state, state), encoding="utf-8")
    for checkpoint, name in ((vae, "vae"), (transformer, "transformer")):
        if (checkpoint / METRICS_FILE).is_file():
            records = read_records(checkpoint / METRICS_FILE)
            draw_curves(records, folder / f"{name}_curves.png", title=f"training of the {name}")

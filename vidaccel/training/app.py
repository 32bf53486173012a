"""`vidaccel train`: the commands that make the embedded models; also `python -m vidaccel.training.app`."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from vidaccel.errors import UserError, check_share
from vidaccel.training.console_app import (
    Checkpointing,
    Compile,
    Device,
    Layers,
    Output,
    Resume,
    Seconds,
    Seed,
    Steps,
    TeacherShare,
    Toy,
    check_output,
    draw,
    failures,
    folder_bytes,
    layers_of,
    length_of,
    show,
    show_with_bank,
)
from vidaccel.training.context_forcing_app import context_forcing
from vidaccel.training.offline.app import offline

if TYPE_CHECKING:
    from vidaccel.training.keyframe_threshold import KeyframeThreshold


app = typer.Typer(
    help="Train the embedded models: `vae`, `transformer`, `export`; then `causal`, `context-forcing` or `offline`, "
    "`export-causal`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def vae(
    output: Output,
    seconds: Seconds = None,
    steps: Steps = None,
    resume: Resume = None,
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1.2e-3,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = False,
    toy: Toy = False,
) -> None:
    """Train the autoencoder on images, then on longer and longer clips."""
    from vidaccel.training.loop import Schedule  # loads PyTorch, as all that trains
    from vidaccel.training.vae_trainer import VaeTrainingConfig, train_vae

    schedule = Schedule(**length_of(seconds, steps, toy), learning_rate=learning_rate, ema_decay=0.998)
    config = VaeTrainingConfig(schedule=schedule, seed=seed, device=device, compile=compile)
    if toy:
        config = config.rehearsal()
    check_output(output, resume)
    with failures():
        show(train_vae(config, output, resume=resume), title="autoencoder")
    draw(output, "training of the vae")


@app.command()
def transformer(
    output: Output,
    vae: Annotated[Path, typer.Option(help="Folder of the autoencoder's checkpoint.")],
    seconds: Seconds = None,
    steps: Steps = None,
    resume: Resume = None,
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-3,
    bank_clips: Annotated[int, typer.Option(help="Clips to render and encode first.")] = 24_576,
    batch_size: Annotated[int, typer.Option(help="Clips a step.")] = 64,
    optimizer: Annotated[Literal["muon", "adamw"], typer.Option(help="For the matrices of the blocks.")] = "muon",
    subject_weight: Annotated[float, typer.Option(help="Extra weight of the subject in the loss.")] = 3.0,
    validations: Annotated[int, typer.Option(help="How often the oracle reads generated clips.")] = 3,
    validation_prompts: Annotated[int, typer.Option(help="Clips it reads each time.")] = 32,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = False,
    toy: Toy = False,
) -> None:
    """Train the transformer and the text encoder on clips encoded by the autoencoder."""
    from vidaccel.training.loop import Schedule
    from vidaccel.training.transformer_trainer import TransformerTrainingConfig, train_transformer

    config = TransformerTrainingConfig(
        schedule=Schedule(
            **length_of(seconds, steps, toy),
            learning_rate=learning_rate,
            ema_decay=0.9993,
            num_validations=validations,
        ),
        seed=seed,
        device=device,
        bank_clips=bank_clips,
        batch_size=batch_size,
        optimizer=optimizer,
        subject_weight=subject_weight,
        validation_prompts=validation_prompts,
        compile=compile,
    )
    if toy:
        config = config.rehearsal()
    check_output(output, resume)
    with failures():
        show_with_bank(partial(train_transformer, config, output, vae=vae, resume=resume), title="transformer")
    draw(output, "training of the transformer")


@app.command()
def causal(
    output: Output,
    init: Annotated[str, typer.Option(help="Wan pipeline or causal student to begin from: a name or a folder.")] = (
        "wan-tiny-causal"
    ),
    layers: Layers = None,
    seconds: Seconds = None,
    steps: Steps = None,
    resume: Resume = None,
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-3,
    bank_clips: Annotated[int, typer.Option(help="Clips of 15 chunks to render and encode first.")] = 6000,
    bank_seconds: Annotated[float | None, typer.Option(help="Stop preparing them after this time.")] = None,
    batch_size: Annotated[int, typer.Option(help="Chunks a step.")] = 64,
    begin_batch: Annotated[int, typer.Option(help="First chunks beside them, which are made from nothing.")] = 64,
    begin_clips: Annotated[int, typer.Option(help="Clips encoded for these alone; 0: those of the bank.")] = 0,
    change_batch: Annotated[int, typer.Option(help="Chunks after a change of the prompt beside them.")] = 0,
    change_clips: Annotated[int, typer.Option(help="Short clips that these are taken from.")] = 0,
    copies: Annotated[int, typer.Option(help="Noise levels of each chunk.")] = 4,
    optimizer: Annotated[Literal["muon", "adamw"], typer.Option(help="For the matrices of the blocks.")] = "muon",
    context_noise: Annotated[float, typer.Option(help="Greatest noise on remembered frames; 0 for none.")] = 0.15,
    own_share: Annotated[float, typer.Option(help="Steps that follow the student's own last chunk.")] = 0.15,
    return_share: Annotated[float, typer.Option(help="Chunks in which the camera comes back to a place.")] = 0.5,
    change_share: Annotated[float, typer.Option(help="Chunks that follow a change of the prompt.")] = 0.15,
    kv_routing: Annotated[
        float, typer.Option(help="Probability that a layer reads a random earlier one's memory; 0: never.")
    ] = 0.0,
    depth_every: Annotated[int, typer.Option(help="Layers that always share one memory, in groups of so many.")] = 1,
    landmark_weight: Annotated[float, typer.Option(help="Extra weight of landmarks in the loss.")] = 1.0,
    validations: Annotated[int, typer.Option(help="How often recall is measured and rollouts are read.")] = 3,
    validation_trips: Annotated[int, typer.Option(help="Trips that recall is measured on.")] = 64,
    validation_clips: Annotated[int, typer.Option(help="Rollouts with one prompt that are read.")] = 16,
    checkpointing: Checkpointing = False,
    seed: Seed = 0,
    device: Device = "auto",
    compile: Compile = False,
    toy: Toy = False,
) -> None:
    """Train a causal student that remembers places, by teacher forcing on trips that come back to them."""
    from vidaccel.training.causal_config import CausalTrainingConfig
    from vidaccel.training.causal_trainer import train_causal
    from vidaccel.training.loop import Schedule

    config = CausalTrainingConfig(
        schedule=Schedule(
            **length_of(seconds, steps, toy),
            learning_rate=learning_rate,
            decay="linear",
            flat_share=0.3,
            final_share=0.02,
            warmup_steps=100,
            num_validations=validations,
        ),
        seed=seed,
        device=device,
        init=init,
        layers=layers_of(layers),
        bank_clips=bank_clips,
        bank_seconds=bank_seconds,
        batch_size=batch_size,
        begin_batch=begin_batch,
        begin_clips=begin_clips,
        change_batch=change_batch,
        change_clips=change_clips,
        copies=copies,
        optimizer=optimizer,
        context_noise=context_noise,
        own_share=own_share,
        return_share=return_share,
        change_share=change_share,
        kv_routing=kv_routing,
        depth_every=depth_every,
        landmark_weight=landmark_weight,
        validation_trips=validation_trips,
        validation_clips=validation_clips,
        compile=compile,
        checkpointing=checkpointing,
    )
    if toy:
        config = config.rehearsal()
    check_output(output, resume)
    with failures():
        show_with_bank(partial(train_causal, config, output, resume=resume), title="causal student")
    draw(output, "training of the causal student")


app.command("context-forcing")(context_forcing)
app.command()(offline)


@app.command()
def export(
    output: Output,
    vae: Annotated[Path, typer.Option(help="Folder of the autoencoder's checkpoint.")],
    transformer: Annotated[Path, typer.Option(help="Folder of the transformer's checkpoint.")],
    weights: Annotated[Literal["trained", "toy"], typer.Option(help="What the folder says about its weights.")] = (
        "trained"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a folder in bf16 that the stock WanPipeline loads."""
    from vidaccel.training.export import export_pipeline
    from vidaccel.training.ranks import check_alone

    check_alone("An export")
    with failures():
        export_pipeline(output, vae=vae, transformer=transformer, weights=weights, overwrite=overwrite)
    typer.echo(f"{output}: {folder_bytes(output) / 1e6:.1f} MB")


@app.command()
def export_causal(
    output: Output,
    causal: Annotated[Path, typer.Option(help="Folder of the causal student's checkpoint.")],
    weights: Annotated[Literal["trained", "toy"], typer.Option(help="What the folder says about its weights.")] = (
        "trained"
    ),
    stochastic: Annotated[bool, typer.Option("--stochastic", help="Add fresh noise in every step.")] = False,
    teacher_share: TeacherShare = 0.0,
    threshold: Annotated[float | None, typer.Option(help="Similarity below which a chunk is kept; else measured.")] = (
        None
    ),
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write the causal student in bf16; it shares the other networks with the model it began from."""
    from vidaccel.training.causal_export import export_student
    from vidaccel.training.ranks import check_alone

    check_alone("An export")
    check_share("teacher-share", teacher_share)
    if threshold is not None:
        check_share("threshold", threshold)
    with failures():
        found = export_student(
            output,
            causal=causal,
            weights=weights,
            stochastic=stochastic,
            teacher_share=teacher_share,
            threshold=threshold,
            device=device,
            overwrite=overwrite,
        )
    if found is not None:
        typer.echo(_threshold_text(found))
    typer.echo(f"{output}: {folder_bytes(output) / 1e6:.1f} MB")


def _threshold_text(found: KeyframeThreshold) -> str:
    """The threshold and the two distributions that it divides."""
    rows = [
        f"{name}: similarity {values[0]:.5f} least, {values[len(values) // 2]:.5f} median, {values[-1]:.5f} greatest "
        f"of {len(values)} chunks, {share:.1%} {what}"
        for name, values, share, what in (
            ("camera starts or stops", found.turning, found.found, "below"),
            ("camera rests", found.resting, found.spared, "not below"),
        )
    ]
    return "\n".join([f"keyframes below similarity {found.threshold:.6f}", *rows])


def main() -> None:
    """Run without the command line of vidaccel, on a machine that only has a checkout."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # by which schedulers stop a job
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""`vidaccel convert`: published weights into a folder that the pipelines load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from vidaccel.cli.console import messages, say
from vidaccel.errors import UserError

if TYPE_CHECKING:
    from vidaccel.convert.causal_wan import Converted
    from vidaccel.convert.folder import ConvertOptions, ConvertProgress

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_DTYPES = ("keep", "float32", "bfloat16", "float16")


@app.callback()
def _group() -> None:
    """Turn published weights into a folder that the pipelines load."""


@app.command("open-sora")
def open_sora(
    checkpoint: Annotated[
        list[Path],
        typer.Option(
            help="File or folder of published weights; may be given several times. Transformer, VAE, text encoders "
            "and tokenizers are recognised by what they hold."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    version: Annotated[str, typer.Option(help="auto, 1.2 or 2.0.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Number format: {', '.join(_DTYPES)}.")] = "keep",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a diffusers folder that exists.")] = False,
) -> None:
    """Turn the published files of Open-Sora 1.2 or 2.0 into a diffusers folder."""
    _check_dtype(dtype)
    from vidaccel.convert.folder import convert  # loads PyTorch
    from vidaccel.convert.open_sora import RECIPES, REFUSED

    with _options(dtype, overwrite=overwrite) as options:
        recipe = convert(checkpoint, output, recipes=RECIPES, refused=REFUSED, version=version, options=options)
    say(f"{output}: {recipe.name} {recipe.version}, {recipe.pipeline}")


@app.command("causal-wan")
def causal_wan(
    checkpoint: Annotated[Path, typer.Option(help="Weights of a causal Wan student: a .safetensors file or a folder.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Diffusers folder of the Wan model that the student was made from; VAE, text encoder and tokenizer "
            "are copied from it. Without it the folder has none and does not load by itself."
        ),
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA that is added to the weights (LongLive).")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Scale of the LoRA times its rank; usually the rank.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Whose student it is, such as self-forcing or causvid; a wrong one lists them all.")
    ] = "auto",
    chunk_frames: Annotated[
        int | None,
        typer.Option(
            help="Latent frames that the student makes at once, 1 for a frame-wise one. Without it: what a config.json "
            "or YAML file beside the weights says, else what is published for the kind."
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory that the student was trained with, as `rollout --memory`; the kind's.")
    ] = None,
    weights: Annotated[str, typer.Option(help="ema, plain, or auto: ema where there are such.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Number format of the transformer: {', '.join(_DTYPES)}.")] = "keep",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a diffusers folder that exists.")] = False,
) -> None:
    """Turn the published weights of a causal Wan student into a diffusers folder."""
    _check_dtype(dtype)
    from vidaccel.convert.causal_wan import StudentFiles, StudentSettings, convert_causal_wan  # loads PyTorch

    files = StudentFiles(checkpoint=checkpoint, weights=weights, base=base, lora=lora, lora_alpha=lora_alpha)
    settings = StudentSettings(chunk_frames=chunk_frames, memory=memory)
    with _options(dtype, overwrite=overwrite) as options:
        made = convert_causal_wan(files, output, kind=kind, settings=settings, options=options)
    alone = "" if base else "; VAE, text encoder and tokenizer are missing, give --base for a folder that loads"
    say(f"{output}: {_summary(made)}{alone}")
    if made.remark:
        say(f"{made.recipe.name}: {made.remark}.")


def _summary(made: Converted) -> str:
    """What was written, and who says how many frames a chunk has."""
    frames = f"{made.chunk.number} latent frame{'s' if made.chunk.number > 1 else ''} ({made.chunk.source})"
    memory = made.recipe.settings["memory"]
    return f"{made.recipe.name}, chunks of {frames}, {made.weights} weights, memory {memory}, {made.recipe.pipeline}"


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise UserError(f"`--dtype` must be one of {', '.join(_DTYPES)}; got {dtype!r}.")


@contextmanager
def _options(dtype: str, *, overwrite: bool) -> Iterator[ConvertOptions]:
    """What both commands are told, with a progress bar as long as they work."""
    import torch

    from vidaccel.convert.folder import ConvertOptions

    with _byte_bar("reading") as advance:
        yield ConvertOptions(
            dtype=None if dtype == "keep" else getattr(torch, dtype), overwrite=overwrite, on_progress=advance
        )


@contextmanager
def _byte_bar(title: str) -> Iterator[Callable[[ConvertProgress], None]]:
    """A progress bar on stderr that counts bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task(title, total=None)

        def advance(state: ConvertProgress) -> None:
            progress.update(task, description=state.component, completed=state.done, total=state.total)

        yield advance

"""`vidaccel models`: the models that have a name, the families that are tested, and tiny random models of them."""

from pathlib import Path
from typing import Annotated

import typer

from vidaccel.catalog import table
from vidaccel.catalog.families.checks import CHECKS
from vidaccel.catalog.families.family import Family
from vidaccel.catalog.models import MODELS
from vidaccel.catalog.presets import Preset
from vidaccel.catalog.spec import ModelSpec
from vidaccel.catalog.table import family_named
from vidaccel.cli.console import say
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError

_COLUMN = 28  # as wide as the longest name


def models(
    families: Annotated[
        bool, typer.Option("--families", help="List the families of pipelines that EasyCache is tested on instead.")
    ] = False,
    random: Annotated[
        tuple[str, Path] | None,
        typer.Option("--make-random", metavar="FAMILY DIR", help="Write a tiny random model of a family to a folder."),
    ] = None,
    seed: Annotated[int, typer.Option(help="--make-random: the same seed gives the same weights.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="--make-random: replace a model that is there.")
    ] = False,
) -> None:
    """List the models that have a name; any other local folder or Hub id works too."""
    if random is not None:
        _make_random(*random, seed=seed, overwrite=overwrite)
    elif families:
        _say_families()
    else:
        _say_models()


def _say_models() -> None:
    for spec in MODELS:
        size = spec.defaults
        _say_entry(
            spec.name,
            spec.description,
            f"{size.num_frames} frames of {size.width}x{size.height}, {size.fps} a second, "
            f"{size.num_inference_steps} steps",
            _where(spec),
        )
    say(f"\n`vidaccel models --families`: the {len(table.CATALOG.families)} families that EasyCache is tested on.")


def _say_families() -> None:
    say(
        "Families; `vidaccel models --make-random FAMILY DIR` writes a tiny random model of one. "
        "What is tested with EasyCache, of every family but for what stands under it:"
    )
    for name, sentence in CHECKS.items():
        say(f"  {name:{_COLUMN - 2}} {sentence}")
    say("")
    for family in table.CATALOG.families:
        _say_entry(family.name, family.description, _interface(family), *_easycache(family))


def _make_random(name: str, folder: Path, *, seed: int, overwrite: bool) -> None:
    from vidaccel.random_models.build import make_random  # its libraries take seconds

    family = family_named(name)
    make_random(family, folder, seed=seed, overwrite=overwrite)
    say(f"{folder}: a tiny {family.pipeline_name} with random weights; its videos are noise")


def _say_entry(name: str, *lines: str) -> None:
    say(f"\n{'':{_COLUMN}} ".join((f"{name:{_COLUMN}} {lines[0]}", *lines[1:])))


def _interface(family: Family) -> str:
    inputs = ", ".join(("prompt", *(name.replace("_", " ") for name in family.inputs)))
    return f"{family.pipeline_name}; takes {inputs}"


def _easycache(family: Family) -> list[str]:
    if family.refusal:
        return [f"EasyCache is refused: {family.refusal}"]
    checks: dict[str, list[str]] = {}
    for name, reason in family.untested.items():
        checks.setdefault(reason, []).append(name)
    return [_settings(family), *(f"not tested: {', '.join(names)}: {reason}" for reason, names in checks.items())]


def _settings(family: Family) -> str:
    networks = [family.components[name].kind for name in ("transformer", "transformer_2") if name in family.components]
    preset = Preset.for_classes(
        pipelines={family.pipeline_name},
        transformers={kind.rpartition(":")[2] for kind in networks},
        config=family.settings,
    )
    config = EasyCacheConfig.published(preset)
    source = "the defaults, none are published for it" if preset is None else preset.source
    return f"threshold {config.threshold:g}, {config.warmup_steps} warm-up steps: {source}"


def _where(spec: ModelSpec) -> str:
    try:
        folder = spec.folder
    except UserError as error:
        return str(error)
    return f"Hub: {spec.source}" if folder is None else f"on this machine: {folder}"

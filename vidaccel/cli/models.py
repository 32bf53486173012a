"""`vidaccel models`: the models that have a name, and whether they are on this machine."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vidaccel.cli.console import console
from vidaccel.errors import UserError
from vidaccel.registry import MODELS, ModelSpec


def models() -> None:
    """List the models that have a name; any other local folder or Hub id works too."""
    table = Table("name", "frames, size, steps", "source", "description", box=SIMPLE_HEAD)
    for spec in MODELS:
        size = spec.defaults
        table.add_row(
            spec.name,
            f"{size.num_frames}, {size.width}x{size.height}, {size.num_inference_steps}",
            _where(spec),
            spec.description,
        )
    console.print(table)


def _where(spec: ModelSpec) -> str:
    try:
        folder = spec.folder
    except UserError:
        return "missing"
    return spec.source if folder is None else "this machine"

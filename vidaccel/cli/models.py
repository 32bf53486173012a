"""`vidaccel models`: the models that have a name, and where they are."""

from vidaccel.cli.console import say
from vidaccel.errors import UserError
from vidaccel.registry import MODELS, ModelSpec


def models() -> None:
    """List the models that have a name; any other local folder or Hub id works too."""
    for spec in MODELS:
        size = spec.defaults
        say(
            f"{spec.name:21} {spec.description}\n"
            f"{'':21} {size.num_frames} frames of {size.width}x{size.height}, {size.fps} a second, "
            f"{size.num_inference_steps} steps\n"
            f"{'':21} {_where(spec)}"
        )


def _where(spec: ModelSpec) -> str:
    try:
        folder = spec.folder
    except UserError as error:
        return str(error)
    return f"Hub: {spec.source}" if folder is None else f"on this machine: {folder}"

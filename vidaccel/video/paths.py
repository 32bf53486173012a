"""Which files are videos and which are images, by the ending of their name; loads no PyTorch."""

from pathlib import Path

from vidaccel.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def existing_path(path: str | Path) -> Path:
    """The path, if something is there. Raises UserError where nothing is."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    return path

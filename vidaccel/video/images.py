"""Pictures to tensors: stills of any depth and mode, and moving pictures (WebP, APNG, GIF, AVIF) with their times.

Whatever the file holds becomes float32 in [0, 1]: 8 and 16 bits by their range, floats as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidaccel.errors import UserError, first_line
from vidaccel.video.frames import as_float
from vidaccel.video.paths import existing_path
from vidaccel.video.rate import FrameTimes

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_DEEP_MODES = ("I", "F")  # and I;16 in its byte orders
_MOST_LEVEL = 65535
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
# What Pillow's readers raise for files that are damaged, found by damaging files of every format.
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, RuntimeError, struct.error)
_USUAL_DURATION = Fraction(1, 10)  # of a frame that says none, as browsers show it


def read_image(path: str | Path) -> Tensor:
    """An image as (3, H, W) float32 in [0, 1]; turned as its EXIF says, transparency laid on white.

    16-bit grey is divided by 65535. 32-bit integers are levels of 16 bits as well; floats are taken as they are. Of a
    moving picture it is the first frame.

    Raises UserError for a file that is missing or no readable image, for 32-bit integers outside 0 to 65535 and floats
    outside 0 to 1.
    """
    path = existing_path(path)
    with _opened(path) as image:
        return _pixels(image, path.name)


def read_pictures(path: Path) -> tuple[list[Tensor], FrameTimes | None]:
    """All frames of a picture file, each (3, H, W) uint8 or float32 in [0, 1], and when they are shown.

    A still, and the pages of a TIFF file, have no times. Raises UserError as `read_image` does.
    """
    with _opened(path) as image:
        first = 1 if getattr(image, "default_image", False) else 0  # an APNG may hold a still for old programs
        pictures, durations = [], []
        for index in range(first, getattr(image, "n_frames", 1)) if image.format != "MPO" else range(1):
            image.seek(index)
            pictures.append(_pixels(image, path.name))
            durations.append(_duration(image))
    is_moving = image.format != "TIFF" and len(pictures) > 1
    return pictures, FrameTimes.of_durations(durations) if is_moving else None


def is_picture(path: Path) -> bool:
    """Whether the file begins as a picture does, whatever its suffix."""
    from PIL import Image

    try:
        with Image.open(path, formats=_formats()):
            return True
    except Image.DecompressionBombError:
        return True
    except _DAMAGE:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The picture; what goes wrong with it in the block is one line about the file."""
    from PIL import Image

    try:
        with Image.open(path, formats=_formats()) as image:
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path.name} is too large for a picture: {first_line(error)}.") from error
    except _DAMAGE as error:
        raise UserError(f"{path.name} cannot be read as an image; give a PNG or JPEG file.") from error


def _formats() -> list[str]:
    """The formats that this Pillow was built with."""
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _pixels(image: Any, name: str) -> Tensor:
    """The frame that `image` stands at, (3, H, W) float32 in [0, 1]."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode in _DEEP_MODES or upright.mode.startswith("I;16"):
        grey = _deep_grey(upright, image, name)
        return torch.from_numpy(grey).expand(3, -1, -1).clone()
    upright = upright.convert("RGBA")
    white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
    rgb = np.array(Image.alpha_composite(white, upright).convert("RGB"))
    return as_float(torch.from_numpy(rgb).permute(2, 0, 1))


def _deep_grey(upright: Any, image: Any, name: str) -> np.ndarray:
    """Grey of more than 8 bits, (H, W) float32 in [0, 1]."""
    tags = getattr(image, "tag_v2", {})
    levels = np.asarray(upright)
    if upright.mode == "I" and _format_of(tags) == (32, _UNSIGNED):  # which Pillow reads as signed
        levels = levels.view(np.uint32)
    values = levels.astype(np.float64)
    least, most = float(values.min()), float(values.max())
    if upright.mode == "F":
        if not (least >= 0 and most <= 1):  # NaN too
            raise UserError(f"{name} holds floats from {least:g} to {most:g}; only 0 to 1 can be read, so divide them.")
        grey = values
    else:
        full = _full_scale(tags)
        if least < 0 or most > full:
            raise UserError(
                f"{name} holds integers from {least:.0f} to {most:.0f}; 0 to {full} can be read: save it with 16 bits."
            )
        grey = values / full
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 1 - grey
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey = np.where(values == key, 1.0, grey)
    return grey.astype(np.float32)


def _full_scale(tags: Any) -> int:
    """The integer that is white: of TIFF files by their bits, where those are 16 or fewer."""
    bits, kind = _format_of(tags)
    return 2 ** (bits - (kind == _SIGNED)) - 1 if 8 < bits <= 16 else _MOST_LEVEL


def _format_of(tags: Any) -> tuple[int, int]:
    """Bits and kind of the numbers of a TIFF file; 0 bits for other files."""
    return tags.get(_TIFF_BITS, (0,))[0], tags.get(_TIFF_SAMPLE_FORMAT, (_UNSIGNED,))[0]


def _duration(image: Any) -> Fraction:
    """How long the frame that was just read is shown, in seconds."""
    milliseconds = Fraction(image.info.get("duration") or 0).limit_denominator(1000)
    return milliseconds / 1000 or _USUAL_DURATION

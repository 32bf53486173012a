"""The picture of the recall benchmark: what is seen at the visits, a column a trip, made from the result file alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidaccel.files.atomic import atomic_write
from vidaccel.machine.environment import hardware_line
from vidaccel.video.frames import rounded_to_uint8

COLUMNS = 8
ROWS = (
    ("return/truth", "first", "first visit"),
    ("return", "second", "return,\nwith memory"),
    ("return/blank", "second", "return, no frame\nof it in memory"),
    ("return/swap/truth", "first", "first visit,\nlandmark swapped"),
    ("return/swap", "second", "return after that"),
    ("own", "first", "own video:\nfirst visit"),
    ("own", "second", "own video:\nreturn"),
)
_QUALITY = 90


def is_pictured(cell: str, visit: str) -> bool:
    """Whether the picture has a row of that visit."""
    return (cell, visit) in {(name, which) for name, which, _ in ROWS}


def strip_of(stills: Tensor) -> str:
    """The first of stills (N, 3, H, W) in [0, 1] beside each other, a WebP in base64."""
    strip = torch.cat(list(stills[:COLUMNS]), dim=2)
    written = io.BytesIO()
    Image.fromarray(rounded_to_uint8(strip).permute(1, 2, 0).numpy()).save(written, format="WEBP", quality=_QUALITY)
    return base64.b64encode(written.getvalue()).decode("ascii")


def pixels_of(strip: str) -> np.ndarray[Any, Any]:
    """(H, W, 3) uint8 of what `strip_of` wrote."""
    with Image.open(io.BytesIO(base64.b64decode(strip))) as image:
        return np.asarray(image.convert("RGB"))


def save_places(path: Path, content: Mapping[str, Any]) -> Path | None:
    """The rows that were measured, with their names; None, and no file, where none was."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    strips = {
        (record["cell"], visit): strip for record in content["records"] for visit, strip in record["strips"].items()
    }
    rows = [(strips[cell, visit], label) for cell, visit, label in ROWS if (cell, visit) in strips]
    if not rows:
        return None
    figure = Figure(figsize=(11.5, 0.5 + 1.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (strip, label) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes.imshow(pixels_of(strip))
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.suptitle("\n".join(map(hardware_line, content["environments"])), fontsize=8)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=110, bbox_inches="tight")
    return path

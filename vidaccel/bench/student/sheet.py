"""The pictures beside the figures: one contact sheet, a row for each kind of picture and a column for each try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from vidaccel.files.atomic import atomic_write
from vidaccel.video.frames import rounded_to_uint8

MOST_COLUMNS = 8
_LABEL_WIDTH = 150


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pictures (N, 3, H, W), uint8 or in [0, 1], and what they show."""

    label: str
    pictures: Tensor


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of one part: a plain record of every try, and rows for the contact sheet."""

    tries: list[dict[str, Any]]
    rows: list[Row]


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, one under the other, with their labels to the left."""
    _save(_stacked([_strip(row) for row in rows]), path)


def save_sheet(path: Path, parts: Sequence[Path]) -> None:
    """Put the pictures that `save_rows` wrote under each other."""
    _save(_stacked([Image.open(part) for part in parts]), path)


def _stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures under each other, on white where one is narrower."""
    size = (max(picture.width for picture in pictures), sum(picture.height for picture in pictures))
    page = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    return page


def _strip(row: Row) -> Image.Image:
    pictures = row.pictures[:MOST_COLUMNS]
    if pictures.is_floating_point():
        pictures = rounded_to_uint8(pictures)
    strip = np.concatenate(list(pictures.permute(0, 2, 3, 1).cpu().numpy()), axis=1)
    page = Image.new("RGB", (_LABEL_WIDTH + strip.shape[1], strip.shape[0]), "white")
    ImageDraw.Draw(page).text((6, strip.shape[0] // 2 - 6), row.label, fill="black")
    page.paste(Image.fromarray(strip), (_LABEL_WIDTH, 0))
    return page


def _save(page: Image.Image, path: Path) -> None:
    with atomic_write(path) as unfinished:
        page.save(unfinished, format="PNG")

"""Pictures of every mode and depth become the numbers that they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vidaccel.errors import UserError
from vidaccel.video.files import load_frames
from vidaccel.video.images import read_image


def test_an_image_reads_as_floats_upright_and_on_white(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    assert torch.equal(read_image(tmp_path / "plain.png"), expected)
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    assert torch.equal(read_image(tmp_path / "turned.png"), expected.rot90(-1, (1, 2)))
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(read_image(tmp_path / "clear.png"), torch.ones(3, 4, 4))


def level(path: Path) -> list[float]:
    """The colour of the first pixel."""
    pixels = read_image(path)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 4, 4)
    return [round(value, 4) for value in pixels[:, 0, 0].tolist()]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0.0), (257, 0.0039), (32768, 0.5), (65535, 1.0)])
def test_grey_of_sixteen_bits_is_divided_by_its_range(tmp_path: Path, suffix: str, value: int, expected: float) -> None:
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"grey{suffix}")
    assert level(tmp_path / f"grey{suffix}") == [expected] * 3


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_integers_of_thirty_two_bits_are_levels_of_sixteen(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.full((4, 4), 32768, np.int32)).save(tmp_path / f"grey{suffix}")
    assert level(tmp_path / f"grey{suffix}") == [0.5] * 3


def test_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.25, np.float32)).save(tmp_path / "grey.tif")
    assert level(tmp_path / "grey.tif") == [0.25] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 128.0, np.float32), "floats from 128 to 128; only 0 to 1"),
        (np.full((4, 4), -0.5, np.float32), "floats from -0.5 to -0.5"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan"),
        (np.full((4, 4), 70000, np.int32), "integers from 70000 to 70000; 0 to 65535"),
        (np.full((4, 4), -1, np.int32), "integers from -1 to -1"),
    ],
)
def test_numbers_without_a_meaning_are_refused_in_one_line(tmp_path: Path, values: np.ndarray, message: str) -> None:
    Image.fromarray(values).save(tmp_path / "grey.tif")
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / "grey.tif")
    assert "\n" not in str(caught.value)


def test_grey_of_sixteen_bits_is_right_in_a_folder_and_as_a_mask_too(tmp_path: Path) -> None:
    for index, value in enumerate((0, 32768, 65535)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"depth_{index}.png")
    assert [round(value, 4) for value in load_frames(tmp_path)[:, 0, 0, 0].tolist()] == [0, 0.5, 1]


def tiff(path: Path, pixels: bytes, **tags: Any) -> Path:
    """A grey TIFF file of 4 x 4 pixels with tags that Pillow does not write by itself."""
    numbers = {256: 4, 257: 4, 258: 16, 259: 1, 262: 1, 277: 1, 278: 4, 279: len(pixels), 339: 1}
    numbers |= {int(tag[1:]): value for tag, value in tags.items()}
    entries = sorted({**numbers, 273: 8 + 2 + 12 * (len(numbers) + 1) + 4}.items())
    header = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    for tag, value in entries:
        header += tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little")
        header += value.to_bytes(4, "little")
    path.write_bytes(header + bytes(4) + pixels)
    return path


def test_tiff_files_are_read_by_their_bits_sign_and_meaning_of_zero(tmp_path: Path) -> None:
    half = np.full(16, 16384, "<i2").tobytes()
    assert level(tiff(tmp_path / "signed.tif", half, t339=2)) == [0.5] * 3
    assert level(tiff(tmp_path / "unsigned.tif", half)) == [0.25] * 3
    assert level(tiff(tmp_path / "white_is_zero.tif", half, t262=0)) == [0.75] * 3
    unsigned = np.full(16, 3_000_000_000, "<u4").tobytes()  # which Pillow reads as a negative number
    with pytest.raises(UserError, match="holds integers from 3000000000 to 3000000000"):
        read_image(tiff(tmp_path / "unsigned.tif", unsigned, t258=32, t339=1))
    twelve = bytes([0x80, 0x08, 0x00]) * 8  # pairs of 0x800
    assert level(tiff(tmp_path / "twelve.tif", twelve, t258=12)) == [0.5001] * 3


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, [1, 1, 1]),
        ("1", 0, [0, 0, 0]),
        ("L", 51, [0.2, 0.2, 0.2]),
        ("LA", (0, 51), [0.8, 0.8, 0.8]),
        ("RGBA", (255, 0, 0, 51), [1, 0.8, 0.8]),
        ("CMYK", (0, 255, 255, 0), [1, 0, 0]),
    ],
)
def test_every_mode_becomes_the_colour_that_it_shows(
    tmp_path: Path, mode: str, colour: Any, expected: list[float]
) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    Image.new(mode, (4, 4), colour).save(path)
    assert level(path) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path: Path, suffix: str) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([10, 20, 30, 255, 0, 0, 0, 255, 0])
    picture.putpixel((0, 0), 2)
    picture.save(tmp_path / f"palette{suffix}", transparency=2)
    pixels = read_image(tmp_path / f"palette{suffix}")
    assert pixels[:, 0, 0].tolist() == [1, 1, 1]
    assert pixels[:, 1, 1].tolist() == [1, 0, 0]


def test_colours_and_opacity_of_sixteen_bits_are_right_to_eight(tmp_path: Path) -> None:
    import cv2

    half = np.full((4, 4), 32768, np.uint16)
    for name, channels in (("rgb", [half, half // 2, half]), ("rgba", [half, half // 2, half, half * 0 + 65535])):
        for suffix in (".png", ".tif"):
            cv2.imwrite(str(tmp_path / f"{name}{suffix}"), np.stack(channels, axis=-1))
            assert level(tmp_path / f"{name}{suffix}") == pytest.approx([0.5, 0.25, 0.5], abs=1 / 255)


def test_a_picture_that_is_too_large_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (read_image, load_frames):
        with pytest.raises(UserError, match=r"bomb\.png is too large") as caught:
            read(tmp_path / "bomb.png")
        assert "\n" not in str(caught.value)

"""Images and videos that an Open-Sora generation starts from, whatever they are given as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vidaccel.errors import UserError
from vidaccel.open_sora.references import fill_and_crop, for_each_video, read_image, read_video

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@pytest.mark.parametrize(
    "video",
    [
        [Image.fromarray(frame) for frame in PIXELS],
        PIXELS,
        PIXELS.astype(np.float32) / 255,
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255,
    ],
    ids=["pictures", "bytes", "floats", "byte tensor", "tensor"],
)
def test_a_video_and_an_image_are_the_same_numbers_in_every_form(video: Any) -> None:
    torch.testing.assert_close(read_video(video), EXPECTED)
    torch.testing.assert_close(read_image(video[0]), EXPECTED[:, :, :1])
    two = read_image([video[0], video[1]])
    torch.testing.assert_close(two, EXPECTED[:, :, :2].transpose(0, 2))


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.fromarray(np.full((4, 4), 32768, np.uint16)), [0.0, 0.0, 0.0]),
        (Image.new("L", (4, 4), 255), [1, 1, 1]),
        (Image.new("1", (4, 4), 1), [1, 1, 1]),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), [1, 1, 1]),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), [1, -1, -1]),
    ],
    ids=["16 bits", "grey", "1 bit", "transparent", "CMYK"],
)
def test_pictures_of_every_mode_become_the_colour_that_they_show(picture: Image.Image, expected: list[float]) -> None:
    pixels = read_image(picture)
    assert pixels.shape == (1, 3, 1, 4, 4)
    assert pixels[0, :, 0, 0, 0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(np.full((4, 4), 300, np.int32)),
        Image.fromarray(np.full((4, 4), 128.0, np.float32)),
        np.zeros((4, 4, 3), np.int32),
        torch.zeros(3, 4, 4, dtype=torch.int16),
    ],
    ids=["integers", "floats", "array", "tensor"],
)
def test_numbers_that_do_not_say_what_is_white_are_refused(picture: Any) -> None:
    with pytest.raises(UserError, match="8"):
        read_image(picture)


def test_a_picture_covers_the_size_and_its_middle_is_kept() -> None:
    frames = torch.zeros(1, 3, 2, 8, 24)
    frames[..., 8:16] = 1
    assert torch.equal(fill_and_crop(frames, height=8, width=8), torch.ones(1, 3, 2, 8, 8))
    assert fill_and_crop(frames, height=12, width=20).shape == (1, 3, 2, 12, 20)


def test_one_reference_serves_all_videos_and_two_are_dealt_out_in_order() -> None:
    assert len(for_each_video(torch.zeros(1, 3, 1, 2, 2), 4)) == 1
    dealt = for_each_video(torch.arange(2.0).view(2, 1, 1, 1, 1), 4)
    assert dealt.flatten().tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="got 2 for 3 videos"):
        for_each_video(dealt[:2], 3)

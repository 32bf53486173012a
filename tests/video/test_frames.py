"""Frames as tensors: two videos side by side."""

from __future__ import annotations

import torch

from tests.support.clips import moving_blocks
from vidaccel.video.frames import side_by_side


def test_side_by_side_keeps_both_pictures_and_writes_the_labels_above_them() -> None:
    left, right = moving_blocks(2), 1 - moving_blocks(2)
    pair = side_by_side(left, right, ("plain", "EasyCache, 18 of 50"))
    assert pair.shape == (2, 3, 32 + 24, 48 + 4 + 48)
    torch.testing.assert_close(pair[..., 24:, :48], left, atol=1 / 255, rtol=0)
    torch.testing.assert_close(pair[..., 24:, 52:], right, atol=1 / 255, rtol=0)
    assert pair[..., :24, :48].std() > 0.05
    assert not torch.equal(pair[..., :24, :48], pair[..., :24, 52:])
    assert side_by_side(left, right).shape == (2, 3, 32, 100)

"""Metrics against slow obvious twins, and against the cases whose answer everybody knows."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vidaccel.video import metrics, vmaf
from vidaccel.video.metrics import VideoComparison, compare_videos
from vidaccel.video.vmaf import MetricUnavailable


def waves(num_frames: int = 3, height: int = 24, width: int = 20) -> Tensor:
    """Smooth coloured waves that move, (F, 3, H, W) in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 7, width), indexing="ij")
    phase = 0.4 * torch.arange(num_frames)[:, None, None, None] + torch.arange(3)[None, :, None, None]
    return 0.5 + 0.4 * torch.sin(x + 0.7 * y + phase)


def noisy(frames: Tensor, strength: float = 0.05) -> Tensor:
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(1))
    return (frames + strength * noise).clamp(0, 1)


def slow_psnr(a: Tensor, b: Tensor) -> float:
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    return -10 * math.log10(math.fsum((one - other) ** 2 for one, other in pairs) / a.numel())


def slow_ssim_maps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and contrast-structure of every whole 11x11 window of two planes, by loops (Wang et al. 2004, eq. 13)."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    rows, columns = a.shape[0] - 10, a.shape[1] - 10
    similarity, contrast = np.empty((rows, columns)), np.empty((rows, columns))
    for row in range(rows):
        for column in range(columns):
            one, other = a[row : row + 11, column : column + 11], b[row : row + 11, column : column + 11]
            mean_1, mean_2 = (window * one).sum(), (window * other).sum()
            variance_1, variance_2 = (window * (one - mean_1) ** 2).sum(), (window * (other - mean_2) ** 2).sum()
            covariance = (window * (one - mean_1) * (other - mean_2)).sum()
            contrast[row, column] = (2 * covariance + 0.03**2) / (variance_1 + variance_2 + 0.03**2)
            luminance = (2 * mean_1 * mean_2 + 0.01**2) / (mean_1**2 + mean_2**2 + 0.01**2)
            similarity[row, column] = luminance * contrast[row, column]
    return similarity, contrast


def product_of_scales(a: Tensor, b: Tensor, betas: np.ndarray) -> float:
    """Wang, Simoncelli and Bovik 2003, equation 7, of a video of one frame."""
    factors = np.empty((3, len(betas)))
    for plane in range(3):
        one, other = a[0, plane].double().numpy(), b[0, plane].double().numpy()
        for scale in range(len(betas) - 1):
            factors[plane, scale] = slow_ssim_maps(one, other)[1].mean()
            one, other = halved(one), halved(other)
        factors[plane, -1] = slow_ssim_maps(one, other)[0].mean()
    return float(np.prod(factors.mean(axis=0) ** betas))


def halved(plane: np.ndarray) -> np.ndarray:
    rows, columns = plane.shape[0] // 2, plane.shape[1] // 2
    return plane[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2).mean((1, 3))


def test_white_against_black_is_zero_decibels() -> None:
    white = torch.ones(2, 3, 8, 8)
    assert metrics.psnr(white, 1 - white) == 0.0
    assert metrics.psnr((255 * white).byte(), (0 * white).byte()) == 0.0


def test_identical_videos_are_infinite_in_psnr_and_one_in_ssim() -> None:
    frames = waves(2, 100, 100)
    result = compare_videos(frames, frames.clone(), metrics=("psnr", "ssim", "ms_ssim", "temporal_difference_error"))
    assert result.psnr == result.psnr_mean == math.inf
    assert result.num_identical_frames == 2
    assert result.ssim == pytest.approx(1.0, abs=1e-12)
    assert result.ms_ssim == pytest.approx(1.0, abs=1e-12)
    assert result.temporal_difference_error == 0.0


def test_psnr_equals_the_sum_over_all_pixels_written_out() -> None:
    a = waves()
    b = noisy(a)
    assert metrics.psnr(a, b) == pytest.approx(slow_psnr(a, b), abs=1e-9)
    assert metrics.psnr_per_frame(a, b) == pytest.approx([slow_psnr(x, y) for x, y in zip(a, b, strict=True)], abs=1e-9)


def test_pooled_psnr_and_mean_of_frames_differ_for_a_growing_error_as_they_should() -> None:
    reference = torch.zeros(81, 3, 4, 4, dtype=torch.float64)
    errors = torch.linspace(1, 400, 81, dtype=torch.float64).sqrt() / 255
    result = compare_videos(reference, reference + errors[:, None, None, None], metrics=("psnr",))
    assert result.psnr is not None
    assert result.psnr_mean is not None
    assert result.psnr == pytest.approx(25.1, abs=0.05)
    assert result.psnr_mean == pytest.approx(26.5, abs=0.05)


def test_an_identical_first_frame_is_counted_and_does_not_make_the_mean_infinite() -> None:
    a = waves()
    b = noisy(a)
    b[0] = a[0]
    result = compare_videos(a, b, metrics=("psnr",))
    assert result.num_identical_frames == 1
    assert result.psnr_per_frame[0] == math.inf
    assert result.psnr_mean == pytest.approx(sum(result.psnr_per_frame[1:]) / 2)


def test_uint8_frames_do_not_wrap_and_equal_their_floats() -> None:
    a, b = (255 * waves()).byte(), (255 * noisy(waves(), 0.4)).byte()
    for metric in (metrics.psnr, metrics.ssim, metrics.temporal_difference_error):
        assert metric(a, b) == pytest.approx(metric(a.double() / 255, b.double() / 255), abs=1e-12)
    assert metrics.psnr(a, b) < 15


def test_ssim_equals_the_windows_written_out() -> None:
    a = waves(2, 14, 17)
    b = noisy(a, 0.1)
    maps = [slow_ssim_maps(x.double().numpy(), y.double().numpy())[0] for x, y in zip(a[:, 0], b[:, 0], strict=True)]
    same_channels = [frames[:, :1].repeat(1, 3, 1, 1) for frames in (a, b)]
    assert metrics.ssim(*same_channels) == pytest.approx(float(np.mean(maps)), abs=1e-9)


@pytest.mark.parametrize("strength", [0.01, 0.3])
def test_ssim_and_ms_ssim_agree_with_torchmetrics(strength: float) -> None:
    from torchmetrics.functional import image

    a = waves(2, 180, 178).double()
    b = noisy(a, strength)
    _, maps = image.structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    assert metrics.ssim(a, b) == pytest.approx(float(maps[..., 5:-5, 5:-5].mean()), abs=1e-12)
    # torchmetrics reflects the borders of the coarsest scale, which here is only 11 pixels wide.
    theirs = image.multiscale_structural_similarity_index_measure(a, b, data_range=1.0)
    assert metrics.ms_ssim(a, b) == pytest.approx(float(theirs), abs=2e-3)


def test_ms_ssim_of_four_scales_is_the_weighted_product_with_exponents_of_sum_one() -> None:
    a = waves(1, 101, 99)
    b = noisy(a, 0.2)
    betas = np.array(metrics.MS_SSIM_BETAS[:4]) / sum(metrics.MS_SSIM_BETAS[:4])
    assert metrics.ms_ssim(a, b) == pytest.approx(product_of_scales(a, b, betas), abs=1e-9)


def test_ms_ssim_uses_the_standard_five_scales_from_176_pixels_on_and_says_so() -> None:
    assert metrics.ms_ssim_scales(176, 300) == 5
    assert metrics.ms_ssim_scales(175, 300) == 4
    assert metrics.ms_ssim_scales(88, 88) == 4
    frames = waves(1, 176, 176)
    result = compare_videos(frames, noisy(frames), metrics=("ms_ssim",))
    assert result.ms_ssim_scales == 5
    twin = product_of_scales(frames, noisy(frames), np.array(metrics.MS_SSIM_BETAS))
    assert result.ms_ssim == pytest.approx(twin, abs=1e-9)


def test_ms_ssim_of_small_frames_is_not_available_and_says_why() -> None:
    result = compare_videos(waves(), noisy(waves()), metrics=("ms_ssim", "ssim"))
    assert result.ms_ssim is None
    assert result.ms_ssim_scales is None
    assert "88x88" in result.unavailable["ms_ssim"]
    assert result.ssim is not None


def test_temporal_difference_error_equals_its_loop_and_ignores_a_constant_offset() -> None:
    a = waves(4)
    b = noisy(a)
    steps = [((b[t + 1] - b[t]) - (a[t + 1] - a[t])).double().abs().mean() for t in range(3)]
    assert metrics.temporal_difference_error(a, b) == pytest.approx(float(sum(steps) / 3), rel=1e-6)
    assert metrics.temporal_difference_error(a, a * 1.0 + 0.1) < 1e-7
    assert metrics.temporal_difference_error(a, a.flip(0)) > 0.1


def test_long_videos_are_taken_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a, names = waves(5, 100, 100), ("psnr", "ssim", "ms_ssim", "temporal_difference_error")
    whole = compare_videos(a, noisy(a), metrics=names)
    monkeypatch.setattr(metrics, "_CHUNK_VALUES", 2 * a[0].numel())
    parts = compare_videos(a, noisy(a), metrics=names)
    for name in names:
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_temporal_difference_of_one_frame_is_not_available() -> None:
    with pytest.raises(MetricUnavailable, match="two frames"):
        metrics.temporal_difference_error(waves(1), waves(1))


def test_vmaf_falls_as_noise_grows_and_is_highest_for_identical_videos() -> None:
    frames = waves(3, 64, 96)
    scores = [metrics.vmaf(frames, noisy(frames, strength)) for strength in (0.0, 0.1, 0.3)]
    assert scores[0] > 95
    assert scores[0] > scores[1] + 1 > scores[2] + 2


def test_vmaf_takes_the_reference_first_so_that_blur_costs_and_sharpness_does_not() -> None:
    sharp = noisy(waves(3, 64, 96), 0.1)
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1, count_include_pad=False)
    assert metrics.vmaf(sharp, blurred) < metrics.vmaf(blurred, sharp) - 5


def test_vmaf_without_ffmpeg_libvmaf_or_large_enough_frames_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = waves(2, 40, 40)
    with pytest.raises(MetricUnavailable, match="32x32"):
        metrics.vmaf(frames[..., :16], frames[..., :16])
    with pytest.raises(MetricUnavailable, match="ffmpeg could not compute it"):
        metrics.vmaf(frames, frames, model="no_such_model")

    def missing() -> str:
        raise MetricUnavailable("VMAF needs ffmpeg")

    monkeypatch.setattr(vmaf, "_ffmpeg_program", missing)
    result = compare_videos(frames, frames, metrics=("vmaf", "psnr"))
    assert result.vmaf is None
    assert result.unavailable == {"vmaf": "VMAF needs ffmpeg"}
    assert result.psnr == math.inf


def test_an_ffmpeg_that_is_not_there_makes_vmaf_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    def nothing_found() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", nothing_found)
    with pytest.raises(MetricUnavailable, match="found none"):
        metrics.vmaf(waves(2, 40, 40), waves(2, 40, 40))


def test_lpips_without_its_backbone_is_not_available_and_nothing_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(MetricUnavailable, match="never downloaded"):
        metrics.lpips(waves(), waves())
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_lpips_with_weights_but_without_torchvision_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    weights = tmp_path / "hub" / "checkpoints" / metrics.LPIPS_BACKBONE
    weights.parent.mkdir(parents=True)
    weights.touch()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MetricUnavailable, match=r"vidaccel\[metrics\]"):
        metrics.lpips(waves(), waves())


@pytest.mark.parametrize(
    ("reference", "video", "message"),
    [
        (torch.rand(3, 3, 8, 8), torch.rand(2, 3, 8, 8), "3 frames of 8x8"),
        (torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 10), "2 of 10x8"),
        (torch.rand(3, 8, 8), torch.rand(3, 8, 8), "shape"),
        (torch.rand(2, 3, 8, 8) + 1, torch.rand(2, 3, 8, 8), r"\[0, 1\]"),
        (torch.full((2, 3, 8, 8), torch.nan), torch.rand(2, 3, 8, 8), r"\[0, 1\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), torch.rand(2, 3, 8, 8), "int64"),
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8), "shape"),
    ],
)
def test_frames_that_cannot_be_compared_are_refused_in_one_line(reference: Tensor, video: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compare_videos(reference, video)
    assert "\n" not in str(caught.value)


def test_unknown_metric_names_are_refused() -> None:
    with pytest.raises(ValueError, match="vbench"):
        compare_videos(waves(), waves(), metrics=("psnr", "vbench"))


def test_the_dictionary_of_a_comparison_is_strict_json_and_reads_back() -> None:
    frames = waves()
    result = compare_videos(frames, frames, metrics=("psnr", "ssim"))
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read["psnr"] == "inf"
    assert float(read["psnr"]) == math.inf
    assert read["psnr_per_frame"] == ["inf"] * 3
    assert read["ssim"] == pytest.approx(1.0)
    assert set(read) == set(VideoComparison.__dataclass_fields__)

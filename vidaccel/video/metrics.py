"""Fidelity of one video to another: PSNR, SSIM, MS-SSIM, temporal-difference error, VMAF and LPIPS.

All metrics take raw frames of shape (F, 3, H, W), floating in [0, 1] or uint8, never an encoded file: at 47.5 dB two
MP4s of the frames read 5 to 8 dB lower than the frames. Arithmetic is float64, because uint8 differences wrap.
These measure closeness to a twin, not how good a video looks.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vidaccel.errors import UserError
from vidaccel.files.text import json_number
from vidaccel.video.vmaf import MetricUnavailable, vmaf_of_bytes

METRICS = ("psnr", "ssim", "ms_ssim", "temporal_difference_error", "vmaf", "lpips")
SSIM_WINDOW = 11  # Gaussian of sigma 1.5, cut to 11 pixels (Wang et al. 2004)
# Exponents of the five scales, Wang, Simoncelli and Bovik 2003, "Multiscale structural similarity", section 3.2.
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"
LPIPS_SMALLEST = 64  # AlexNet halves the frame five times
_CHUNK_VALUES = 2**23  # values of one video converted to float64 at a time, about 64 MB


@dataclass(frozen=True, kw_only=True)
class VideoComparison:
    """How close a video is to its reference; a metric that could not be taken is None and named in `unavailable`.

    psnr: dB over all pixels of all frames together (pooled); infinite for identical videos.
    psnr_mean: mean of the per-frame PSNR over frames that differ (identical ones are counted, not averaged).
    ms_ssim_scales: 5 is the standard form; 4 is used for frames under 176 pixels and is no figure to set beside it.
    temporal_difference_error: mean |change of the video - change of the reference| between frames, in [0, 2].
    """

    num_frames: int
    height: int
    width: int
    psnr: float | None = None
    psnr_mean: float | None = None
    psnr_per_frame: tuple[float, ...] = ()
    num_identical_frames: int = 0
    ssim: float | None = None
    ms_ssim: float | None = None
    ms_ssim_scales: int | None = None
    temporal_difference_error: float | None = None
    vmaf: float | None = None
    lpips: float | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that strict JSON can hold: an infinite PSNR becomes the string "inf"."""
        values = asdict(self)
        values["psnr_per_frame"] = [json_number(value) for value in self.psnr_per_frame]
        return {name: json_number(value) if isinstance(value, float) else value for name, value in values.items()}


def compare_videos(
    reference: Tensor, video: Tensor, *, fps: float = 16.0, metrics: tuple[str, ...] = METRICS
) -> VideoComparison:
    """Take `metrics` of `video` against `reference`, both (F, 3, H, W) in [0, 1].

    A metric this machine or these frames do not allow is left None with its reason in `unavailable`.
    Raises ValueError for unequal shapes, values outside [0, 1] and unknown metric names.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise UserError(f"`metrics` may name {', '.join(METRICS)}; got {', '.join(unknown)}.")
    _check_pair(reference, video)
    values: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    if "psnr" in metrics:
        values |= _psnr_values(reference, video)
    takers: dict[str, Callable[[], float]] = {
        "ssim": lambda: ssim(reference, video),
        "ms_ssim": lambda: ms_ssim(reference, video),
        "temporal_difference_error": lambda: temporal_difference_error(reference, video),
        "vmaf": lambda: vmaf(reference, video, fps=fps),
        "lpips": lambda: lpips(reference, video),
    }
    for name in (name for name in takers if name in metrics):
        try:
            values[name] = takers[name]()
        except MetricUnavailable as reason:
            unavailable[name] = str(reason)
    if "ms_ssim" in values:
        values["ms_ssim_scales"] = ms_ssim_scales(*video.shape[-2:])
    num_frames, _, height, width = video.shape
    return VideoComparison(num_frames=num_frames, height=height, width=width, unavailable=unavailable, **values)


def psnr(reference: Tensor, video: Tensor) -> float:
    """Pooled PSNR in dB: the squared error is averaged over all pixels of all frames, then put on the log scale."""
    return _decibels(float(_squared_error_per_frame(reference, video).mean()))


def psnr_per_frame(reference: Tensor, video: Tensor) -> tuple[float, ...]:
    """PSNR of each frame in dB; infinite where the two frames are identical."""
    return tuple(_decibels(error) for error in _squared_error_per_frame(reference, video).tolist())


def ssim(reference: Tensor, video: Tensor) -> float:
    """Mean structural similarity: 11x11 Gaussian window of sigma 1.5, whole windows only, per RGB channel.

    Wang et al. 2004, equation 13; the tests hold it equal to torchmetrics, which takes 15 times as long in float64.
    Raises MetricUnavailable for frames smaller than a window.
    """
    _check_pair(reference, video)
    if min(video.shape[-2:]) < SSIM_WINDOW:
        raise MetricUnavailable(f"SSIM needs frames of at least 11x11 pixels, got {_size_text(video)}.")
    total = sum(float(_similarity(one, other)[0].sum()) for one, other in _chunks(reference, video))
    return total / video.shape[0]


def ms_ssim(reference: Tensor, video: Tensor) -> float:
    """Mean multi-scale SSIM over frames: Wang, Simoncelli and Bovik 2003, equation 7, on `ms_ssim_scales` scales.

    Whole windows on every scale; a negative factor counts as 0. Raises MetricUnavailable for small frames.
    """
    _check_pair(reference, video)
    betas = MS_SSIM_BETAS[: ms_ssim_scales(*video.shape[-2:])]
    if len(betas) < len(MS_SSIM_BETAS):
        betas = tuple(beta / sum(betas) for beta in betas)
    total = 0.0
    for one, other in _chunks(reference, video):
        score = torch.ones(one.shape[0], dtype=one.dtype, device=one.device)
        for beta in betas[:-1]:
            score *= _similarity(one, other)[1].clamp(min=0) ** beta
            one, other = avg_pool2d(one, 2), avg_pool2d(other, 2)
        score *= _similarity(one, other)[0].clamp(min=0) ** betas[-1]
        total += float(score.sum())
    return total / video.shape[0]


def ms_ssim_scales(height: int, width: int) -> int:
    """Scales `ms_ssim` uses: all 5 from 176 pixels on, the 4 finest (exponents scaled to sum 1) from 88 on.

    Raises MetricUnavailable below: no whole 11x11 window is left on the coarsest scale.
    """
    for scales in (len(MS_SSIM_BETAS), len(MS_SSIM_BETAS) - 1):
        if min(height, width) >> (scales - 1) >= SSIM_WINDOW:
            return scales
    raise MetricUnavailable(f"MS-SSIM needs frames of at least 88x88 pixels, got {width}x{height}.")


def temporal_difference_error(reference: Tensor, video: Tensor) -> float:
    """Mean |(y[t+1] - y[t]) - (x[t+1] - x[t])|: flicker and wrong motion, blind to a constant error; in [0, 2].

    Raises MetricUnavailable for a single frame.
    """
    _check_pair(reference, video)
    if video.shape[0] < 2:
        raise MetricUnavailable("The temporal-difference error needs at least two frames, got one.")
    total = 0.0
    for start in range(0, video.shape[0] - 1, step := _frames_per_chunk(video)):
        part = slice(start, start + step + 1)
        error = _as_double(video[part]) - _as_double(reference[part])
        total += float(error.diff(dim=0).abs().sum())
    return total / (video[1:].numel())


def vmaf(reference: Tensor, video: Tensor, *, fps: float = 16.0, model: str = "vmaf_v0.6.1") -> float:
    """VMAF of `video` against `reference`, 0 to 100, by the ffmpeg that imageio-ffmpeg brings, on raw 4:4:4 frames.

    The model was trained on 1080p television; on small frames only compare figures of one size.
    Raises MetricUnavailable where there is no ffmpeg, it has no libvmaf, or it refuses the frames.
    """
    _check_pair(reference, video)
    height, width = video.shape[-2:]
    raw = [_as_bytes(frames) for frames in (reference, video)]
    return vmaf_of_bytes(raw[0], raw[1], size=(width, height), fps=fps, model=model)


def lpips(reference: Tensor, video: Tensor) -> float:
    """Mean LPIPS over frames (Zhang et al. 2018, AlexNet, not spatial) by torchmetrics; lower is closer.

    The backbone is read from the torch hub cache and never downloaded: raises MetricUnavailable where it is absent.
    """
    _check_pair(reference, video)
    _check_lpips_parts()
    if min(video.shape[-2:]) < LPIPS_SMALLEST:
        raise MetricUnavailable(f"LPIPS needs frames of at least 64x64 pixels, got {_size_text(video)}.")
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    total = 0.0
    for one, other in _chunks(reference, video):
        score = learned_perceptual_image_patch_similarity(one, other, net_type="alex", reduction="sum", normalize=True)
        total += float(score)
    return total / video.shape[0]


def _psnr_values(reference: Tensor, video: Tensor) -> dict[str, Any]:
    errors = _squared_error_per_frame(reference, video)
    per_frame = tuple(_decibels(error) for error in errors.tolist())
    differing = [value for value in per_frame if math.isfinite(value)]
    return {
        "psnr": _decibels(float(errors.mean())),
        "psnr_mean": sum(differing) / len(differing) if differing else math.inf,
        "psnr_per_frame": per_frame,
        "num_identical_frames": len(per_frame) - len(differing),
    }


def _squared_error_per_frame(reference: Tensor, video: Tensor) -> Tensor:
    """Mean squared error of each frame, (F,) float64."""
    _check_pair(reference, video)
    return torch.cat([(one - other).square().mean(dim=(1, 2, 3)) for one, other in _chunks(reference, video)])


def _decibels(squared_error: float) -> float:
    return math.inf if squared_error == 0 else 10 * math.log10(1 / squared_error)


def _similarity(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure part of each frame, (F,), means over channels and whole windows."""
    mean_1, mean_2, square_1, square_2, product = (
        _blurred(planes) for planes in (one, other, one * one, other * other, one * other)
    )
    variances = (square_1 - mean_1**2).clamp(min=0) + (square_2 - mean_2**2).clamp(min=0)
    contrast = (2 * (product - mean_1 * mean_2) + 0.03**2) / (variances + 0.03**2)
    luminance = (2 * mean_1 * mean_2 + 0.01**2) / (mean_1**2 + mean_2**2 + 0.01**2)
    return (luminance * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def _blurred(planes: Tensor) -> Tensor:
    """Gaussian mean of every whole window, (..., H - 10, W - 10): one banded matrix from each side."""
    rows, columns = (_band(size, planes) for size in planes.shape[-2:])
    return rows @ planes @ columns.T


def _band(size: int, like: Tensor) -> Tensor:
    offsets = torch.arange(size, dtype=like.dtype, device=like.device)
    starts = torch.arange(size - SSIM_WINDOW + 1, dtype=like.dtype, device=like.device)
    distance = offsets[None, :] - starts[:, None] - SSIM_WINDOW // 2
    weights = torch.exp(-(distance**2) / (2 * 1.5**2)) * (distance.abs() <= SSIM_WINDOW // 2)
    return weights / weights.sum(dim=1, keepdim=True)


def _check_pair(reference: Tensor, video: Tensor) -> None:
    for name, frames in (("reference", reference), ("video", video)):
        if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
            raise ValueError(f"`{name}` must be frames of shape (F, 3, H, W), got {tuple(frames.shape)}.")
        if frames.dtype == torch.uint8:
            continue
        if not frames.is_floating_point():
            raise ValueError(f"`{name}` must be uint8 or floating in [0, 1], got {frames.dtype}.")
        low, high = (float(bound) for bound in frames.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"`{name}` must lie in [0, 1], got values from {low:.4g} to {high:.4g}.")
    if reference.shape != video.shape:
        raise UserError(
            f"Videos must agree in frames and size: the reference has {reference.shape[0]} frames of "
            f"{_size_text(reference)}, the video {video.shape[0]} of {_size_text(video)}."
        )


def _size_text(frames: Tensor) -> str:
    return f"{frames.shape[-1]}x{frames.shape[-2]}"


def _frames_per_chunk(frames: Tensor) -> int:
    return max(1, _CHUNK_VALUES // frames[0].numel())


def _chunks(reference: Tensor, video: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = _frames_per_chunk(video)
    for start in range(0, video.shape[0], step):
        yield _as_double(reference[start : start + step]), _as_double(video[start : start + step])


def _as_double(frames: Tensor) -> Tensor:
    return frames.double() / 255 if frames.dtype == torch.uint8 else frames.double()


def _as_bytes(frames: Tensor) -> bytes:
    """Frames as packed RGB bytes, the order (F, H, W, 3)."""
    if frames.dtype != torch.uint8:
        frames = (frames.double() * 255).round().to(torch.uint8)
    return frames.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes()


def _check_lpips_parts() -> None:
    weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
    if not weights.is_file():
        raise MetricUnavailable(
            f"LPIPS needs the AlexNet weights {LPIPS_BACKBONE} in the torch hub cache; they are never downloaded. "
            "Put the file into the `checkpoints` folder of `torch.hub.get_dir()`."
        )
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another PyTorch
        raise MetricUnavailable(
            'LPIPS needs a torchvision that fits this PyTorch; install it with `pip install "vidaccel[metrics]"`.'
        ) from error

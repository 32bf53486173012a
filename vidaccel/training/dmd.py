"""Distribution matching distillation as formulas: noise levels, gradient, losses; pure functions of tensors.

DMD (Yin et al., arXiv 2311.18828, equations 4 to 8; DMD2, arXiv 2405.14867) in the form of Self-Forcing (arXiv
2506.08009) and Context Forcing (arXiv 2602.06028, section 3): a frozen teacher and a critic that follows the student
estimate clean latents from the same noisy ones, and the student moves along the difference. Everything is float32 (or
float64, if the latents are) whatever the networks ran in.
Shapes: latents (B, C, F, h, w); sigmas (B,), 1 is noise; scored (B, F) bool, which frames count.
"""

import torch
from torch import Tensor

from vidaccel.training.architecture import FLOW_SHIFT

SCORE_TIMES = (0.02, 0.98)
_LEAST_DISTANCE = 1e-4  # of normalised latents; below it teacher and student agree, and there is nothing to divide by


def shifted_sigmas(times: Tensor, *, shift: float = FLOW_SHIFT, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Noise levels of times u in [0, 1], sigma = shift u / (1 + (shift - 1) u), kept within `bounds`.

    Equation 23 of arXiv 2403.03206. The official Context Forcing code draws u from all of [0, 1] and clamps sigma to
    [0.02, 0.98]; `draw_score_sigmas` draws u from [0.02, 0.98] instead, so that no level is drawn more often.
    """
    return (shift * times / (1 + (shift - 1) * times)).clamp(*bounds)


def draw_score_sigmas(
    count: int,
    generator: torch.Generator,
    *,
    times: tuple[float, float] = SCORE_TIMES,
    shift: float = FLOW_SHIFT,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Noise levels at which clean latents are judged, one a sample: u uniform in `times`, then shifted; (count,)."""
    low, high = times
    uniform = torch.rand(count, device=generator.device, generator=generator)
    return shifted_sigmas(low + (high - low) * uniform, shift=shift, bounds=bounds)


def clean_estimate(noisy: Tensor, velocity: Tensor, sigmas: Tensor) -> Tensor:
    """x0 = x_sigma - sigma v: exact for the velocity noise - data of x_sigma = (1 - sigma) data + sigma noise."""
    return _exact(noisy) - sigmas.view(-1, 1, 1, 1, 1) * _exact(velocity)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """The teacher's estimate with guidance as DMD counts it, cond + scale (cond - uncond); scale 0 is none."""
    return conditional + scale * (conditional - unconditional)


def matching_gradient(latents: Tensor, *, real: Tensor, fake: Tensor, scored: Tensor | None = None) -> Tensor:
    """g = (fake - real) / mean |x - real|, the mean over each sample: equations 7 and 8 of DMD with its weight.

    real, fake: the clean estimates of teacher and critic. Of a sample with `scored`, the mean is over those frames.
    Where an estimate is not finite, and where the student is what the teacher wants, the gradient is 0 or bounded.
    """
    latents, real, fake = _exact(latents), _exact(real), _exact(fake)
    distance = (latents - real).abs()
    if scored is None:
        mean = distance.mean(dim=(1, 2, 3, 4))
    else:
        weight = scored[:, None, :, None, None].to(distance.dtype)
        cells = distance[0].numel() / distance.shape[2] * scored.sum(1).clamp(min=1)
        mean = (distance * weight).sum(dim=(1, 2, 3, 4)) / cells
    gradient = (fake - real) / mean.clamp(min=_LEAST_DISTANCE).view(-1, 1, 1, 1, 1)
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def matching_loss(
    latents: Tensor, gradient: Tensor, *, scored: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """L = 0.5 mean (x - stopgrad(x - g))^2, whose gradient in x is g / (number of elements).

    With `scored` the mean is over those frames only, and the others have no gradient. weight: of the cells, broadcast
    over the latents, with mean 1.
    """
    latents = _exact(latents)
    target = (latents - gradient).detach()
    return 0.5 * _mean(_weighted((latents - target).square(), weight), scored)


def flow_loss(
    velocity: Tensor, *, noise: Tensor, clean: Tensor, scored: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Flow matching, mean (v - (noise - data))^2, with the student's own latents as data: the loss of the critic.

    scored, weight: as in `matching_loss`.
    """
    return _mean(_weighted((_exact(velocity) - (_exact(noise) - _exact(clean))).square(), weight), scored)


def _mean(values: Tensor, scored: Tensor | None) -> Tensor:
    if scored is None:
        return values.mean()
    kept = scored[:, None, :, None, None].expand_as(values)
    return values[kept].mean() if bool(kept.any()) else values.sum() * 0


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()

"""Loss and score of the autoencoder.

Shapes: video and reconstruction are (B, 3, F, H, W) in [-1, 1]; weight is (B, 1, F, H, W).
"""

import torch
from torch import Tensor

GRADIENT_WEIGHT = 0.5
KL_WEIGHT = 1e-4


def reconstruction_loss(reconstruction: Tensor, video: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """L1 + L2 + 0.5 x L1 of the image gradients, weighted per pixel; also the plain squared error, for the records."""
    error = reconstruction - video
    squared = error.square()
    along_x = (error[..., 1:] - error[..., :-1]).abs() * weight[..., 1:]
    along_y = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
    loss = (error.abs() * weight).mean() + (squared * weight).mean()
    return loss + GRADIENT_WEIGHT * (along_x.mean() + along_y.mean()), squared.mean()


def sample_latents(moments: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents drawn from (B, 2C, ...) moments, and the divergence of their distribution from a standard normal one."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)  # the bounds of diffusers' DiagonalGaussianDistribution
    noise = torch.randn(mean.shape, device=mean.device, generator=generator)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return mean + torch.exp(0.5 * log_variance) * noise, divergence


def psnr_of(squared_error: Tensor) -> Tensor:
    """PSNR in dB of mean squared errors between videos in [-1, 1]."""
    return -10 * torch.log10(squared_error.clamp(min=1e-12) / 4)

"""Distribution matching as formulas: noise levels, clean estimates, the gradient and the two losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidaccel.training.dmd import (
    clean_estimate,
    draw_score_sigmas,
    flow_loss,
    guided,
    matching_gradient,
    matching_loss,
    shifted_sigmas,
)

SHAPE = (2, 3, 4, 2, 2)


def latents(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_warped_steps_of_the_official_code_follow_from_shift_5():
    sigmas = shifted_sigmas(torch.tensor([1.0, 0.75, 0.5, 0.25]), shift=5.0)
    torch.testing.assert_close(1000 * sigmas, torch.tensor([1000.0, 937.5, 833.3333, 625.0]), atol=1e-3, rtol=0)
    assert float(shifted_sigmas(torch.tensor([0.001]), shift=5.0)) == pytest.approx(0.0049801, abs=1e-6)


def test_noise_levels_are_uniform_times_shifted_and_stay_within_their_bounds():
    drawn = draw_score_sigmas(20_000, torch.Generator().manual_seed(1))
    low, high = shifted_sigmas(torch.tensor([0.02, 0.98]))
    assert drawn.min() >= low
    assert drawn.max() <= high
    times = drawn / (3 - 2 * drawn)  # the shift undone
    counts = torch.histc(times, bins=8, min=0.02, max=0.98)
    assert (counts - 2500).abs().max() < 250
    clamped = draw_score_sigmas(1000, torch.Generator().manual_seed(1), times=(0, 1), shift=1.0, bounds=(0.2, 0.6))
    assert clamped.min() == pytest.approx(0.2)
    assert clamped.max() == pytest.approx(0.6)


def test_clean_latents_come_back_exactly_from_their_velocity_at_every_step():
    clean, noise = latents(0), latents(1)
    for sigma in (1.0, 0.9375, 0.8333, 0.625, 0.02):
        sigmas = torch.full((len(clean),), sigma)
        noisy = (1 - sigma) * clean + sigma * noise
        torch.testing.assert_close(clean_estimate(noisy, noise - clean, sigmas), clean, atol=1e-6, rtol=1e-5)


def test_estimates_of_half_precision_networks_are_not_rounded_again():
    noisy, velocity = latents(0).bfloat16(), latents(1).bfloat16()
    estimate = clean_estimate(noisy, velocity, torch.tensor([0.3, 0.7]))
    assert estimate.dtype == torch.float32
    expected = noisy.float() - torch.tensor([0.3, 0.7]).view(-1, 1, 1, 1, 1) * velocity.float()
    assert torch.equal(estimate, expected)


def test_no_guidance_is_the_conditional_estimate_and_more_goes_away_from_the_unconditional_one():
    conditional, unconditional = latents(0), latents(1)
    assert torch.equal(guided(conditional, unconditional, 0.0), conditional)
    expected = 4 * conditional - 3 * unconditional
    torch.testing.assert_close(guided(conditional, unconditional, 3.0), expected)


def test_the_gradient_vanishes_where_critic_and_teacher_agree():
    estimate = latents(1)
    assert not matching_gradient(latents(0), real=estimate, fake=estimate).any()


def test_the_gradient_is_normalised_by_the_distance_of_each_sample_from_its_teacher():
    x, fake = latents(0), latents(1)
    distance = torch.tensor([0.5, 8.0]).view(-1, 1, 1, 1, 1)
    gradient = matching_gradient(x, real=x - distance, fake=fake)
    expected = (fake - (x - distance)).abs().mean((1, 2, 3, 4)) / distance.flatten()
    torch.testing.assert_close(gradient.abs().mean((1, 2, 3, 4)), expected)


def test_the_gradient_is_finite_where_student_and_teacher_are_equal_or_an_estimate_is_not_finite():
    x = latents(0)
    assert torch.isfinite(matching_gradient(x, real=x, fake=latents(1))).all()
    broken = latents(1)
    broken[0, 0, 0, 0, 0], broken[0, 1, 0, 0, 0] = float("nan"), float("inf")
    gradient = matching_gradient(x, real=latents(2), fake=broken)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0, 0, 0, 0] == gradient[0, 1, 0, 0, 0] == 0
    assert gradient[1].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_of_the_loss_is_the_matching_gradient_over_the_number_of_elements(dtype: torch.dtype):
    x = latents(0, dtype).requires_grad_()
    gradient = latents(1, dtype)
    loss = matching_loss(x, gradient)
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient / x.numel(), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-9)
    assert loss.item() == pytest.approx(0.5 * float(gradient.square().mean()), rel=1e-5)


def test_weighted_cells_count_in_proportion_in_both_losses():
    x, gradient, noise = (
        latents(0, torch.float64).requires_grad_(),
        latents(1, torch.float64),
        latents(2, torch.float64),
    )
    weight = torch.ones_like(x[:, :1]).detach()
    weight[..., 0] = 3
    weight /= weight.mean()
    matching_loss(x, gradient, weight=weight).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight * gradient / x.numel())
    clean = x.detach()
    expected = (weight * (gradient - (noise - clean)).square()).mean()
    torch.testing.assert_close(flow_loss(gradient, noise=noise, clean=clean, weight=weight), expected)


def test_frames_that_are_not_scored_have_no_gradient_and_no_say_in_it():
    scored = torch.tensor([[True, True, False, False], [False, False, False, True]])
    x, real, fake = latents(0, torch.float64), latents(1, torch.float64), latents(2, torch.float64)
    gradient = matching_gradient(x, real=real, fake=fake, scored=scored)
    for sample, frames in enumerate(scored):
        kept = [part[sample : sample + 1, :, frames] for part in (x, real, fake)]
        alone = matching_gradient(kept[0], real=kept[1], fake=kept[2])
        torch.testing.assert_close(gradient[sample : sample + 1, :, frames], alone)
    own = x.clone().requires_grad_()
    matching_loss(own, gradient, scored=scored).backward()
    counted = scored[:, None, :, None, None].expand_as(x)
    assert own.grad is not None
    assert not own.grad[~counted].any()
    torch.testing.assert_close(own.grad[counted], gradient[counted] / counted.sum())


def test_the_critic_learns_the_velocity_of_what_the_student_made_and_of_scored_frames_only():
    clean, noise, velocity = latents(0), latents(1), latents(2)
    assert float(flow_loss(noise - clean, noise=noise, clean=clean)) == 0
    scored = torch.tensor([[True, False, False, False]] * 2)
    loss = flow_loss(velocity, noise=noise, clean=clean, scored=scored)
    other = velocity.clone()
    other[:, :, 1:] += 100
    assert flow_loss(other, noise=noise, clean=clean, scored=scored) == loss
    expected = (velocity - (noise - clean)).square()[:, :, 0].mean()
    torch.testing.assert_close(loss, expected)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert float(flow_loss(velocity, noise=noise, clean=clean, scored=nothing)) == 0

"""The causal Wan transformer with gradients: remembered frames encoded alone, a chunk that sees them, a camera."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tiny_causal import CONFIG, causal_model, text, video
from vidaccel.memory.camera import Camera
from vidaccel.models.causal_wan import CausalWanTransformer3DModel

ATOL = 1e-5
REMEMBERED, CHUNK = 4, 3


def student(**changes: Any) -> CausalWanTransformer3DModel:
    """A random student whose memory entries do not depend on history, told of a camera."""
    torch.manual_seed(3)
    model = CausalWanTransformer3DModel(**CONFIG, camera_dim=8, clean_pass="frame", **changes).eval()
    for parameter in model.camera_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def camera(num_frames: int, *, seed: int = 0, batch_size: int = 1) -> Camera:
    draw = torch.Generator().manual_seed(seed)
    size = (batch_size, num_frames)
    return Camera(3 * torch.randn(size, generator=draw), torch.randn(size, generator=draw))


def part(whole: Camera, start: int, stop: int) -> Camera:
    return Camera(whole.columns[:, start:stop], whole.motions[:, start:stop])


def with_history(model: CausalWanTransformer3DModel, latents: torch.Tensor, path: Camera, time: float) -> torch.Tensor:
    prompt = model.cache_prompt(text(len(latents)))
    history = model.remember(
        latents[:, :, :REMEMBERED], prompt, positions=torch.arange(REMEMBERED), camera=part(path, 0, REMEMBERED)
    )
    positions = torch.arange(REMEMBERED, REMEMBERED + CHUNK)
    return model(
        latents[:, :, REMEMBERED:],
        torch.full((len(latents),), time),
        prompt,
        history=history,
        frame_positions=positions,
        camera=part(path, REMEMBERED, REMEMBERED + CHUNK),
    ).sample


@torch.no_grad()
def test_a_chunk_with_a_history_is_a_full_pass_in_which_remembered_frames_see_only_themselves():
    model, latents = student(), video(REMEMBERED + CHUNK, batch_size=2)
    path = camera(REMEMBERED + CHUNK, batch_size=2)
    seen = torch.eye(REMEMBERED + CHUNK, dtype=torch.bool)
    seen[REMEMBERED:] = True
    times = torch.tensor([0.0] * REMEMBERED + [600.0] * CHUNK).expand(2, -1)
    expected = model(latents, times, text(2), visibility=seen, camera=path).sample[:, :, REMEMBERED:]
    torch.testing.assert_close(with_history(model, latents, path, 600.0), expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_frames_that_the_mask_leaves_out_do_not_exist():
    model, latents, path = student(), video(REMEMBERED + CHUNK), camera(REMEMBERED + CHUNK)
    prompt = model.cache_prompt(text())
    chunk = (latents[:, :, REMEMBERED:], torch.tensor([300.0]), prompt)

    def velocity(frames: list[int], positions: list[int], mask: list[bool] | None) -> torch.Tensor:
        past = Camera(path.columns[:, frames], path.motions[:, frames])
        kept = None if mask is None else torch.tensor([mask])
        remembered = model.remember(
            latents[:, :, frames], prompt, positions=torch.tensor(positions), camera=past, mask=kept
        )
        own = part(path, REMEMBERED, REMEMBERED + CHUNK)
        return model(*chunk, history=remembered, frame_positions=torch.arange(2, 5), camera=own).sample

    short = velocity([0, 3], [0, 1], None)
    torch.testing.assert_close(
        velocity([0, 1, 2, 3], [0, 9, 9, 1], [True, False, False, True]), short, atol=ATOL, rtol=0
    )
    assert not torch.allclose(velocity([0, 1, 2, 3], [0, 9, 9, 1], None), short, atol=1e-2)


@torch.no_grad()
def test_copies_of_a_chunk_are_what_each_would_be_alone():
    model, latents, path = student(), video(REMEMBERED + CHUNK, batch_size=2), camera(REMEMBERED + CHUNK, batch_size=2)
    prompt = model.cache_prompt(text(2))
    past, own = part(path, 0, REMEMBERED), part(path, REMEMBERED, REMEMBERED + CHUNK)
    history = model.remember(latents[:, :, :REMEMBERED], prompt, positions=torch.arange(REMEMBERED), camera=past)
    positions = torch.arange(REMEMBERED, REMEMBERED + CHUNK)
    times = torch.tensor([900.0, 200.0, 700.0, 400.0])
    chunk = latents[:, :, REMEMBERED:]
    copied = model(
        chunk.repeat_interleave(2, 0),
        times,
        prompt.repeated(2),
        history=history.repeated(2),
        frame_positions=positions,
        camera=own.repeated(2),
    ).sample
    for copy in range(2):
        alone = model(chunk, times[copy::2], prompt, history=history, frame_positions=positions, camera=own).sample
        torch.testing.assert_close(copied[copy::2], alone, atol=ATOL, rtol=0)


@torch.no_grad()
def test_a_camera_that_holds_at_0_is_no_camera_and_a_new_camera_input_changes_nothing():
    plain = causal_model()
    told = CausalWanTransformer3DModel(**CONFIG, camera_dim=8)
    told.load_state_dict(plain.state_dict(), strict=False)
    latents, times = video(3), torch.tensor([500.0])
    held = Camera(torch.zeros(1, 3), torch.zeros(1, 3))
    expected = plain(latents, times, text()).sample
    assert torch.equal(told(latents, times, text(), camera=held).sample, told(latents, times, text()).sample)
    moved = Camera(torch.zeros(1, 3), torch.ones(1, 3))
    for known in (None, held, moved):  # a timestep a frame rounds otherwise than one for all
        torch.testing.assert_close(told(latents, times, text(), camera=known).sample, expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_only_differences_of_camera_positions_matter():
    model, latents, path = student(), video(REMEMBERED + CHUNK), camera(REMEMBERED + CHUNK)
    first = with_history(model, latents, path, 500.0)
    elsewhere = Camera(path.columns + 11.5, path.motions)
    torch.testing.assert_close(with_history(model, latents, elsewhere, 500.0), first, atol=1e-4, rtol=0)
    columns = path.columns.clone()
    columns[:, 0] += 2
    assert not torch.allclose(with_history(model, latents, Camera(columns, path.motions), 500.0), first, atol=1e-3)


def test_gradients_reach_what_is_remembered_also_with_checkpointing():
    model = student()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.train().enable_gradient_checkpointing()
        latents = video(REMEMBERED + CHUNK).requires_grad_()
        with_history(model, latents, camera(REMEMBERED + CHUNK), 500.0).square().mean().backward()
        gradients.append((latents.grad, model.camera_embedder.linear_1.weight.grad.clone()))
        model.zero_grad()
    assert gradients[0][0][:, :, :REMEMBERED].abs().max() > 0
    for plain, checkpoint in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpoint, plain, atol=1e-6, rtol=1e-5)


def test_what_does_not_go_together_is_refused():
    plain = causal_model()
    with pytest.raises(ValueError, match="encodes frames alone"):
        plain.remember(video(2), plain.cache_prompt(text()), positions=torch.arange(2))
    with pytest.raises(ValueError, match="not told of a camera"):
        plain(video(2), torch.tensor([5.0]), text(), camera=camera(2))
    with pytest.raises(ValueError, match="clean_pass"):
        CausalWanTransformer3DModel(**CONFIG, clean_pass="none")

"""The autoencoder of Open-Sora 1.2 against the original, and the promises of its interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.open_sora_fixtures import largest_difference, tensors, values
from vidaccel.models.open_sora_vae import AutoencoderKLOpenSora

LENGTHS = (1, 4, 17, 20, 34, 51)
TOLERANCE = 2e-5


def small_vae(*, width: int = 32, **changes: Any) -> AutoencoderKLOpenSora:
    """At the size of the recorded weights, random; the temporal part can only be a multiple of 32 wide."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "temporal_channels": (width, 2 * width, 2 * width, 4 * width),
        "temporal_res_blocks": 1,
    }
    return AutoencoderKLOpenSora(**(config | changes)).eval()


@pytest.fixture(scope="module")
def recorded_vae() -> AutoencoderKLOpenSora:
    vae = small_vae()
    vae.load_state_dict(tensors("vae_weights"), strict=True)
    return vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLOpenSora:
    torch.manual_seed(0)
    return small_vae(temporal_channels=(32, 32, 32, 32))


def video(num_frames: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, num_frames, 16, 24, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


@torch.no_grad()
def latents_of(vae: AutoencoderKLOpenSora, given: Tensor) -> Tensor:
    return vae.encode(given, sample_frames=False).latent_dist.mode()


@torch.no_grad()
def decoded(vae: AutoencoderKLOpenSora, latents: Tensor, **arguments: Any) -> Tensor:
    return vae.decode(latents, **arguments).sample


@pytest.mark.parametrize("num_frames", LENGTHS)
def test_it_encodes_and_decodes_as_the_original(num_frames: int, recorded_vae: AutoencoderKLOpenSora) -> None:
    recorded = {name: tensors("vae_io")[f"{num_frames}.{name}"] for name in ("video", "z", "dec")}
    assert (
        largest_difference(recorded_vae.normalized(latents_of(recorded_vae, recorded["video"])), recorded["z"]) <= 2e-5
    )
    frames = decoded(recorded_vae, recorded_vae.denormalized(recorded["z"]), num_frames=num_frames)
    assert largest_difference(frames, recorded["dec"]) <= TOLERANCE


def test_the_recorded_weights_are_those_of_the_recorded_sizes() -> None:
    recorded = values("vae_config")
    config = small_vae().config
    assert list(config.block_out_channels) == recorded["autoencoder_kl"]["block_out_channels"]
    assert list(config.latents_mean) == recorded["shift"]
    assert list(config.latents_std) == recorded["scale"]
    temporal = recorded["temporal"]
    assert list(config.temporal_channels) == [temporal["filters"] * by for by in temporal["channel_multipliers"]]


def test_the_full_size_has_the_keys_and_shapes_of_the_published_file() -> None:
    with torch.device("meta"):
        full = AutoencoderKLOpenSora()
    state = full.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == values("vae_v12_keys")
    assert sum(tensor.numel() for tensor in state.values()) == 393_341_015


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [(1, 1), (4, 1), (16, 4), (17, 5), (18, 6), (20, 6), (34, 10), (51, 15), (102, 30), (204, 60), (408, 120)],
)
def test_latent_frames_follow_the_chunks(num_frames: int, expected: int, vae: AutoencoderKLOpenSora) -> None:
    assert vae.latent_size(num_frames, 480, 854) == (expected, 60, 106)
    assert vae.latent_size(vae.most_frames(expected), 8, 8)[0] == expected
    assert vae.latent_size(vae.most_frames(expected) + 1, 8, 8)[0] == expected + 1


@pytest.mark.parametrize("num_frames", [1, 6, 19])
def test_shapes_fit_the_sizes_it_names(num_frames: int, vae: AutoencoderKLOpenSora) -> None:
    given = video(num_frames, batch=2)[..., :15, :23]
    latents = latents_of(vae, given)
    assert latents.shape == (2, 4, *vae.latent_size(num_frames, 15, 23))
    assert decoded(vae, latents, num_frames=num_frames).shape == (2, 3, num_frames, 8, 16)


def test_chunks_know_nothing_of_each_other(vae: AutoencoderKLOpenSora) -> None:
    whole = video(20)
    changed = torch.cat([whole[:, :, :17], video(3, seed=1)], dim=2)
    first, second = latents_of(vae, whole), latents_of(vae, changed)
    assert torch.equal(first[:, :, :5], second[:, :, :5])
    assert not torch.equal(first[:, :, 5:], second[:, :, 5:])
    apart = torch.cat([latents_of(vae, whole[:, :, :17]), latents_of(vae, whole[:, :, 17:])], dim=2)
    assert largest_difference(first, apart) <= TOLERANCE
    frames = decoded(vae, first, num_frames=20)
    assert largest_difference(frames[:, :, 17:], decoded(vae, first[:, :, 5:], num_frames=3)) <= TOLERANCE


def test_the_sizes_of_the_pieces_given_to_the_image_autoencoder_do_not_count(vae: AutoencoderKLOpenSora) -> None:
    given = video(5, batch=2)
    latents = latents_of(vae, given)
    other = small_vae(temporal_channels=(32, 32, 32, 32), micro_batch_size=100)
    other.load_state_dict(vae.state_dict())
    assert largest_difference(latents_of(other, given), latents) <= TOLERANCE
    assert largest_difference(decoded(other, latents), decoded(vae, latents)) <= TOLERANCE
    other.enable_slicing()
    assert largest_difference(latents_of(other, given), latents) <= TOLERANCE
    assert largest_difference(decoded(other, latents), decoded(vae, latents)) <= TOLERANCE
    other.disable_slicing()


def test_a_number_of_frames_that_the_latents_cannot_be_is_refused(vae: AutoencoderKLOpenSora) -> None:
    latents = torch.zeros(1, 4, 2, 1, 1)
    assert decoded(vae, latents).shape[2] == 8
    assert decoded(vae, latents, num_frames=5).shape[2] == 5
    with pytest.raises(ValueError, match=r"`num_frames` is 9, which is 3 latent frames; the latents have 2, at most 8"):
        vae.decode(latents, num_frames=9)


def test_drawing_is_seeded_and_a_mode_is_not_drawn(vae: AutoencoderKLOpenSora) -> None:
    given = video(4, batch=2)

    def draw(*seeds: int, **arguments: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            return vae.encode(given, generator=generators, **arguments).latent_dist.mode()

    assert torch.equal(draw(1, 2), draw(1, 2))
    assert torch.equal(draw(1, 2)[0], draw(1, 3)[0])
    assert not torch.equal(draw(1, 2)[1], draw(1, 3)[1])
    assert torch.equal(draw(1, 2, sample_frames=False), latents_of(vae, given))
    vae.enable_slicing()
    sliced = draw(1, 2)
    vae.disable_slicing()
    assert largest_difference(sliced, draw(1, 2)) <= TOLERANCE


def test_normalizing_is_undone_and_takes_the_published_numbers(vae: AutoencoderKLOpenSora) -> None:
    latents = torch.tensor([-0.10 + 3.85, 0.34, 0.27, 0.98]).view(1, 4, 1, 1, 1)
    assert largest_difference(vae.normalized(latents).flatten(), torch.tensor([1.0, 0, 0, 0])) <= 1e-6
    assert largest_difference(vae.denormalized(vae.normalized(latents)), latents) <= 1e-6


def test_tiling_is_that_of_the_image_autoencoder(vae: AutoencoderKLOpenSora) -> None:
    vae.enable_tiling()
    assert vae.spatial_vae.module.use_tiling
    vae.disable_tiling()
    assert not vae.spatial_vae.module.use_tiling


def test_it_saves_and_loads(vae: AutoencoderKLOpenSora, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKLOpenSora.from_pretrained(tmp_path).eval()
    given = video(4)
    with torch.no_grad():
        assert torch.equal(loaded(given).sample, vae(given).sample)
        half = AutoencoderKLOpenSora.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert half(given.bfloat16()).sample.dtype == torch.bfloat16


def test_levels_and_halvings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`temporal_downsample` must have one entry fewer .* \(4\); got 2"):
        small_vae(temporal_downsample=(True, True))

"""Decoding chunk by chunk gives what decoding at once gives, to the bit, and keeps its state to itself."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

from tests.support.tiny_models import call_arguments, tiny_vae, tiny_wan_t2v
from vidaccel.errors import UserError
from vidaccel.rollout.decode import StreamingDecoder, encode_start
from vidaccel.video.frames import rounded_to_uint8

KINDS = {
    "wan2.1": {"temperal_downsample": [False, True, True]},
    "wan2.2": {
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "decoder_base_dim": 6,
    },
}


def random_vae(kind: str = "wan2.1", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """Random weights of either autoencoder's form, with latents that are neither centred nor of unit size."""
    torch.manual_seed(seed)
    changes: dict[str, Any] = KINDS[kind]
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=torch.randn(4).tolist(),
        latents_std=(torch.rand(4) + 0.5).tolist(),
        **changes,
    )
    return vae.eval().to(dtype)


def random_latents(num_frames: int = 7, *, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, num_frames, 3, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded_at_once(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The slow twin, as WanPipeline does it: (B, 3, f, H, W) in [-1, 1]."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode((latents / (1.0 / std) + mean).to(vae.dtype)).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_any_split_decodes_to_the_bits_of_decoding_at_once(kind: str, dtype: torch.dtype) -> None:
    vae, latents = random_vae(kind, dtype=dtype), random_latents(batch=2)
    expected = decoded_at_once(vae, latents)
    for sizes in ([1] * 7, [2, 2, 2, 1], [3, 3, 1], [1, 4, 2], [7]):
        decoder = StreamingDecoder(vae)
        pieces = [decoder.decode_pixels(piece) for piece in latents.split(sizes, dim=2)]
        assert torch.equal(torch.cat(pieces, dim=2), expected), sizes
    assert expected.std() > 0.01


def test_chunks_of_three_give_nine_frames_and_then_twelve_as_bytes() -> None:
    vae, latents = random_vae(), random_latents(9, batch=2)
    decoder = StreamingDecoder(vae)
    chunks = [decoder.decode(chunk) for chunk in latents.split(3, dim=2)]
    assert [chunk.shape for chunk in chunks] == [(2, f, 3, 24, 32) for f in (9, 12, 12)]
    assert {chunk.dtype for chunk in chunks} == {torch.uint8}
    expected = rounded_to_uint8(decoded_at_once(vae, latents) / 2 + 0.5).transpose(1, 2)
    assert torch.equal(torch.cat(chunks, dim=1), expected)


def test_the_latents_of_a_pipeline_become_the_video_of_that_pipeline() -> None:
    pipe = tiny_wan_t2v()
    arguments = {"num_inference_steps": 2, "num_frames": 17}
    latents = pipe(**call_arguments(pipe, **arguments)).frames
    video = pipe(**call_arguments(pipe, **arguments, output_type="pt")).frames
    decoder = StreamingDecoder(pipe.vae)
    frames = torch.cat([decoder.decode(chunk) for chunk in latents.split(3, dim=2)], dim=1)
    assert torch.equal(frames, rounded_to_uint8(video))


def test_rollouts_share_an_autoencoder_and_whole_decodes_in_between_change_nothing() -> None:
    vae = random_vae()
    videos = [random_latents(6, seed=seed) for seed in (1, 2)]
    expected = [decoded_at_once(vae, latents) for latents in videos]
    decoders = [StreamingDecoder(vae) for _ in videos]
    pieces: list[list[Tensor]] = [[], []]
    for chunk in range(3):
        for decoder, latents, made in zip(decoders, videos, pieces, strict=True):
            made.append(decoder.decode_pixels(latents[:, :, 2 * chunk : 2 * chunk + 2]))
            assert all(entry is None for entry in getattr(vae, "_feat_map", []))
            assert torch.equal(decoded_at_once(vae, videos[0]), expected[0])
    for made, whole in zip(pieces, expected, strict=True):
        assert torch.equal(torch.cat(made, dim=2), whole)


def state_bytes(decoder: StreamingDecoder) -> int:
    return sum(tensor.nbytes for tensor in decoder.save_state()[0].values())


def test_the_state_stays_as_large_as_it_was_after_two_latent_frames() -> None:
    decoder = StreamingDecoder(random_vae())
    decoder.decode(random_latents(2))
    size = state_bytes(decoder)
    for seed in range(10):
        decoder.decode(random_latents(3, seed=seed))
        assert state_bytes(decoder) == size > 0


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("before", [0, 1, 2, 4])
def test_a_decoder_goes_on_exactly_from_a_saved_state(kind: str, before: int) -> None:
    vae, latents = random_vae(kind), random_latents()
    expected = decoded_at_once(vae, latents)
    first = StreamingDecoder(vae)
    made = [first.decode_pixels(latents[:, :, :before])] if before else []
    tensors, values = first.save_state()
    first.decode(random_latents(seed=9))  # a saved state does not change with its decoder
    second = StreamingDecoder(vae)
    second.decode(random_latents(2, seed=5))
    second.load_state(tensors, json.loads(json.dumps(values)))
    assert torch.equal(torch.cat([*made, second.decode_pixels(latents[:, :, before:])], dim=2), expected)


def test_after_a_reset_the_next_latents_begin_a_video() -> None:
    vae, latents = random_vae(), random_latents(3)
    decoder = StreamingDecoder(vae)
    decoder.decode(random_latents(4, batch=2, seed=3))
    decoder.reset()
    assert torch.equal(decoder.decode_pixels(latents), decoded_at_once(vae, latents))


def test_a_chunk_that_failed_can_be_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents = random_vae(), random_latents(6)
    decoder = StreamingDecoder(vae)
    pieces = [decoder.decode_pixels(latents[:, :, :3])]
    whole = vae.decoder.conv_out.forward
    calls = iter([whole, whole])  # the third frame of the chunk fails

    def failing(*arguments: Any) -> Tensor:
        if (forward := next(calls, None)) is None:
            raise torch.OutOfMemoryError
        return forward(*arguments)

    monkeypatch.setattr(vae.decoder.conv_out, "forward", failing)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.decode_pixels(latents[:, :, 3:])
    monkeypatch.undo()
    pieces.append(decoder.decode_pixels(latents[:, :, 3:]))
    assert torch.equal(torch.cat(pieces, dim=2), decoded_at_once(vae, latents))


def test_an_offloaded_autoencoder_is_brought_in_for_every_chunk() -> None:
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *arguments: Any, **named: Any) -> Any:
            self.calls += 1
            return arguments, named

    vae, hook = random_vae(), Counting()
    add_hook_to_module(vae, hook)
    decoder = StreamingDecoder(vae)
    for chunk in random_latents(4).split(2, dim=2):
        decoder.decode(chunk)
    assert hook.calls == 2


def test_wrong_latents_and_states_are_refused_in_one_line_and_change_nothing() -> None:
    vae, latents = random_vae(), random_latents(4)
    decoder = StreamingDecoder(vae)
    pieces = [decoder.decode_pixels(latents[:, :, :2])]
    tensors, values = decoder.save_state()
    other = StreamingDecoder(tiny_vae())
    wrong = {
        "must be": lambda: decoder.decode(random_latents()[:, :3]),
        "got .1, 4, 3, 4": lambda: decoder.decode(random_latents()[:, :, 0]),
        "call `reset": lambda: decoder.decode(random_latents(batch=2)),
        "3 x 4": lambda: decoder.decode(random_latents()[..., :2]),
        "not of this autoencoder": lambda: decoder.load_state(*other.save_state()),
        "which keeps": lambda: decoder.load_state(tensors, {}),
        "incomplete": lambda: decoder.load_state({}, values),
    }
    for message, request in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            request()
        assert "\n" not in str(caught.value)
    pieces.append(decoder.decode_pixels(latents[:, :, 2:]))
    assert torch.equal(torch.cat(pieces, dim=2), decoded_at_once(vae, latents))
    with pytest.raises(UserError, match="got AutoencoderKL"):
        StreamingDecoder(AutoencoderKL(norm_num_groups=1))
    vae.enable_tiling()
    with pytest.raises(UserError, match="disable_tiling"):
        decoder.decode(latents)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_start_is_the_normalised_mode_of_the_distribution(kind: str) -> None:
    vae = random_vae(kind)
    frames = torch.rand(2, 9, 3, 32, 48)
    latents = encode_start(vae, frames)
    assert latents.dtype == torch.float32
    assert latents.shape == (2, 4, 3, 32 // vae.config.scale_factor_spatial, 48 // vae.config.scale_factor_spatial)
    with torch.no_grad():
        mode = vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.testing.assert_close(latents * std + mean, mode)
    assert encode_start(vae, frames[0, :1]).shape[:3] == (1, 4, 1)


def test_a_start_takes_bytes_and_keeps_the_end_of_a_clip_of_an_odd_length(caplog: pytest.LogCaptureFixture) -> None:
    vae = random_vae()
    clip = torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8)
    with caplog.at_level(logging.WARNING, logger="vidaccel"):
        latents = encode_start(vae, clip)
        assert "11 frames" in caplog.text
        assert "first 2" in caplog.text
        caplog.clear()
        assert torch.equal(encode_start(vae, clip[2:].float() / 255), latents)
        assert not caplog.text


def test_a_start_of_a_shape_that_cannot_be_encoded_is_refused() -> None:
    vae = random_vae()
    with pytest.raises(UserError, match="multiples of 8; got 20 x 16"):
        encode_start(vae, torch.rand(1, 3, 20, 16))
    with pytest.raises(UserError, match="must be"):
        encode_start(vae, torch.rand(3, 16, 16))

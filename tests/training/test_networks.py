"""The parts of the training against their slow, obvious twins: one-pass autoencoder, Muon, tokens, pooling, flow."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import PreTrainedTokenizerFast

from vidaccel.training.architecture import (
    END,
    PAD,
    TEXT_ENCODER_ARCHITECTURE,
    UNKNOWN,
    VAE_ARCHITECTURE,
    new_text_encoder,
    new_tokenizer,
    new_vae,
)
from vidaccel.training.clip_pool import ClipPool
from vidaccel.training.flow import draw_sigmas, drop_words, empty_prompt, noisy_latents, prompt_embeddings
from vidaccel.training.latents import TOKENS_PER_CAPTION, caption_tokens, pooled_coverage
from vidaccel.training.muon import BatchedMuon
from vidaccel.training.vae_clip import decode_clip, encode_clip
from vidaccel.training.vae_loss import psnr_of, reconstruction_loss
from vidaccel.world import caption, random_scene, render, vocabulary

SMALL_VAE = {**VAE_ARCHITECTURE, "base_dim": 4, "dim_mult": [1, 1, 2, 2]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def random_vae() -> AutoencoderKLWan:
    """With random past taps, so that every tap matters."""
    torch.manual_seed(1)
    return AutoencoderKLWan(**SMALL_VAE).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return new_tokenizer(vocabulary())


@pytest.mark.parametrize("num_frames", [1, 5, 17])
@torch.no_grad()
def test_one_pass_over_a_clip_equals_the_chunked_autoencoder(random_vae: AutoencoderKLWan, num_frames: int) -> None:
    video = torch.rand(2, 3, num_frames, 16, 16) * 2 - 1
    chunked = random_vae.encode(video).latent_dist.parameters
    torch.testing.assert_close(encode_clip(random_vae, video), chunked, atol=1e-5, rtol=1e-4)

    latents = torch.randn(2, 16, (num_frames - 1) // 4 + 1, 2, 2)
    chunked = random_vae.decode(latents).sample
    torch.testing.assert_close(decode_clip(random_vae, latents).clamp(-1, 1), chunked, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_new_autoencoder_codes_a_still_video_as_it_codes_its_frame() -> None:
    vae = new_vae(SMALL_VAE).eval()
    frame = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    alone = decode_clip(vae, encode_clip(vae, frame).chunk(2, dim=1)[0])
    still = decode_clip(vae, encode_clip(vae, frame.repeat(1, 1, 9, 1, 1)).chunk(2, dim=1)[0])
    torch.testing.assert_close(still, alone.repeat(1, 1, 9, 1, 1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_default_initialisation_does_not_have_that_property(random_vae: AutoencoderKLWan) -> None:
    frame = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    still = decode_clip(random_vae, encode_clip(random_vae, frame.repeat(1, 1, 9, 1, 1)).chunk(2, dim=1)[0])
    assert not torch.allclose(still[:, :, 0], still[:, :, -1], atol=1e-3)


def test_batched_muon_takes_the_steps_of_torch_muon() -> None:
    shapes = [(6, 6), (6, 6), (12, 6), (4, 10)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    results = []
    for kind, options in ((BatchedMuon, {}), (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.95})):
        parameters = [nn.Parameter(value.clone()) for value in start]
        optimizer = kind(parameters, lr=0.05, weight_decay=0.01, **options)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameters)
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=2e-3, rtol=2e-2)  # PyTorch's orthogonalises in bf16


def test_muon_refuses_what_is_not_a_matrix() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        BatchedMuon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_every_caption_is_known_and_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    captions = [caption(random_scene(seed)) for seed in range(300)]
    tokens = caption_tokens(tokenizer, captions)
    assert not (tokens == UNKNOWN).any()
    assert ((tokens == END).sum(1) == 1).all(), "a caption is longer than its tokens"


def test_case_and_punctuation_are_harmless_and_other_words_are_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = tokenizer("a red ball moves to the left").input_ids
    assert tokenizer("A RED ball, moves -- to the left!").input_ids == plain
    assert tokenizer.tokenize("a red zeppelin") == ["a", "red", "<unk>"]
    assert tokenizer("").input_ids == [END]


def test_embeddings_are_those_of_the_stock_pipeline(tokenizer: PreTrainedTokenizerFast) -> None:
    from diffusers import WanPipeline

    text_encoder = new_text_encoder(TEXT_ENCODER_ARCHITECTURE, words=vocabulary()).eval()
    pipe = WanPipeline(tokenizer, text_encoder, vae=None, scheduler=None, transformer=None)
    prompt = caption(random_scene(3))
    with torch.no_grad():
        stock = torch.cat(pipe.encode_prompt([prompt], "", max_sequence_length=48, device=CPU))
        tokens = torch.cat([caption_tokens(tokenizer, [prompt]), empty_prompt(CPU)[None]])
        ours = prompt_embeddings(text_encoder, tokens, length=48)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)


def test_dropped_captions_are_the_empty_prompt_and_dropped_words_are_unknown() -> None:
    tokens = torch.tensor([[5, 6, 7, END, PAD]]).repeat(400, 1)
    tokens = torch.nn.functional.pad(tokens, (0, TOKENS_PER_CAPTION - 5), value=PAD)
    dropped = drop_words(tokens, captions=0.25, words=0.1, generator=torch.Generator().manual_seed(0))
    is_empty = (dropped == empty_prompt(CPU)).all(1)
    assert 0.15 < is_empty.float().mean() < 0.35
    kept = dropped[~is_empty]
    assert (kept[:, 3] == END).all()
    assert (kept[:, 4:] == PAD).all()
    assert 0.04 < (kept[:, :3] == UNKNOWN).float().mean() < 0.16
    assert torch.equal(drop_words(tokens, captions=0.0, words=0.0, generator=torch.Generator()), tokens)


def test_noise_levels_follow_the_shifted_logit_normal() -> None:
    sigmas = draw_sigmas(20_000, torch.Generator().manual_seed(0))
    assert float(sigmas.min()) > 0
    assert float(sigmas.max()) < 1
    assert math.isclose(float(sigmas.median()), 3 * 0.5 / (1 + 2 * 0.5), abs_tol=0.01)
    data, noise = torch.zeros(2, 1, 1, 1, 1), torch.ones(2, 1, 1, 1, 1)
    assert noisy_latents(data, noise, torch.tensor([0.0, 0.3])).flatten().tolist() == pytest.approx([0.0, 0.3])


def test_coverage_is_pooled_as_the_autoencoder_groups_frames() -> None:
    mask = torch.zeros(1, 9, 16, 16)
    mask[0, 0, :8, :8] = 1
    mask[0, 5:7, 8:, 8:] = 1
    pooled = pooled_coverage(mask, scale=8, stride=4)
    assert pooled.shape == (1, 3, 2, 2)
    assert pooled[0].flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5]


def test_crops_are_parts_of_rendered_clips_and_half_of_them_show_the_subject() -> None:
    pool = ClipPool(2, num_frames=5, first_seed=3, device=CPU)
    video, mask = pool.crops(24, num_frames=5, size=128, generator=torch.Generator().manual_seed(0))
    rendered = render([random_scene(seed, num_frames=5) for seed in (3, 4)]).transpose(1, 2) * 2 - 1
    distance = (video[:, None] - rendered[None]).abs().amax((2, 3, 4, 5)).amin(1)
    assert float(distance.max()) < 1 / 200, "a full-size crop must be one of the clips, up to 8 bits"
    _, mask = pool.crops(24, num_frames=1, size=64, generator=torch.Generator().manual_seed(0))
    assert (mask[::2].amax((1, 2, 3, 4)) > 0.9).float().mean() > 0.7


def test_refreshing_replaces_the_oldest_clips() -> None:
    pool = ClipPool(3, num_frames=1, first_seed=0, device=CPU)
    before = pool.clips.clone()
    pool.refresh(2)
    changed = (pool.clips != before).flatten(1).any(1)
    assert changed.tolist() == [True, True, False]
    assert pool.next_seed == 5


def test_errors_on_the_subject_weigh_more() -> None:
    video, error = torch.zeros(1, 3, 1, 4, 4), torch.zeros(1, 3, 1, 4, 4)
    error[..., 1, 1] = 0.5
    plain = torch.ones(1, 1, 1, 4, 4)
    weighted = plain.clone()
    weighted[..., 1, 1] = 3
    assert reconstruction_loss(error, video, weighted)[0] > reconstruction_loss(error, video, plain)[0]
    assert float(reconstruction_loss(error, video, plain)[1]) == pytest.approx(0.25 / 16)
    assert float(psnr_of(torch.tensor(0.04))) == pytest.approx(20.0)

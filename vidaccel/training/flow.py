"""Flow matching with WanPipeline's conventions, for training and for quick samples.

sigma runs from 1 (noise) to 0 (data); noisy latents are (1 - sigma) * data + sigma * noise, the transformer predicts
the velocity noise - data and takes sigma * 1000 as its timestep (Lipman et al., arXiv 2210.02747; logit-normal times
and the shift as in Esser et al., arXiv 2403.03206, section 3.1 and equation 23).
Shapes: latents (B, C, F, H, W); tokens (B, length).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.training.architecture import (
    END,
    FLOW_SHIFT,
    NUM_TRAIN_TIMESTEPS,
    PAD,
    UNKNOWN,
    TextEncoder,
    Transformer,
    WordTokenizer,
    new_scheduler,
)
from vidaccel.training.device import autocast
from vidaccel.training.latents import TOKENS_PER_CAPTION, caption_tokens

_LEAST_HIGH = 0.8


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Logit-normal times, shifted towards noise; (count,)."""
    times = torch.sigmoid(torch.randn(count, device=generator.device, generator=generator))
    return FLOW_SHIFT * times / (1 + (FLOW_SHIFT - 1) * times)


def draw_high_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """High noise levels, which decide what a chunk will show; (count,), from 0.8 to 1."""
    return _LEAST_HIGH + (1 - _LEAST_HIGH) * torch.rand(count, device=generator.device, generator=generator)


def timesteps_of(sigmas: Tensor) -> Tensor:
    """What the transformer takes for noise levels `sigmas`."""
    return sigmas * NUM_TRAIN_TIMESTEPS


def noisy_latents(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Latents at noise levels `sigmas` (B,)."""
    sigmas = sigmas.view(-1, 1, 1, 1, 1)
    return (1 - sigmas) * latents + sigmas * noise


def empty_prompt(device: torch.device) -> Tensor:
    """The tokens of "": only the end of the text; (length,)."""
    tokens = torch.full((TOKENS_PER_CAPTION,), PAD, device=device)
    tokens[0] = END
    return tokens


def drop_words(tokens: Tensor, *, captions: float, words: float, generator: torch.Generator) -> Tensor:
    """Replace whole captions by the empty prompt, and words by `<unk>`, with the given probabilities.

    Without the first there is no guidance; without the second a word the model does not know would be noise to it.
    """
    chance = torch.rand(tokens.shape, device=tokens.device, generator=generator)
    tokens = torch.where((chance < words) & (tokens > UNKNOWN), UNKNOWN, tokens)
    is_empty = torch.rand(tokens.shape[0], device=tokens.device, generator=generator) < captions
    return torch.where(is_empty[:, None], empty_prompt(tokens.device), tokens)


def prompt_embeddings(text_encoder: TextEncoder, tokens: Tensor, *, length: int) -> Tensor:
    """Embeddings as WanPipeline makes them: zeros after the last token, up to `length`; (B, length, text_dim)."""
    mask = (tokens != PAD).long()
    with autocast(tokens.device):
        embeddings = text_encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
    embeddings = embeddings.float() * mask[..., None]
    return F.pad(embeddings, (0, 0, 0, length - tokens.shape[1]))


@torch.no_grad()
def sample(
    transformer: Transformer,
    text_encoder: TextEncoder,
    tokenizer: WordTokenizer,
    *,
    prompts: Sequence[str],
    shape: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    generator: torch.Generator,
) -> Tensor:
    """Normalised latents (len(prompts), *shape) with the stock scheduler, both CFG branches in one batch."""
    device = generator.device
    tokens = torch.cat([caption_tokens(tokenizer, prompts).to(device), empty_prompt(device).repeat(len(prompts), 1)])
    embeddings = prompt_embeddings(text_encoder, tokens, length=2 * TOKENS_PER_CAPTION)
    latents = torch.randn(len(prompts), *shape, device=device, generator=generator)
    scheduler = new_scheduler()
    scheduler.set_timesteps(num_inference_steps, device=device)
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        with autocast(device), torch.compiler.set_stance("force_eager"):
            velocity = transformer(
                torch.cat([latents, latents]), timestep.expand(2 * len(prompts)), embeddings, return_dict=False
            )[0]
        cond, uncond = velocity.float().chunk(2)
        latents = scheduler.step(uncond + guidance_scale * (cond - uncond), timestep, latents, return_dict=False)[0]
    return latents

"""What the trained model in assets/ must do: load without us, follow unseen prompts, and keep its video under reuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from vidaccel.bench.quality import reconstruct
from vidaccel.catalog.models import EMBEDDED_MODEL
from vidaccel.catalog.spec import asset_path
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.generation.generate import generate
from vidaccel.generation.loading import load_pipeline
from vidaccel.generation.request import GenerationRequest
from vidaccel.video.metrics import psnr
from vidaccel.world import make_clip, read_clip, unseen_prompts

pytestmark = pytest.mark.shipped


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(EMBEDDED_MODEL, device="cpu")


def test_the_stock_pipeline_loads_the_folder_and_knows_wan_by_its_parts() -> None:
    stock = WanPipeline.from_pretrained(asset_path(EMBEDDED_MODEL))
    names = {name: type(getattr(stock, name)).__name__ for name in ("transformer", "vae", "text_encoder", "scheduler")}
    assert names == {
        "transformer": "WanTransformer3DModel",
        "vae": "AutoencoderKLWan",
        "text_encoder": "UMT5EncoderModel",
        "scheduler": "UniPCMultistepScheduler",
    }
    assert (stock.vae_scale_factor_temporal, stock.vae_scale_factor_spatial) == (4, 8)
    stock.set_progress_bar_config(disable=True)
    frames = stock("a red ball", num_frames=5, height=64, width=64, num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 5, 64, 64, 3)


def test_the_folder_names_nothing_of_ours_to_load() -> None:
    index = json.loads((asset_path(EMBEDDED_MODEL) / "model_index.json").read_text())
    libraries = {entry[0] for entry in index.values() if isinstance(entry, list)}
    assert libraries <= {"diffusers", "transformers", None}


def test_all_assets_together_leave_room_for_the_models_to_come() -> None:
    files = [path for path in Path(asset_path(EMBEDDED_MODEL)).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 18_000_000
    assert max(path.stat().st_size for path in files) <= 16_000_000


def test_the_autoencoder_reconstructs_unseen_clips(pipe: Any) -> None:
    values = []
    for seed in (50_001, 50_002):
        clip = make_clip(seed, split="test").video
        values.append(psnr(clip, reconstruct(pipe, clip)))
    assert min(values) > 29
    assert sum(values) / len(values) > 30


def test_unseen_prompts_give_the_subject_and_place_they_ask_for(pipe: Any) -> None:
    # Half a minute on a busy core: what is tested is the trained model, at its own 49 frames of 128x128.
    for index, prompt in enumerate(unseen_prompts(2, seed=5)):
        request = GenerationRequest(prompt.text, num_inference_steps=20, seed=index, max_sequence_length=64)
        reading = read_clip(generate(pipe, request).frames)
        wanted = (prompt.colour, prompt.shape, prompt.motion, prompt.background)
        assert (reading.colour, reading.shape, reading.motion, reading.background) == wanted


def test_easycache_reuses_half_of_the_steps_and_keeps_the_video(pipe: Any) -> None:
    request = GenerationRequest(unseen_prompts(1, seed=6)[0].text, seed=3, num_frames=25, max_sequence_length=64)
    plain = generate(pipe, request)
    fast = generate(pipe, request, easycache=EasyCacheConfig())
    assert plain.num_forwards == 100
    assert fast.num_forwards <= 60
    assert psnr(plain.frames, fast.frames) > 30


def test_easycache_that_never_reuses_gives_the_video_of_the_plain_pipeline(pipe: Any) -> None:
    """To the bit; 12 steps are two more than the warm-up, so that the rule is asked."""
    text = unseen_prompts(1, seed=6)[0].text
    request = GenerationRequest(text, seed=3, num_frames=25, num_inference_steps=12, max_sequence_length=64)
    made = generate(pipe, request, easycache=EasyCacheConfig(threshold=0))
    assert made.num_forwards == 24
    assert torch.equal(made.frames, generate(pipe, request).frames)

"""Parts of random pipelines that are neither a class of a library nor a tokenizer."""

from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKLAllegro, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class NoSafetyChecker(ModelMixin, ConfigMixin):
    """Stands where a Cosmos pipeline has its guardrail, and checks nothing: for random weights, which make noise.

    The pipelines refuse to work without a checker, and theirs is in a package and in weights of their own
    (`cosmos_guardrail`). A folder with this class names it in its `model_index.json`; no other gets it.
    """

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(1))  # a model without a tensor has no device

    def check_text_safety(self, prompt: str) -> bool:
        """Every prompt passes."""
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        """The frames, (F, H, W, C) uint8, as they are."""
        return frames


def tiled_allegro_vae(**config: Any) -> Any:
    """An `AutoencoderKLAllegro` that works in tiles, the only way it decodes."""
    vae: Any = AutoencoderKLAllegro(**config)
    vae.enable_tiling()
    return cast(AutoencoderKLAllegro, vae)

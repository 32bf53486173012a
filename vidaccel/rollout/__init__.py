"""Autoregressive rollouts: chunk after chunk of video from a causal student with a bounded memory."""

from typing import Literal

PassMode = Literal["eager", "compiled", "captured"]
"""How the transformer is run: as it is, compiled by PyTorch, or recorded as CUDA graphs."""

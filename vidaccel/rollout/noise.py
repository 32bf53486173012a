"""Where the noise of a rollout comes from."""

import hashlib
from collections.abc import Sequence

import torch


def chunk_generators(seeds: Sequence[int], chunk: int) -> list[torch.Generator]:
    """The random numbers of a chunk, one source a sample; on the CPU, so that every device gets the same."""
    digests = [hashlib.sha256(f"vidaccel rollout {seed} {chunk}".encode()).digest() for seed in seeds]
    return [torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1) for digest in digests]

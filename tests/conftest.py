"""Shared settings of the tests: one thread (tiny tensors), a fixed seed before every test, one saved tiny pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import save_tiny_wan

# More threads only make tensors of a few hundred numbers slower, several times so on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny random `WanPipeline` on disk, text encoder and tokenizer included."""
    return save_tiny_wan(tmp_path_factory.mktemp("wan"))

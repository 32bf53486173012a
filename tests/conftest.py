"""Shared test settings: two threads at most, a fixed seed before every test, and one saved tiny pipeline per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_models import save_tiny_wan


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny random `WanPipeline` on disk, text encoder and tokenizer included."""
    return save_tiny_wan(tmp_path_factory.mktemp("wan"))

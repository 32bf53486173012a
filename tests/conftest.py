"""Shared settings of the tests: one thread (tiny tensors), a fixed seed before every test, one saved tiny pipeline."""

from __future__ import annotations

import json
import os
from pathlib import Path

# On some processors MKL rounds by where a tensor lies in memory; tests that compare to the bit need it not to. Before
# PyTorch is loaded, here and in the processes that tests start.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

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
    """A complete tiny random `WanPipeline` on disk, text encoder and tokenizer included.

    Its prompts have a few words. Padded to Wan's 512 tokens, as they are without the setting, they took 40 % of a call.
    """
    folder = save_tiny_wan(tmp_path_factory.mktemp("wan"))
    (folder / "vidaccel.json").write_text(json.dumps({"defaults": {"max_sequence_length": 32}}))
    return folder

"""What several tests of the training need: a tiny pipeline to begin from, saved once."""

from __future__ import annotations

import pytest

from tests.support.tiny_donor import save_tiny_donor


@pytest.fixture(scope="session")
def donor_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny untrained Wan pipeline that knows the words of the world."""
    return save_tiny_donor(tmp_path_factory.mktemp("donor"))

"""Folders that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_folder


def test_a_folder_without_a_name_is_refused_and_nothing_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept.txt").write_text("here", encoding="utf-8")
    with pytest.raises(UserError, match="give the name of a folder"), atomic_folder(Path(".")):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]

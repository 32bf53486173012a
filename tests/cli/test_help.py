"""The pages of help show what the options say: markup takes no part of it away."""

from __future__ import annotations

import pytest

from vidaccel.cli import run


@pytest.mark.parametrize(
    ("page", "default"),
    [("generate", "the model's preset"), ("rollout", "the student's"), ("session branch", "all")],
)
def test_a_default_that_depends_is_shown(
    page: str, default: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    run([*page.split(), "--help"])
    assert f"(default: {default}" in " ".join(capsys.readouterr().out.split())

"""`vidaccel session`: what it shows, and what it changes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.session_contents import do_not_wait_for_the_disk, everything, files, make
from vidaccel.cli import run
from vidaccel.sessions.session import Session

Command = Callable[..., str]


@pytest.fixture
def film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A session whose branch `main` has the chunks 0, 1, 2 of 9, 12 and 12 pixel frames."""
    do_not_wait_for_the_disk(monkeypatch)
    return make(tmp_path / "film", 0, 1, 2)


@pytest.fixture
def command(film: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `vidaccel session WHAT DIR ...` and return what it says."""
    monkeypatch.setattr("vidaccel.cli.console.console._width", 200)

    def call(what: str, *arguments: str, code: int = 0) -> str:
        assert run(["session", what, str(film), *arguments]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return call


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def test_branches_are_shown_with_their_lengths_and_bytes(film: Path, command: Command) -> None:
    assert "first 2 chunks of main; it has no exact state" in command(
        "branch", "--from", "main", "--at", "2", "--name", "fork"
    )
    text = command("show")
    rows = {cells(line)[0]: cells(line) for line in text.splitlines() if line.startswith("│")}
    assert rows["main"][1:5] == ["", "3", f"{33 / 16:.2f}", "3"]
    assert rows["fork"][1:5] == ["main at 2", "2", f"{21 / 16:.2f}", "none"]
    assert rows["fork"][5] == "0 bytes"
    assert rows["main"][6] == rows["fork"][6] != "0 bytes"


def test_a_branch_without_a_number_of_chunks_has_them_all(film: Path, command: Command) -> None:
    assert "first 3 chunks of main; it goes on from an exact state" in command("branch", "--name", "copy")
    assert everything(film)["branches"]["copy"] == ([0, 1, 2], (3,))


def test_rewinding_keeps_the_first_chunks_and_cleaning_frees_the_others(film: Path, command: Command) -> None:
    before = files(film)
    assert "branch main has 1 of its 3 chunks; it has no exact state" in command(
        "rewind", "--branch", "main", "--to", "1"
    )
    assert everything(film)["branches"]["main"] == ([0], ())
    assert files(film).keys() == before.keys()
    assert "belong to no branch; `vidaccel session clean" in command("show")
    assert "freed" in command("clean")
    assert len(files(film)) < len(before)
    assert "belong to no branch" not in command("show")


def test_seconds_are_shown_only_where_they_are_noted(film: Path, command: Command) -> None:
    with Session.open(film) as session:
        session.branch().append({}, {})
    assert "not noted" in command("show")


def test_a_session_that_is_being_written_can_be_shown_and_not_changed(film: Path, command: Command) -> None:
    with Session.open(film):
        assert "main" in command("show")
        for what, flags in (("rewind", ["--to", "1"]), ("branch", ["--name", "x"]), ("clean", [])):
            assert f"written by process {os.getpid()}" in command(what, *flags, code=2)
    assert everything(film)["branches"] == {"main": ([0, 1, 2], (3,))}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rewind", "--to", "4"), "3 finished chunks; cannot keep 4"),
        (("rewind", "--to", "1", "--branch", "x"), "no branch 'x'"),
        (("branch", "--name", "main"), "'main'"),
        (("branch", "--name", "a/b"), "a/b"),
        (("branch", "--name", "x", "--at", "-1"), "cannot keep -1"),
        (("rewind",), "--to"),
    ],
)
def test_what_cannot_be_done_is_one_line(film: Path, command: Command, arguments: tuple[str, ...], words: str) -> None:
    before = files(film)
    line = command(*arguments, code=2)
    assert words in line
    assert len(line.strip().splitlines()) == 1
    assert files(film) == before

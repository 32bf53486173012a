"""Sessions with damaged files: each gets one line that names the file, nothing is changed, nothing wrong is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.session_contents import SETTINGS, add, do_not_wait_for_the_disk, everything, files, make, numbers
from vidaccel.errors import UserError
from vidaccel.sessions.session import Session
from vidaccel.sessions.store import VERSION, write_sealed


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sessions of three chunks that have nothing in common."""
    place = tmp_path_factory.mktemp("sessions")
    with pytest.MonkeyPatch.context() as patch:
        do_not_wait_for_the_disk(patch)
        return make(place / "one", 0, 1, 2), make(place / "other", 10, 11, 12)


@pytest.fixture
def film(sessions: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the first session."""
    return Path(shutil.copytree(sessions[0], tmp_path / "film"))


# Of each kind of file the one that is damaged.
KINDS: dict[str, str] = {
    "session": "session.json",
    "branch": "branches/main.json",
    "journal": "journals/*.journal",
    "latents": "objects/*.safetensors",
    "segment": "objects/*.h264",
    "state": "states/*.safetensors",
}
DAMAGES: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "cut to nothing": lambda own, other: b"",
    "cut in half": lambda own, other: own[: len(own) // 2],
    "end lost": lambda own, other: own[:-2],
    "one bit changed": lambda own, other: own[:-5] + bytes([own[-5] ^ 1]) + own[-4:],
    "foreign bytes": lambda own, other: bytes(range(256)),
    "foreign text": lambda own, other: b'{"format": "something else", "version": 1}\n',
    "of another session": lambda own, other: other,
    "lost": lambda own, other: None,
}


def file_of(folder: Path, kind: str) -> Path:
    return sorted(folder.glob(KINDS[kind]))[0]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named_in_one_line_and_nothing_else_is_lost(
    film: Path, sessions: tuple[Path, Path], kind: str, damage: str
) -> None:
    path = file_of(film, kind)
    own = path.read_bytes()
    content = DAMAGES[damage](own, file_of(sessions[1], kind).read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    before = files(film)
    with pytest.raises(UserError) as refusal:
        everything(film)
    line = str(refusal.value)
    assert "\n" not in line
    assert "copy" in line  # what to do
    named = "main.json" if (kind, damage) == ("session", "of another session") else path.name
    assert named in line
    try:
        with Session.open(film) as session:
            session.branch()
    except UserError:
        assert kind in ("session", "branch", "journal")
    assert files(film) == before
    path.write_bytes(own)
    assert everything(film)["branches"] == {"main": ([0, 1, 2], (3,))}


@pytest.mark.parametrize("kind", ["latents", "segment", "state"])
def test_a_branch_with_a_lost_object_can_be_rewound_and_made_again(film: Path, kind: str) -> None:
    with Session.open(film) as session:
        branch = session.branch()
        record = next(branch._records(2, 3))
        names = {"latents": f"{record['latents']}.safetensors", "segment": f"{record['segment']}.h264"}
        damaged = film / "objects" / names[kind] if kind in names else file_of(film, kind)
        damaged.write_bytes(b"")
        with pytest.raises(UserError, match="--branch main --to 2") as refusal:
            numbers(branch)
        assert damaged.name in str(refusal.value)
        session.rewind("main", 2)
        assert numbers(branch) == [0, 1]
        add(branch, 2)
        assert numbers(branch) == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_no_changed_bit_is_read_as_something_else(film: Path, kind: str) -> None:
    path = file_of(film, kind)
    own, right = path.read_bytes(), everything(film)
    read = 0
    for place in range(len(own)):
        path.write_bytes(own[:place] + bytes([own[place] ^ (1 << place % 8)]) + own[place + 1 :])
        with suppress(UserError):
            assert everything(film) == right  # a change of the white space between the words of a JSON file
            read += 1
    assert read < 0.2 * len(own)


@pytest.mark.parametrize("kind", ["session", "branch"])
def test_a_session_of_a_newer_version_is_left_alone(film: Path, kind: str) -> None:
    path = file_of(film, kind)
    content = {**json.loads(path.read_text()), "version": VERSION + 1}
    path.write_text(json.dumps(content))
    before = files(film)
    with pytest.raises(UserError, match=rf"version {VERSION + 1} .* up to {VERSION}; update vidaccel"):
        Session.open(film)
    assert files(film) == before


def test_a_branch_of_another_session_is_refused(film: Path) -> None:
    path = film / "branches" / "main.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    write_sealed(path, {**content, "session": "0" * 32}, kind="vidaccel-branch")
    with pytest.raises(UserError, match="two sessions"):
        Session.open(film)


def test_a_journal_of_an_earlier_time_is_not_taken_for_the_present_one(film: Path) -> None:
    path = file_of(film, "journal")
    earlier = path.read_bytes()
    with Session.open(film) as session:
        session.rewind("main", 2)
        add(session.branch(), 7)
    path.write_bytes(earlier)  # whole, of as many lines, and of this session
    with pytest.raises(UserError, match="not those that were written"):
        everything(film)


@pytest.mark.parametrize("tail", [b"0123", b"\0" * 300, b"x" * 70 + b"\n"])
def test_what_an_append_left_that_did_not_end_does_not_count(film: Path, tail: bytes) -> None:
    with file_of(film, "journal").open("ab") as file:
        file.write(tail)
    (film / "objects" / ".123.part").write_bytes(b"half of an object")
    assert everything(film)["branches"]["main"][0] == [0, 1, 2]
    with Session.open(film, SETTINGS) as session:
        add(session.branch(), 3)
    assert everything(film)["branches"]["main"][0] == [0, 1, 2, 3]
    assert not list(film.rglob("*.part"))


def test_collecting_removes_nothing_where_a_branch_cannot_be_read(film: Path) -> None:
    with Session.open(film) as session:
        session.new_branch("fork", "main", 1)
        add(session.branch("fork"), 5)
        session.rewind("main", 1)
    path = film / "journals" / "fork.1.journal"
    path.write_bytes(path.read_bytes()[:-3])
    before = files(film)
    with Session.open(film) as session, pytest.raises(UserError, match=r"fork\.1\.journal is damaged"):
        session.collect()
    assert files(film) == before


def test_files_of_others_are_left_alone(film: Path) -> None:
    others = ["notes.txt", "objects/notes.txt", "states/x", "journals/notes.journal", "branches/my notes.json"]
    for name in others:
        (film / name).write_text("mine")
    with Session.open(film) as session:
        session.rewind("main", 0)
        assert session.branches == ("main",)
        session.collect()
    assert files(film).keys() == {"session.json", "branches/main.json", *others}


def test_a_folder_that_is_no_session_is_said(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"session\.json is missing; give the folder of a session"):
            Session.open(place)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        Session.open(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

"""Sessions on disk: what comes back, branching, rewinding, what a kill and a full disk leave, one writer."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.session_contents import (
    SETTINGS,
    add,
    do_not_wait_for_the_disk,
    everything,
    files,
    make,
    numbers,
    state_of,
)
from vidaccel.errors import UserError
from vidaccel.sessions.branch import Branch
from vidaccel.sessions.head import Parent
from vidaccel.sessions.session import Session
from vidaccel.sessions.store import ObjectStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A session whose branch `main` has the chunks 0, 1, 2; the disk is not waited for."""
    do_not_wait_for_the_disk(monkeypatch)
    return make(tmp_path / "film", 0, 1, 2)


def num_bytes(folder: Path) -> int:
    return sum(map(len, files(folder).values()))


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


ODD_TENSORS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "bfloat16": lambda: {"x": torch.tensor([1.0, -0.0, float("nan"), float("inf")]).bfloat16()},
    "float32": lambda: {
        "x": torch.randn(3, 5),
        "nan": torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32),
    },
    "float64": lambda: {"x": torch.randn(3).double()},
    "int64": lambda: {"x": torch.tensor([-(2**63), 2**63 - 1])},
    "bool": lambda: {"x": torch.tensor([[True], [False]])},
    "float8": lambda: {"x": torch.randn(7).to(torch.float8_e4m3fn)},
    "no dimensions": lambda: {"a": torch.tensor(3), "b": torch.tensor(True), "c": torch.tensor(0.5).bfloat16()},
    "no numbers": lambda: {"x": torch.zeros(0, 4), "y": torch.zeros(2, 0, dtype=torch.bool)},
    "no tensors": dict,
    "not contiguous": lambda: {
        "x": torch.randn(4, 6).T[::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "every other": torch.arange(9)[::2],
    },
    "shared storage": lambda: (lambda x: {"whole": x, "same": x, "part": x[1:], "turned": x.T})(torch.randn(4, 4)),
    "mixed widths": lambda: {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(3).double(),
        "c": torch.ones(1).half(),
    },
    "with gradients": lambda: {"x": torch.nn.Parameter(torch.randn(3))},
}


class TestRoundTrip:
    @pytest.mark.parametrize("kind", ODD_TENSORS)
    def test_tensors_come_back_bit_for_bit(self, folder: Path, kind: str) -> None:
        tensors = ODD_TENSORS[kind]()
        with Session.open(folder) as session:
            session.branch().append({}, tensors, None, (tensors, {"n": [1, None, "é"]}))
        with Session.open(folder, read_only=True) as session:
            snapshot = session.branch().snapshot_at_or_before(4)
            assert snapshot is not None
            assert (snapshot[0], snapshot[2]) == (4, {"n": [1, None, "é"]})
            for found in (session.branch().latents(3), snapshot[1]):
                assert found.keys() == tensors.keys()
                assert all(same_bits(found[name], tensors[name]) for name in tensors)

    def test_objects_are_what_the_safetensors_library_reads(self, folder: Path) -> None:
        for path in (folder / "objects").glob("*.safetensors"):
            assert load_file(path)["latents"].shape == (1, 2, 3)

    def test_wide_numbers_are_aligned_in_the_file(self, folder: Path) -> None:
        store = ObjectStore(folder / "states")
        content = store.path(store.put_tensors(ODD_TENSORS["mixed widths"]())).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert length % 8 == 0
        assert [header[name]["data_offsets"][0] % size for name, size in (("a", 1), ("b", 8), ("c", 2))] == [0, 0, 0]

    def test_values_come_back_as_json_holds_them(self, folder: Path) -> None:
        with Session.open(folder) as session:
            session.branch().append({"sink": (0, 1), "similarity": 0.1 + 0.2, "prompt": "\udcff漢\n"}, {})
            assert list(session.branch().chunks(3)) == [
                {"sink": [0, 1], "similarity": 0.1 + 0.2, "prompt": "\udcff漢\n"}
            ]
            assert session.branch().segment(3) is None
            assert session.branch().segment(0) == b"frames 0"

    @pytest.mark.parametrize(
        ("values", "tensors"),
        [
            ({"x": float("nan")}, {}),
            ({"x": torch.zeros(1)}, {}),
            ({}, {"x": torch.zeros(2).to_sparse()}),
            ({}, {"x": torch.zeros(2, dtype=torch.complex64)}),
            ({}, {"x": torch.zeros(2, device="meta")}),
            ({}, {"__metadata__": torch.zeros(2)}),
        ],
    )
    def test_what_cannot_be_saved_is_refused_and_changes_nothing(
        self, folder: Path, values: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        before = files(folder)
        with Session.open(folder) as session:
            with pytest.raises(UserError):
                session.branch().append(values, tensors)
            with pytest.raises(UserError):
                session.branch().append({}, {}, None, (tensors, values))
            assert numbers(session.branch()) == [0, 1, 2]
            session.collect()  # of the second try the empty latents were saved
        assert files(folder) == before

    def test_chunks_that_there_are_not_are_refused(self, folder: Path) -> None:
        with Session.open(folder, read_only=True) as session:
            branch = session.branch()
            for read in (lambda: branch.latents(3), lambda: branch.segment(-1), lambda: branch.chunks(2, 4)):
                with pytest.raises(UserError, match="has 3 chunks"):
                    read()
            assert [values["number"] for values in branch.chunks(1, 2)] == [1]
            assert list(branch.chunks(3)) == []


class TestStates:
    def test_the_last_states_are_kept_and_some_for_good(self, folder: Path) -> None:
        with Session.open(folder, keep_snapshots=2, snapshot_every=4) as session:
            branch = session.branch()
            for number in range(3, 11):
                add(branch, number)
                assert len(list((folder / "states").iterdir())) == len(branch.snapshots)
            assert branch.snapshots == (4, 8, 10, 11)
            for wanted, found in ((3, None), (4, 4), (7, 4), (9, 8), (10, 10), (99, 11)):
                snapshot = branch.snapshot_at_or_before(wanted)
                assert (None if snapshot is None else snapshot[0]) == found
                if snapshot is not None:
                    assert torch.equal(snapshot[1]["key"], state_of(snapshot[0] - 1)[0]["key"])

    def test_a_state_that_another_branch_needs_stays(self, folder: Path) -> None:
        with Session.open(folder) as session:
            fork = session.new_branch("fork")
            add(session.branch(), 3)
            assert (session.branch().snapshots, fork.snapshots) == ((4,), (3,))
            assert numbers(fork) == [0, 1, 2]
            add(fork, 4)
            assert len(list((folder / "states").iterdir())) == 2

    def test_a_state_equal_to_some_latents_takes_nothing_with_it(self, folder: Path) -> None:
        with Session.open(folder) as session:
            for _ in range(3):
                session.branch().append({}, {}, None, ({}, {}))
            session.branch().append({}, {}, None, state_of(1))
            assert session.branch().latents(3) == {}
            assert session.branch().snapshots == (7,)

    @pytest.mark.parametrize("rule", [{"keep_snapshots": 0}, {"snapshot_every": 0}])
    def test_a_rule_that_keeps_nothing_is_refused(self, folder: Path, rule: dict[str, int]) -> None:
        with pytest.raises(UserError, match="at least 1"):
            Session.open(folder, **rule)


class TestBranches:
    def test_a_branch_costs_one_small_file(self, folder: Path) -> None:
        with Session.open(folder) as session:
            before = files(folder)
            session.new_branch("fork", "main", 2)
            after = files(folder)
            assert after.keys() - before.keys() == {"branches/fork.json"}
            assert len(after["branches/fork.json"]) < 1000
            assert {name: after[name] for name in before} == before
            objects = len(list((folder / "objects").iterdir()))
            add(session.branch("fork"), 2, with_state=False)  # the same chunk as in `main` is the same object
            assert len(list((folder / "objects").iterdir())) == objects
            assert session.branch("fork").parent == Parent("main", 2)
            assert session.rewind("fork", 1).parent == Parent("main", 1)

    def test_branches_go_their_own_ways(self, folder: Path) -> None:
        with Session.open(folder) as session:
            session.new_branch("fork", "main", 2)
            session.new_branch("twig", "fork")
            for number, name in enumerate(("fork", "main", "twig", "fork", "main", "twig"), start=10):
                add(session.branch(name), number)
            session.new_branch("late", "fork", 3)
            add(session.branch("late"), 20)
        branches = {name: chunks for name, (chunks, _) in everything(folder)["branches"].items()}
        assert list(branches) == ["main", "fork", "late", "twig"]
        assert branches["main"] == [0, 1, 2, 11, 14]
        assert branches["fork"] == [0, 1, 10, 13]
        assert branches["twig"] == [0, 1, 12, 15]
        assert branches["late"] == [0, 1, 10, 20]

    @pytest.mark.parametrize("kept", [0, 1, 3])
    def test_a_rewound_branch_goes_on_and_its_branches_keep_what_they_have(self, folder: Path, kept: int) -> None:
        with Session.open(folder) as session:
            session.new_branch("fork")
            session.rewind("main", kept)
            assert session.branch().snapshots == tuple(n for n in (3,) if n <= kept)
            add(session.branch(), 7)
            add(session.branch(), 8)
            session.collect()
        branches = everything(folder)["branches"]
        assert branches["main"][0] == [*range(kept), 7, 8]
        assert branches["fork"][0] == [0, 1, 2]

    def test_undo_and_redo_many_times_writes_over_what_nobody_has(self, folder: Path) -> None:
        with Session.open(folder) as session:
            for number in range(50):
                session.rewind("main", 1)
                add(session.branch(), number)
            (journal,) = (folder / "journals").iterdir()
            assert len(journal.read_bytes().splitlines()) == 2
            before = num_bytes(folder)
            freed = session.collect()
            assert freed > 0
            assert num_bytes(folder) == before - freed
        assert everything(folder)["branches"]["main"][0] == [0, 49]

    def test_sizes_count_every_byte_once(self, folder: Path) -> None:
        with Session.open(folder) as session:
            (alone,) = session.sizes().values()
            assert alone.shared_bytes == 0
            session.new_branch("fork", "main", 2)
            add(session.branch("fork"), 9)
            sizes = session.sizes()
            assert sizes["main"].shared_bytes == sizes["fork"].shared_bytes > 0
            heads = sum(path.stat().st_size for path in [*(folder / "branches").iterdir(), folder / "session.json"])
            total = sizes["main"].own_bytes + sizes["fork"].own_bytes + sizes["fork"].shared_bytes
            assert total == num_bytes(folder) - heads

    @pytest.mark.parametrize("name", ["", "a b", "../x", ".hidden", "end.", "a/b", "x" * 65, "main"])
    def test_names_that_are_taken_or_cannot_be_files_are_refused(self, folder: Path, name: str) -> None:
        before = files(folder)
        with Session.open(folder) as session, pytest.raises(UserError, match="name"):
            session.new_branch(name)
        assert files(folder) == before

    @pytest.mark.parametrize("num_chunks", [-1, 4])
    def test_more_chunks_than_there_are_cannot_be_kept(self, folder: Path, num_chunks: int) -> None:
        before = files(folder)
        with Session.open(folder) as session:
            for change in (session.rewind, lambda name, number: session.new_branch("fork", name, number)):
                with pytest.raises(UserError, match=f"3 finished chunks; cannot keep {num_chunks}"):
                    change("main", num_chunks)
            with pytest.raises(UserError, match=r"no branch 'other' .* it has main"):
                session.branch("other")
        assert files(folder) == before


class TestSettings:
    def test_each_value_that_differs_is_named(self, folder: Path) -> None:
        asked = {**SETTINGS, "seed": 8, "memory": {"sink_frames": 5, "slow_frames": 1}}
        with pytest.raises(UserError) as refusal:
            Session.open(folder, asked)
        line = str(refusal.value)
        assert "seed is 0 there, asked for 8" in line
        assert "memory.sink_frames is 3 there, asked for 5" in line
        assert "memory.fast_frames is 6 there and was not asked for" in line
        assert "memory.slow_frames is not set there, asked for 1" in line
        assert "fps" not in line
        Session.open(folder, {**SETTINGS, "size": (32, 48)}).close()

    def test_a_folder_in_use_is_not_made_a_session(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "main.json").write_text("mine")
        for place, words in (
            (folder, "already"),
            (tmp_path / "other", "not empty"),
            (tmp_path / "other/main.json", "file"),
        ):
            with pytest.raises(UserError, match=words):
                Session.create(place, SETTINGS)
        assert [path.name for path in (tmp_path / "other").iterdir()] == ["main.json"]
        (tmp_path / "empty").mkdir()
        Session.create(tmp_path / "empty", SETTINGS).close()


class TestWriters:
    def test_a_second_writer_is_refused_and_readers_are_not(self, folder: Path) -> None:
        with Session.open(folder) as session:
            with pytest.raises(UserError, match=f"written by process {os.getpid()}"):
                Session.open(folder)
            before = everything(folder)
            with Session.open(folder, read_only=True) as reader:
                branch = reader.branch()
                add(session.branch(), 3)
                assert [values["number"] for values in branch.chunks()] == [0, 1, 2]
                with pytest.raises(UserError, match="is missing"):  # the writer has a newer state
                    branch.snapshot_at_or_before(3)
                for change in (reader.collect, lambda: reader.rewind("main", 1), lambda: add(branch, 4)):
                    with pytest.raises(UserError, match="not open for writing"):
                        change()
            assert everything(folder) != before
        Session.open(folder).close()

    def test_writers_that_are_killed_at_any_instant_leave_whole_chunks(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "tests.support.killed_sessions", str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        counts = json.loads(done.stdout)
        assert counts["operations"] > 50
        assert counts["operations of creating"] > 5
        assert counts["chunks"] > 5


def failing_at(last: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Let operation number `last` of the disk fail; the answer is whether it came to that."""
    done = [0]

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            done[0] += 1
            if done[0] == last + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return operation(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", counted(lambda _: None))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    return lambda: done[0] > last


class TestFullDisk:
    @pytest.mark.parametrize("keep", [1, 5])
    def test_an_append_fails_in_one_line_at_any_operation_and_can_be_repeated(self, folder: Path, keep: int) -> None:
        with Session.open(folder, keep_snapshots=keep) as session:
            session.new_branch("fork", "main", 2)
            branch = session.branch("fork")
            for operation in range(100):
                count = branch.num_chunks
                with pytest.MonkeyPatch.context() as patch:
                    failed = failing_at(operation, patch)
                    try:
                        add(branch, count)
                    except UserError as error:
                        line = str(error)
                    if not failed():
                        break
                assert "No space left on device" in line
                assert "\n" not in line
                assert not list(folder.rglob("*.part"))
                assert numbers(branch) == list(range(branch.num_chunks))
                assert everything(folder)["branches"]["fork"] == (list(range(branch.num_chunks)), branch.snapshots)
                session.collect()
                if branch.num_chunks == count:
                    add(branch, count)
            assert operation > 10
        assert everything(folder)["branches"]["main"][0] == [0, 1, 2]

    @pytest.mark.parametrize("large", ["latents", "segment", "state", "values"])
    def test_a_file_that_cannot_be_written_to_its_end_is_one_line(self, folder: Path, large: str) -> None:
        many = {"x": torch.ones(5000)}
        arguments: dict[str, Any] = {"values": {}, "latents": {}, "segment": None, "state": None}
        arguments[large] = {"latents": many, "segment": b"x" * 9999, "state": (many, {}), "values": {"x": "y" * 9999}}[
            large
        ]
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Session.open(folder) as session:
            before = num_bytes(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            try:
                with pytest.raises(UserError, match="cannot be written: File too large"):
                    session.branch().append(**arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            session.collect()
            assert num_bytes(folder) <= before + 4096  # of the line in the journal, written over next
            add(session.branch(), 3)
        assert everything(folder)["branches"]["main"][0] == [0, 1, 2, 3]

    def test_a_folder_that_cannot_be_made_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot be written: Not a directory"):
            Session.create(tmp_path / "file" / "film", SETTINGS)


@pytest.mark.skipif(sys.platform != "linux", reason="counts of bytes written and read are those of Linux")
def test_an_append_costs_the_same_after_5000_chunks(folder: Path) -> None:
    process = psutil.Process()

    def cost(branch: Branch) -> tuple[int, int]:
        """Characters written and read by 20 appends."""
        before = process.io_counters()
        for _ in range(20):
            add(branch, 1000)
        after = process.io_counters()
        return after.write_chars - before.write_chars, after.read_chars - before.read_chars

    with Session.open(folder) as session:
        branch = session.branch()
        for number in range(3, 10):
            add(branch, number)
        early = cost(branch)
        tracemalloc.start()
        while branch.num_chunks < 5000:
            branch.append({}, {})
        gc.collect()
        kept_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        late = cost(branch)
        assert late[0] == pytest.approx(early[0], rel=0.02)
        assert late[1] == pytest.approx(early[1], rel=0.02, abs=2000)
        assert kept_bytes < 16 * 5000  # 8 bytes a chunk, and room to grow
        assert sum(1 for _ in branch.chunks()) == 5020


def test_threads_that_share_a_session_append_whole_chunks_one_after_the_other(folder: Path) -> None:
    expected = set(range(3, 43))
    with Session.open(folder) as session, ThreadPoolExecutor(8) as pool:
        session.new_branch("other")
        started = threading.Barrier(8)

        def append(number: int) -> None:
            if number < 11:
                started.wait()
            add(session.branch("other" if number % 4 == 0 else "main"), number)

        list(pool.map(append, expected))
    found = everything(folder)["branches"]
    main, other = (found[name][0] for name in ("main", "other"))
    assert main[:3] == other[:3] == [0, 1, 2]
    assert set(main[3:]) == {number for number in expected if number % 4}
    assert set(other[3:]) == {number for number in expected if number % 4 == 0}
    assert len(main) + len(other) == 6 + len(expected)


def test_two_rollouts_cannot_write_chunks_of_the_same_place(folder: Path) -> None:
    with Session.open(folder) as session:
        first, second = session.branch(), session.branch()
        first.append({"number": 3}, {}, index=3)
        with pytest.raises(UserError, match="has 4 chunks and this is chunk 3, counted from 0: somebody else"):
            second.append({"number": 3}, {}, index=3)
        assert second.num_chunks == 4
        second.append({"number": 4}, {}, index=4)


def test_a_second_writer_of_the_same_process_is_refused(folder: Path) -> None:
    with Session.open(folder), pytest.raises(UserError, match=rf"process {os.getpid()} \(this one\); wait for it"):
        Session.open(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
def test_a_fork_of_the_writer_may_not_write(folder: Path) -> None:
    with Session.open(folder) as session:
        child = os.fork()
        if child == 0:
            try:
                add(session.branch(), 3)
            except UserError as error:
                os._exit(7 if "this is a fork of it" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        add(session.branch(), 3)
    assert everything(folder)["branches"]["main"][0] == [0, 1, 2, 3]

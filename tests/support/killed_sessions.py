"""Sessions whose writers are killed; run as a program of its own, because it forks. Prints one line of JSON."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.session_contents import SETTINGS, add, everything, numbers, quick_replace
from vidaccel.errors import UserError
from vidaccel.sessions.session import Session

# What the branches hold after each step of `several_changes`.
STEPS: list[dict[str, list[int]]] = [
    {"main": [0, 1, 2]},
    {"main": [0, 1, 2, 3]},
    {"main": [0, 1, 2, 3], "fork": [0, 1]},
    {"main": [0, 1, 2], "fork": [0, 1]},
    {"main": [0, 1, 2, 4], "fork": [0, 1]},
    {"main": [0, 1, 2, 4], "fork": [0, 1, 5]},
]


def several_changes(folder: Path) -> None:
    """Everything that a writer does, in steps."""
    with Session.open(folder) as session:
        add(session.branch(), 3)
        session.new_branch("fork", "main", 2)
        session.rewind("main", 3)
        add(session.branch(), 4)
        add(session.branch("fork"), 5)
        session.collect()


def die_at(last: int) -> None:
    """From now on end the process, as a kill would, instead of its operation number `last` on files."""
    done = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if done == last:
                os._exit(9)
            done += 1
            return operation(*arguments, **options)

        return call

    os.fsync = counted(lambda _: None)  # a kill leaves what was written; only a power cut needs the real one
    os.replace = counted(os.replace)
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
    Path.open = counted(Path.open)  # type: ignore[method-assign]
    Path.mkdir = counted(Path.mkdir)  # type: ignore[method-assign]


def change_and_die(folder: Path, operation: int) -> None:
    """Change a session up to an operation."""
    die_at(operation)
    several_changes(folder)


def create_and_die(folder: Path, operation: int) -> None:
    """Make a session up to an operation."""
    die_at(operation)
    Session.create(folder, SETTINGS)


def in_a_fork(work: Callable[[], None]) -> int:
    """Run `work` in a child and return its exit code."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def go_on(folder: Path) -> dict[str, list[int]]:
    """What the branches hold, after checking that each can be appended to and that collecting harms nothing."""
    with Session.open(folder, SETTINGS) as session:
        found = {name: numbers(session.branch(name)) for name in session.branches}
        for name in session.branches:
            add(session.branch(name), 99)
        session.collect()
        assert session.unused_bytes() == 0
    after = everything(folder)["branches"]
    assert {name: chunks for name, (chunks, _) in after.items()} == {name: [*old, 99] for name, old in found.items()}
    assert not list(folder.rglob("*.part"))
    return found


def killed_at_every_operation(folder: Path) -> dict[str, int]:
    """Kill `several_changes` before each of its operations; steps are whole and come in order."""
    with Session.create(folder / "base", SETTINGS) as session:
        for number in range(3):
            add(session.branch(), number)
    reached: list[int] = []
    while True:
        copy = folder / f"copy-{len(reached)}"
        shutil.copytree(folder / "base", copy)
        code = in_a_fork(partial(change_and_die, copy, len(reached)))
        reached.append(STEPS.index(go_on(copy)))
        if code == 0:
            break
        assert code == 9, code
    assert reached == sorted(reached)
    assert set(reached) == set(range(len(STEPS)))
    return {"operations": len(reached) - 1}


def killed_while_created(folder: Path) -> dict[str, int]:
    """Kill a creation before each of its operations; it can be done again."""
    for operation in range(1000):
        made = folder / f"created-{operation}"
        code = in_a_fork(partial(create_and_die, made, operation))
        if code == 0:
            return {"operations of creating": operation}
        if not (made / "session.json").exists():
            Session.create(made, SETTINGS).close()
        assert go_on(made) == {"main": []}
    raise AssertionError("it never ended")


def refusal(folder: Path) -> str:
    """Why a session cannot be opened for writing, or nothing."""
    try:
        Session.open(folder).close()
    except UserError as error:
        return str(error)
    return ""


def killed_at_random(folder: Path, *, times: int) -> dict[str, int]:
    """SIGKILL an appending process at random instants; another writer is refused while it lives."""
    Session.create(folder / "random", SETTINGS).close()
    dice = random.Random(0)
    for _ in range(times):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with Session.open(folder / "random", SETTINGS) as session:
                branch = session.branch()
                os.write(writer, b"open")
                while True:
                    add(branch, branch.num_chunks)
        os.read(reader, 4)
        assert f"process {child}" in refusal(folder / "random")
        time.sleep(dice.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with Session.open(folder / "random", SETTINGS) as session:
            count = session.branch().num_chunks
            assert numbers(session.branch()) == list(range(count))
    return {"chunks": count}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    os.fsync = lambda _: None  # see `die_at`
    found = killed_at_random(place, times=12)
    os.replace = quick_replace
    found |= killed_at_every_operation(place) | killed_while_created(place)
    sys.stdout.write(json.dumps(found))

"""Chunks that follow from one number, and everything a session holds, for the tests of sessions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidaccel.sessions.branch import Branch
from vidaccel.sessions.session import Session

SETTINGS = {"model": "0123abcd", "seed": 0, "size": [32, 48], "memory": {"sink_frames": 3, "fast_frames": 6}, "fps": 16}


def quick_replace(source: str | Path, target: str | Path) -> None:
    """`os.replace` that takes two steps: ext4 brings a file that replaces another to disk, and tests need not wait."""
    Path(target).unlink(missing_ok=True)
    os.rename(source, target)


def do_not_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is there for every process at once; only a power cut needs the waiting."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "replace", quick_replace)


def state_of(number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An exact state that follows from a number."""
    return {"key": torch.full((2, 3), number, dtype=torch.bfloat16)}, {"number": number}


def add(branch: Branch, number: int, *, with_state: bool = True) -> None:
    """Append the chunk that follows from a number."""
    branch.append(
        {"number": number, "prompt": f"prompt {number}", "num_pixel_frames": 12 if branch.num_chunks else 9},
        {"latents": torch.full((1, 2, 3), number, dtype=torch.float32)},
        f"frames {number}".encode(),
        state_of(number) if with_state else None,
    )


def make(folder: Path, *chunks: int) -> Path:
    """A session with these chunks on its branch `main`, and the exact state after the last."""
    with Session.create(folder, {**SETTINGS, "seed": chunks[0]}) as session:
        for number in chunks:
            add(session.branch(), number)
    return folder


def numbers(branch: Branch) -> list[int]:
    """The numbers of the chunks of a branch, each chunk and the last exact state checked against its number."""
    found = [values["number"] for values in branch.chunks()]
    for index, number in enumerate(found):
        assert torch.equal(branch.latents(index)["latents"], torch.full((1, 2, 3), float(number)))
        assert branch.segment(index) == f"frames {number}".encode()
    snapshot = branch.snapshot_at_or_before(branch.num_chunks)
    if snapshot is not None:
        num_chunks, tensors, values = snapshot
        assert values == {"number": found[num_chunks - 1]}
        assert torch.equal(tensors["key"], state_of(values["number"])[0]["key"])
    return found


def everything(folder: Path) -> dict[str, Any]:
    """All that can be read of a session without its lock."""
    with Session.open(folder, read_only=True) as session:
        branches = {name: (numbers(session.branch(name)), session.branch(name).snapshots) for name in session.branches}
        return {"settings": session.settings, "branches": branches}


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file of a session but the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }

"""Files and folders that are whole or not there: written beside their final name, then renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from vidaccel.errors import UserError, first_line


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name beside `path` (same suffix) that becomes `path` if the block ends well, and is removed if it does not.

    Raises UserError where the folder cannot be made or written.
    """
    with temporary_sibling(path, path.suffix) as unfinished:
        yield unfinished
        os.replace(unfinished, path)


@contextmanager
def temporary_sibling(path: Path, suffix: str) -> Iterator[Path]:
    """A name beside `path` for the time of the block; its file is removed at the end, and those of killed processes.

    Raises UserError, that `path` cannot be written, for an OSError in the block too.
    """
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.part{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftover_files(path, suffix)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        yield unfinished
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or first_line(error)}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_leftover_files(path: Path, suffix: str) -> None:
    """Remove what processes that were killed while they wrote `path` could not remove themselves."""
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.(\d+)\.part{re.escape(suffix)}")
    for file in path.parent.iterdir():
        found = pattern.fullmatch(file.name)
        if found and not psutil.pid_exists(int(found[1])):
            file.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place if the block ends well, and is removed if it does not.

    Raises `UserError` where it cannot be made, and for a path such as "." that ends in no name. What stood there before
    is kept until the new one is complete.
    """
    if not path.name:
        raise UserError(f"{path} cannot be written: give the name of a folder.")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        unfinished.mkdir()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        yield unfinished
        if path.exists():
            path.rename(replaced)
        unfinished.rename(path)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def check_model_folder(output: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Raise `UserError` unless the diffusers folder `output` may be made, or replaced, from what lies in `sources`.

    What holds a source, and what is no diffusers folder, is never replaced.
    """
    if not output.name:
        raise UserError(f"`--output` must name a folder, got {str(output)!r}.")
    for path in sources:
        if path.resolve().is_relative_to(output.resolve()):
            raise UserError(f"{output} holds {path}, which it is made from; give another --output.")
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output} exists; give --overwrite or another --output.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "model_index.json").is_file()):
        raise UserError(f"{output} is no diffusers folder, so it is not replaced; give another --output.")


def _remove_leftovers(path: Path) -> None:
    """Tidy up after processes that were killed while they wrote `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(part|old)")
    for folder in path.parent.iterdir():
        found = pattern.fullmatch(folder.name)
        if not found or psutil.pid_exists(int(found[1])):
            continue
        if found[2] == "old" and not path.exists():  # killed between taking the old away and putting the new there
            folder.rename(path)
        shutil.rmtree(folder, ignore_errors=True)

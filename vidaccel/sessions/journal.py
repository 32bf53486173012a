"""An append-only file of JSON records, one a line: `SHA256 JSON`, each sha256 taken over the one before and the JSON.

So each line vouches for all lines before it, and whoever knows how many lines count and the sha256 of the last one
can tell a whole journal from one that was cut, changed or exchanged. Lines beyond those that count are left over from
an append that did not end, or from chunks that were given up; the next append cuts them off.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vidaccel.errors import UserError

_DIGEST_LENGTH = 64


class Journal:
    """The records of one file. In memory: where each verified line ends, 8 bytes a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ends = array("q")

    def verify(self, num_lines: int, digest: str) -> None:
        """Check that the first `num_lines` lines are whole and that the last of them has this sha256.

        Raises UserError for a file that is missing, cut, changed or another one.
        """
        with self._open() as file:
            known = len(self._ends)
            previous = self._digest(file, known)
            file.seek(self._end(known))
            while len(self._ends) < num_lines:
                previous, _ = self._parse(file.readline(), previous)
                self._ends.append(file.tell())
            if self._digest(file, num_lines) != digest:
                raise self._damaged()

    def digest(self, num_lines: int) -> str:
        """The sha256 of line `num_lines`, counted from 1, of those verified."""
        with self._open() as file:
            return self._digest(file, num_lines)

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The records start, ..., stop - 1, counted from 0, of those verified; checked again as they are read."""
        with self._open() as file:
            previous = self._digest(file, start)
            file.seek(self._end(start))
            for _ in range(start, stop):
                previous, body = self._parse(file.readline(), previous)
                yield json.loads(body)

    def append(self, num_lines: int, record: Mapping[str, Any]) -> str:
        """Write a record after the first `num_lines` lines, cut what follows them, and return the line's sha256.

        The line is on disk when this returns. Raises OSError of the disk.
        """
        del self._ends[num_lines:]
        body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        with self.path.open("r+b") as file:
            digest = _chained(self._digest(file, num_lines), body)
            file.seek(self._end(num_lines))
            file.truncate()
            file.write(digest.encode() + b" " + body + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._ends.append(file.tell())
        return digest

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}; restore it from a copy.") from error

    def _end(self, num_lines: int) -> int:
        return self._ends[num_lines - 1] if num_lines else 0

    def _digest(self, file: BinaryIO, num_lines: int) -> str:
        if not num_lines:
            return ""
        file.seek(self._end(num_lines - 1))
        return file.read(_DIGEST_LENGTH).decode("ascii", errors="replace")

    def _parse(self, line: bytes, previous: str) -> tuple[str, bytes]:
        body = line[_DIGEST_LENGTH + 1 : -1]
        digest = _chained(previous, body)
        if line != digest.encode() + b" " + body + b"\n":
            raise self._damaged()
        return digest, body

    def _damaged(self) -> UserError:
        return UserError(f"{self.path} is damaged: its lines are not those that were written; restore it from a copy.")


def _chained(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + b" " + body).hexdigest()

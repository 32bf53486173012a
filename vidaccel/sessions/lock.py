"""One writer a folder: a lock file with the writer's process id, held by the operating system.

The system drops the lock when its process ends, however it ends, so that nothing has to be cleaned up after a kill
and no process id that was given out again can be mistaken for the writer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vidaccel.errors import UserError

LOCK_FILE = "lock"
_WINDOWS_OFFSET = 2**30  # a locked byte cannot be read there, and the process id should be


class WriterLock:
    """The right to write in `folder`, until `close` or the end of the process.

    Raises UserError where another writer has it, with its process id, and OSError where the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder, os.getpid()
        path = folder / LOCK_FILE
        path.touch()
        self._file = path.open("r+", encoding="utf-8")
        try:
            _lock(self._file.fileno())
        except BlockingIOError as error:
            owner = self._file.read(32).strip() or "unknown"
            self._file.close()
            own = " (this one)" if owner == str(self._process) else ""
            raise UserError(f"{folder} is being written by process {owner}{own}; wait for it or end it.") from error
        except OSError:
            self._file.close()
            raise
        self._file.write(f"{self._process:<20}\n")
        self._file.flush()

    def check_process(self) -> None:
        """Raise UserError in a process that was forked from the writer, which shares the lock without the right."""
        if os.getpid() != self._process:
            raise UserError(
                f"{self._folder} was opened by process {self._process} and this is a fork of it; open it here."
            )

    def close(self) -> None:
        """Give the right back."""
        self._file.close()


def _lock(descriptor: int) -> None:
    """Lock the open file or raise BlockingIOError; two openings within one process exclude each other too."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _WINDOWS_OFFSET, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

"""Command line: `vidaccel generate | rollout | session | compare | convert | models | bench | train`.

`main` is the one place where an error of the user becomes one line on stderr and exit code 2.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence

from vidaccel.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 an error of the user in one line, 130 interrupted, 143 terminated."""
    # Before PyTorch is loaded: sessions go on to the same bits also where MKL would round by the place of a tensor.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # prompts have letters that some terminals and pipes lack
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from vidaccel.cli.app import USAGE_ERRORS, app
    from vidaccel.cli.console import quieten_libraries, say_error, set_up_messages

    set_up_messages()
    quieten_libraries()  # before their import: they talk while they are imported
    try:
        code = app(args=list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
    except UserError as error:
        say_error(str(error))
        return 2
    except USAGE_ERRORS as error:
        if text := error.format_message():  # empty where the help was shown instead
            say_error(text)
        return 2
    except OSError as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        say_error(f"{error.strerror}{f': {str(error.filename)[:80]}' if error.filename else ''}; {remedy}.")
        return 2
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        say_error("interrupted; the same command goes on, that of a rollout with --checkpoint if --resume is added.")
    return code if isinstance(code, int) else 0


def _remedy(error: OSError) -> str | None:
    """What to do about an error of the disk or of a name; None for one that is not the user's."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "make room and run it again"
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return "give another name"
    return "let it be read and written, or give another name" if isinstance(error, PermissionError) else None


def _terminate(number: int, frame: object) -> None:
    """End as Ctrl-C does, with half-written files removed; schedulers of clusters stop a job this way."""
    sys.exit(128 + number)

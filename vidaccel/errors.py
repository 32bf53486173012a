"""The one error that is the user's to solve; the command line prints it as one line and exits with code 2."""


class UserError(ValueError):
    """A wrong value, file or machine: the message names what was got, what is accepted and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or its class name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

"""The one error that is the user's to solve; the command line prints it as one line and exits with code 2."""


class UserError(ValueError):
    """A wrong value, file or machine: the message names what was got, what is accepted and what to do."""

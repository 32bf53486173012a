"""Command line: `vidaccel generate | compare | models | bench | train`."""


def main() -> None:
    """Run the command line."""
    raise SystemExit("vidaccel: the command line is not there yet")

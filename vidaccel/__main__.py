"""`python -m vidaccel` is the same as the `vidaccel` command."""

from vidaccel.cli import main

if __name__ == "__main__":
    main()

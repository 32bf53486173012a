"""What stands in a file that should hold weights and does not, and the word of the error that says so."""

from __future__ import annotations

from collections.abc import Iterator


def broken_contents(whole: bytes) -> Iterator[tuple[bytes, str]]:
    """Contents made of those of a whole safetensors file, each with a word that its refusal must have."""
    yield whole[:-100], "truncated"
    yield whole[:5], "truncated"
    yield b"", "truncated"
    yield b"<html>not found</html>" * 9, "truncated or no safetensors"
    yield b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"
    yield b"PK\x03\x04" + bytes(200), "pickled"

"""The tokenizer that belongs to a text encoder: beside its weights, or in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vidaccel.errors import UserError, first_line

_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json")


def find_tokenizer(folder: Path, *, component: str, paths: Sequence[Path]) -> Path:
    """The folder of the tokenizer of the text encoder in `folder`.

    Looked for beside the encoder's weights; then beside its folder, as `tokenizer_2` lies beside `text_encoder_2` in
    a diffusers folder; then in the given folders, `tokenizer` or `tokenizer_2` there by the component's name.
    Raises `UserError` where there is none.
    """
    names = dict.fromkeys(name.replace("text_encoder", "tokenizer") for name in (folder.name, component))
    candidates = [folder, *(folder.parent / name for name in names), *(path / name for path in paths for name in names)]
    for candidate in candidates:
        if any((candidate / name).is_file() for name in _FILES):
            return candidate
    raise UserError(
        f"{folder} has a text encoder and no tokenizer ({', '.join(_FILES)}) in it or beside it; put it there."
    )


def save_tokenizer(source: Path, target: Path) -> str:
    """Load the tokenizer in `source`, write it to `target`, and return the name of its class.

    Raises `UserError` if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(f"The tokenizer in {source} cannot be loaded ({first_line(error)}).") from error
    tokenizer.save_pretrained(target)
    return type(tokenizer).__name__

"""Tokenizers made on the spot: a vocabulary of single bytes or characters, no merges, no file to download.

Any prompt gives tokens, and another prompt gives others. Each is of the class its pipeline asks for, saved and loaded
like a real one.
"""

import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

from vidaccel.catalog.pipelines import named_class

_LETTERS = tuple(letter for letter in string.printable if not letter.isspace())
_WORD_START = "\u2581"  # SentencePiece writes a space so
_LLAMA_MARKS = (
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"),
    *("system", "user", "assistant", "\n\n"),
)


def t5_tokenizer() -> Any:
    """A `T5Tokenizer` (T5, UMT5) with one token a printable ASCII character and `<unk>` for all others."""
    from transformers import T5Tokenizer

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (_WORD_START, -2.0)]
    return T5Tokenizer(vocab=[*marks, *((letter, -2.0) for letter in _LETTERS)], extra_ids=0)


def clip_tokenizer() -> Any:
    """A `CLIPTokenizer` with one token a byte, and another for the byte that ends a word; 77 tokens at most."""
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    vocabulary = _numbered(("<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)))
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def llama_tokenizer(*, template: str | None = None) -> Any:
    """A `LlamaTokenizer` with one token a byte and the marks of Llama-3's chat format.

    template: `module:NAME` of a pipeline's prompt template, a dict of `template` and `crop_start`. The words before
        the prompt become exactly `crop_start` tokens, so that the pipeline cuts them off where it means to.
    """
    from transformers import LlamaTokenizer

    start = [] if template is None else [_template_start(named_class(template))]
    marks = ("<|begin_of_text|>", "<|end_of_text|>", "<pad>", "<unk>", _WORD_START)
    return LlamaTokenizer(
        vocab=_numbered((*marks, *_byte_tokens())),
        merges=[],
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        unk_token="<unk>",
        pad_token="<pad>",
        add_bos_token=True,
        padding_side="right",
        additional_special_tokens=[*_LLAMA_MARKS, *start],
    )


def gemma_tokenizer() -> Any:
    """A `GemmaTokenizer` with one token a byte; it begins with `<bos>`."""
    from transformers import GemmaTokenizer

    marks = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", _WORD_START)
    return GemmaTokenizer(vocab=_numbered((*marks, *_byte_tokens())), merges=[], add_bos_token=True)


def qwen2_tokenizer(*, head_tokens: int = 3, marks: Sequence[str] = ()) -> Any:
    """A `Qwen2Tokenizer` with one token a byte.

    head_tokens: tokens its chat template puts before what the user says; pipelines cut that many off.
    marks: further special tokens, such as `<|image_pad|>`.
    """
    from transformers import Qwen2Tokenizer

    head = f"{{{{ '<|im_start|>' * {head_tokens} }}}}"
    return Qwen2Tokenizer(
        vocab=_numbered(("<|endoftext|>", *_byte_letters())),
        merges=[],
        padding_side="right",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *marks],
        chat_template=f"{head}{{{{ messages[-1]['content'] }}}}<|im_end|>",
    )


def byt5_tokenizer() -> Any:
    """A `ByT5Tokenizer`; it needs no vocabulary."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=0)


def _template_start(template: dict[str, Any]) -> str:
    """The piece of the text before `{}` that has to be one token so that all of that text is `crop_start` tokens.

    The marks are tokens already, and what follows the piece is a token a letter.
    """
    head = template["template"].partition("{}")[0]
    parts = [part for part in re.split("|".join(f"({re.escape(mark)})" for mark in _LLAMA_MARKS), head) if part]
    longest = max((part for part in parts if part not in _LLAMA_MARKS), key=len)
    others = 1 + sum(1 if part in _LLAMA_MARKS else len(part) for part in parts if part is not longest)
    return longest[: len(longest) - (template["crop_start"] - others - 1)]


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _byte_letters() -> list[str]:
    """The 256 letters that byte-level vocabularies (GPT-2, CLIP, Qwen) write bytes with, in byte order.

    Bytes that are visible in Latin-1 stand for themselves, the others are the characters from U+0100 on.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _byte_tokens() -> list[str]:
    """The 256 tokens SentencePiece falls back on, `<0x00>` to `<0xFF>`."""
    return [f"<0x{byte:02X}>" for byte in range(256)]

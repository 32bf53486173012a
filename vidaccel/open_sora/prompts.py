"""What Open-Sora 1.2 makes of a prompt: one text per clip of a long video, scores at its end, and cleaning."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Sequence
from typing import Any

from vidaccel.errors import UserError
from vidaccel.machine.private_names import clean_caption

_SEGMENT = re.compile(r"\|(\d+)\|")


def clip_texts(prompt: str | Sequence[str] | None, num_loops: int, *, clean: bool, **scores: Any) -> list[list[str]]:
    """For every clip the texts of the batch, ready for the text encoder; empty where there is no prompt.

    scores: as `with_scores` takes them.
    """
    prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
    by_prompt = [loop_prompts(one, num_loops) for one in prompts]

    def finished(text: str) -> str:
        scored = with_scores(text, **scores)
        return cleaned(scored) if clean else scored

    return [[finished(texts[loop]) for texts in by_prompt] for loop in range(num_loops)]


def loop_prompts(prompt: str, num_loops: int) -> list[str]:
    """The text of every clip: "|0|a|2|b" is "a" for clips 0 and 1 and "b" from clip 2 on.

    A prompt that does not begin with |0| is the text of all clips, as it is.
    Raises `UserError` where the numbers of the clips do not rise.
    """
    if not prompt.startswith("|0|"):
        return [prompt] * num_loops
    pieces = _SEGMENT.split(prompt)[1:]
    starts = [int(start) for start in pieces[::2]]
    if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        raise UserError(f"The clips a prompt is divided into (|0|..., |2|...) must rise; got {starts} in {prompt!r}.")
    texts = dict(zip(starts, (text.strip() for text in pieces[1::2]), strict=True))
    return [texts[max(start for start in starts if start <= loop)] for loop in range(num_loops)]


def with_scores(
    text: str,
    *,
    aesthetic_score: float | None = 6.5,
    motion_score: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """The text followed by the scores that are given and that it does not already name."""
    if aesthetic_score is not None and "aesthetic score:" not in text:
        text += f" aesthetic score: {aesthetic_score:.1f}."
    if motion_score is not None and "motion score:" not in text:
        text += f" motion score: {motion_score:.1f}."
    if camera_motion is not None and "camera motion:" not in text:
        text += f" camera motion: {camera_motion}."
    return text


def cleaned(text: str) -> str:
    """The caption cleaning of DeepFloyd IF and PixArt, twice, as the model was trained with; diffusers has it.

    Raises `UserError` where one of the two packages it needs is missing.
    """
    for module, package in (("ftfy", "ftfy"), ("bs4", "beautifulsoup4")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"Cleaning prompts needs {package}: pip install {package}, or pass clean_caption=False.")
    for _ in range(2):
        text = clean_caption(text)
    return text

"""The timelines that README and docs show: text blocks whose lines begin with a time, and how long they are played."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vidaccel.world import vocabulary

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
_FIRST = re.compile(r"(?:#[^\n]*\n|\s*\n)*0(?::00)?(?:\s+\|\s+\w+\s+\|)?\s+[a-z]")
_NAME = re.compile(r"# (\S+)\n")  # a block's first line names its file
_SECONDS = re.compile(r"vidaccel rollout [^\n]*--timeline (\S+)[^\n]*--seconds (\d+)")
_AFTER_LAST = 6  # seconds, where a page does not say how long the video is


@dataclass(frozen=True)
class ShownTimeline:
    """A timeline of a page, played for as long as the command with its file says, or six seconds past its last line."""

    page: str
    text: str
    seconds: float

    @property
    def is_of_the_world(self) -> bool:
        """Whether its prompts are in the words of the storybook world."""
        lines = [line.split("|")[-1] for line in self.text.splitlines() if not line.startswith("#")]
        prompts = " ".join(line for line in lines if not re.search(r"\b(left|right) [\d.]+$", line))
        return set(re.findall(r"[a-z]+", prompts)) <= set(vocabulary())


def shown_timelines() -> list[ShownTimeline]:
    """All of README.md and docs, in the order of the pages."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [one for page in pages for one in _timelines_of(page)]


def _timelines_of(page: Path) -> list[ShownTimeline]:
    text = page.read_text(encoding="utf-8")
    said = {file: float(seconds) for file, seconds in _SECONDS.findall(text)}
    found = [block for block in _BLOCK.findall(text) if _FIRST.match(block)]
    name = str(page.relative_to(ROOT))
    return [ShownTimeline(name, block, said.get(_file_of(block), _last_start(block) + _AFTER_LAST)) for block in found]


def _file_of(block: str) -> str:
    named = _NAME.match(block)
    return named[1] if named else ""


def _last_start(block: str) -> float:
    starts = re.findall(r"^(?:(\d+):)?(\d+(?:\.\d+)?)", block, flags=re.MULTILINE)
    return max(60 * int(minutes or 0) + float(seconds) for minutes, seconds in starts)

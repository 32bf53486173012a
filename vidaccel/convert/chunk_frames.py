"""How many latent frames a causal student makes at once: what says so beside its weights, else what is published.

The weights do not tell: a student of one frame a chunk has the names and shapes of one of three. What does, as far as
it is known: `num_frame_per_block` of the training's YAML files (Self-Forcing and the codes made from it; LongLive 2.0
under `model_kwargs`) and `num_frames_per_block` of FastVideo's `config.json`. Self-Forcing's own `config.json` has
neither, and no trainer writes its YAML beside the weights, so it has to be put there. Causal Forcing publishes the
frame-wise weights in a folder `framewise`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vidaccel.convert.checkpoint import read_json
from vidaccel.convert.students import letters
from vidaccel.errors import UserError

_NAMES = ("num_frame_per_block", "num_frames_per_block")
_LINE = re.compile(r"^[ \t]*(num_frames?_per_block)[ \t]*:[ \t]*([^\s#]+)", re.MULTILINE)
_FRAMEWISE = "framewise"


@dataclass(frozen=True, kw_only=True)
class ChunkFrames:
    """A number of latent frames and who says so, for people."""

    number: int
    source: str


def chunk_frames(weights: Sequence[Path], *, given: int | None, published: ChunkFrames | None) -> ChunkFrames:
    """Latent frames of a chunk of the student whose weights lie at `weights`.

    given: what the user says; it comes first. Then what stands in `config.json` and YAML files beside the weights and
    in the names of file and folder, then `published`; None where that is not known.
    Raises UserError where two of these files and names say different numbers, where a file says none, and where
    nothing says one.
    """
    if given is not None:
        if given < 1:
            raise UserError(f"`--chunk-frames` must be at least 1 latent frame, got {given}.")
        return ChunkFrames(number=given, source="--chunk-frames")
    told = [found for path in weights for found in _told_beside(path)]
    for other in told[1:]:
        if other.number != told[0].number:
            raise UserError(
                f"{told[0].source} says {told[0].number} latent frames a chunk and {other.source} says {other.number}; "
                "give --chunk-frames."
            )
    if told:
        return told[0]
    if published is None:
        raise UserError(
            f"Nothing says how many latent frames a chunk of {weights[0]} has; give --chunk-frames "
            "(`num_frame_per_block` in the configuration of its training)."
        )
    return published


def _told_beside(weights: Path) -> Iterator[ChunkFrames]:
    folder = weights.absolute().parent
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else {}
    for name in _NAMES:
        if name in values:
            yield _number(json.dumps(values[name]), config, name)
    for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
        for found in _LINE.finditer(path.read_text(encoding="utf-8", errors="replace")):
            yield _number(found[2], path, found[1])
    for place in (weights.name, folder.name):
        if _FRAMEWISE in letters(place):
            yield ChunkFrames(number=1, source=f"{_FRAMEWISE!r} in the name {place}")


def _number(text: str, path: Path, name: str) -> ChunkFrames:
    if not re.fullmatch(r"0*[1-9][0-9]{0,3}", text):
        raise UserError(f"{path} says `{name}` {text}, which is no number of latent frames; give --chunk-frames.")
    return ChunkFrames(number=int(text), source=path.name)

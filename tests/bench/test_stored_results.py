"""The results in docs/ are read by the code of today: it makes the same tables of them, and takes their protocols."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from vidaccel.bench.caching.cache_tables import caches_markdown
from vidaccel.bench.caching.comparison import DEFAULTS
from vidaccel.bench.caching.tables import easycache_markdown
from vidaccel.bench.commands import commands_markdown
from vidaccel.bench.endless.tables import endless_markdown
from vidaccel.bench.offline.tables import offline_markdown
from vidaccel.bench.quality import quality_markdown
from vidaccel.bench.recall.tables import recall_markdown
from vidaccel.bench.rollout.tables import rollout_markdown
from vidaccel.bench.skipping.tables import skipping_markdown
from vidaccel.bench.speed import speed_markdown
from vidaccel.bench.table import BENCHMARKS, benchmark_class

ROOT = Path(__file__).resolve().parents[2]
STORED = [path for path in sorted((ROOT / "docs" / "results").rglob("*.json")) if path.stem in BENCHMARKS]


def easycache(content: Mapping[str, Any]) -> str:
    methods = content["summary"]["methods"]
    ours = [method for method in methods if method["family"].startswith("EasyCache")]
    detailed = [method["method"] for method in ours if method["parameter"] == DEFAULTS.threshold]
    return easycache_markdown(content, detailed=detailed)


MARKDOWN: Mapping[str, Callable[[Any], str]] = {
    "caches": caches_markdown,
    "commands": commands_markdown,
    "easycache": easycache,
    "endless": endless_markdown,
    "offline": offline_markdown,
    "quality": quality_markdown,
    "recall": recall_markdown,
    "rollout": rollout_markdown,
    "skipping": skipping_markdown,
    "speed": speed_markdown,
}
OF_AN_EARLIER_FORM = ("speed-h200",)  # before peaks of memory were written down
ALIKE = [path for path in STORED if path.stem in MARKDOWN and path.parent.name not in OF_AN_EARLIER_FORM]


@pytest.mark.parametrize("path", ALIKE, ids=lambda path: path.parent.name)
def test_the_stored_table_is_made_again_word_for_word(path: Path) -> None:
    assert MARKDOWN[path.stem](json.loads(path.read_text())) == path.with_suffix(".md").read_text()


@pytest.mark.parametrize("path", ALIKE, ids=lambda path: path.parent.name)
def test_what_a_benchmark_records_of_its_options_is_in_the_stored_protocol(path: Path) -> None:
    recorded = {one.name for one in fields(benchmark_class(path.stem)) if one.metadata["recorded"]}
    assert recorded <= json.loads(path.read_text())["protocol"].keys()

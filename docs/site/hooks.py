"""What the site adds to the pages: links into the code, root files as pages, the table of families, a last check."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocstrings import Inventory

import vidaccel
from vidaccel.catalog.families.checks import CHECKS
from vidaccel.catalog.families.family import Family
from vidaccel.catalog.presets import PRESETS
from vidaccel.catalog.table import CATALOG

ROOT = Path(__file__).resolve().parents[2]
# Pages whose text is a file at the top of the repository; the glossary is the last part of one.
ROOT_PAGES = {"glossary.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_GLOSSARY = "\n## Glossary\n"
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The text of a page, with links that leave `docs/` turned into links to the repository."""
    source = page.file.src_uri
    folder = posixpath.join("docs", posixpath.dirname(source))
    if source in ROOT_PAGES:
        markdown = root_page(source)
        folder = ""
    if source == "families.md":
        markdown = markdown.replace("<!-- families -->", families()).replace("<!-- settings -->", settings())
    return with_links(markdown, folder=folder, page_folder=posixpath.dirname(source), repository=config.repo_url)


def root_page(source: str) -> str:
    """The text of a page of `ROOT_PAGES`."""
    text = (ROOT / ROOT_PAGES[source]).read_text(encoding="utf-8")
    if ROOT_PAGES[source] != "CONTRIBUTING.md":
        return text
    rest, _, glossary = text.partition(_GLOSSARY)
    return f"# Glossary\n{glossary}" if source == "glossary.md" else rest.replace("(#glossary)", "(docs/glossary.md)")


def with_links(markdown: str, *, folder: str, page_folder: str, repository: str) -> str:
    """`markdown` with every link from `folder` of the repository as the page in `page_folder` of the site needs it."""

    def replaced(found: re.Match[str]) -> str:
        before, target, anchor, after = found[1], found[2], found[3] or "", found[4]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        pages = {file: page for page, file in ROOT_PAGES.items()}
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in pages:
            path = posixpath.join("docs", pages[path])
        if path.startswith("docs/") and Path(path).suffix in (".md", ".png", ".webp", ".gif"):
            return before + posixpath.relpath(path, posixpath.join("docs", page_folder)) + anchor + after
        return f"{before}{repository}/blob/main/{path}{anchor}{after}"

    return _LINK.sub(replaced, markdown)


def families() -> str:
    """Every row of the family table, as a table and its remarks."""
    lines = ["| family | pipeline | takes | EasyCache |", "|---|---|---|---|"]
    lines += map(_row, CATALOG.families)
    lines += ["", "## What is tested", "", "| check | what holds |", "|---|---|"]
    lines += [f"| {name} | {sentence} |" for name, sentence in CHECKS.items()]
    lines += ["", "## What is not, and why", ""]
    for family in CATALOG.families:
        if family.untested:
            lines.append(
                f"- `{family.name}`: " + "; ".join(f"*{name}*: {why}" for name, why in family.untested.items())
            )
    return "\n".join(lines)


def settings() -> str:
    """The published settings of EasyCache with their sources."""
    lines = ["| model | threshold | warm-up steps | source |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.threshold:g} | {row.warmup_steps} | {row.source} |" for row in PRESETS]
    return "\n".join(lines)


def _row(family: Family) -> str:
    inputs = ", ".join(("prompt", *(name.replace("_", " ") for name in family.inputs)))
    return f"| `{family.name}` | `{family.pipeline_name}` | {inputs} | {_state(family)} |"


def _state(family: Family) -> str:
    if family.refusal:
        return f"refused: {family.refusal}"
    return "all checks" if not family.untested else f"all checks but {', '.join(family.untested)}"


def on_post_build(*, config: Any, **_: Any) -> None:
    """When all is written: every public name must have its place in the reference."""
    with Path(config.site_dir, "objects.inv").open("rb") as file:
        shown = set(Inventory.parse_sphinx(file))
    missing = sorted(set(public_names()) - shown)
    if missing:
        raise PluginError("Public names without a place in docs/reference: " + ", ".join(missing))


def public_names() -> Iterator[str]:
    """Full names of all public classes and functions of the packages that are documented."""
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if name == "vidaccel":
                yield from (f"vidaccel.{public}" for public in vidaccel.__all__)
                continue
            for module, path in _modules(name):
                tree = ast.parse(path.read_text(encoding="utf-8"))
                for node in tree.body:
                    if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                        yield f"{module}.{node.name}"


def _modules(name: str) -> Iterator[tuple[str, Path]]:
    parts = name.split(".")
    place = ROOT.joinpath(*(parts[1:] if parts[:2] == ["vidaccel", "pipelines"] else parts))
    if place.with_suffix(".py").is_file():
        yield name, place.with_suffix(".py")
        return
    for path in sorted(place.rglob("*.py")):
        inner = path.relative_to(place).with_suffix("").parts
        if not any(part.startswith("_") and part != "__init__" for part in inner):
            yield ".".join((name, *(part for part in inner if part != "__init__"))), path

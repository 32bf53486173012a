"""The documentation: its pages, links, names and examples are true of the code, and its words are the project's."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "results" not in path.parts or path.name == "README.md")
ROOT_TEXTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
TEXTS = [*(ROOT / name for name in ROOT_TEXTS), *PAGES]
# Names that were given up for better ones.
RETIRED = (
    "wants_previous",
    "bring_in",
    "given_chunk",
    "start_from",
    "end_is_told",
    "_pipe_stands_still",
    "_WITHOUT_RULE",
    "_saying_what_is_kept",
    "_take_old",
    "_make_new",
    "carry_out",
    "own_call",
    "MOST_REACH",
    "_lost_at_a_cut",
    "whole_file",
    "unfinished_file",
    "_Joint",
    "preset_of",
    "settings_with_preset",
    "SlowFastMemory",
    "EasyCacheController",
    "controller",
    "scene_at",
    "span_of_chunk",
    "_tells_its_end",
    "_is_marked",
    "preset_for",
    "_Run",
    "_USUAL_TEXT_TOKENS",
)


def fenced(path: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    text = path.read_text(encoding="utf-8")
    return [block for _, block in re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, flags=re.MULTILINE | re.DOTALL)]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(path: Path) -> set[str]:
    """Names that a module defines: functions, classes, `Class.method`, and what is assigned at its top."""
    names = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def imports(block: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def python_blocks() -> list[tuple[str, str]]:
    return [
        (f"{path.relative_to(ROOT)}:{number}", block)
        for path in TEXTS
        for number, block in enumerate(fenced(path, "python"))
    ]


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_to_a_heading_of_it(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        # The tables of these pages are made when the site is built, from the last part of CONTRIBUTING for one.
        if anchor and file.suffix == ".md" and file.name not in ("families.md", "contributing.md"):
            assert anchor[1:] in anchors(file), f"{target}{anchor}"


def test_every_page_has_its_place_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([\w/-]+\.md)$", settings, flags=re.MULTILINE))
    assert listed == {page.relative_to(DOCS).as_posix() for page in PAGES}


def test_every_package_has_its_place_in_the_reference() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name for name in project["tool"]["setuptools"]["packages"] if name.count(".") == 1}
    shown = set()
    for page in (DOCS / "reference").glob("*.md"):
        shown |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
    files = {f"vidaccel.pipelines.{path.stem}" for path in (ROOT / "pipelines").glob("[!_]*.py")}
    assert shown == packages - {"vidaccel.assets", "vidaccel.cli", "vidaccel.pipelines"} | files | {
        "vidaccel",
        "vidaccel.errors",
    }


@pytest.mark.parametrize(("place", "block"), python_blocks(), ids=lambda part: part if len(part) < 60 else "")
def test_python_examples_compile_and_import_what_exists(place: str, block: str) -> None:
    compile(block, place, "exec")
    for module, name in imports(block):
        if module.split(".")[0] == "vidaccel":
            assert hasattr(import_module(module), name), f"{place}: {module} has no {name}"
            assert not name.startswith("_")


def test_the_page_of_memory_policies_shows_the_policy_that_is_tested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vidaccel.memory import POLICIES, parse_memory

    example, index, _, row = fenced(DOCS / "how-to" / "memory-policy.md", "python")
    tested = (ROOT / "tests" / "support" / "sliding_window.py").read_text(encoding="utf-8")
    imports_of_ours = [line for line in example.splitlines() if line.startswith("from vidaccel")]
    assert imports_of_ours == [line for line in tested.splitlines() if line.startswith("from vidaccel")]
    assert example.split("@dataclass")[1].strip() in tested
    monkeypatch.setitem(POLICIES, "last", POLICIES["window"])  # taken back after the test, whatever the page puts there
    # A module is made of the blocks, because a dataclass looks its own up.
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for block in (example, index, row):
        exec(compile(block, "memory-policy.md", "exec", dont_inherit=True), vars(page))
    assert said_by(index) == [capsys.readouterr().out.strip()]
    assert type(parse_memory("last:9")).__name__ == "SlidingWindow"


def test_the_policy_of_the_page_can_be_a_file_of_the_package_with_the_lines_that_the_page_shows(tmp_path: Path) -> None:
    (change,) = fenced(DOCS / "how-to" / "memory-policy.md", "diff")
    line, place, row = change.splitlines()
    package = tmp_path / "vidaccel"
    shutil.copytree(ROOT / "vidaccel" / "memory", package / "memory")
    shutil.copy(ROOT / "vidaccel" / "errors.py", package)
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "tests" / "support" / "sliding_window.py", package / "memory" / "last.py")
    table = package / "memory" / "policies.py"
    above, below = table.read_text(encoding="utf-8").split(f"\n{place[1:]}\n")
    above = above.replace("\nimport re\n", f"\n{line[1:]}\nimport re\n")
    table.write_text(f"{above}\n{place[1:]}\n{row[1:]}\n{below}", encoding="utf-8")
    question = "from vidaccel.memory import parse_memory; print(parse_memory('last:9'))"
    said = subprocess.run([sys.executable, "-c", question], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.strip() == "SlidingWindow(window_frames=9, chunk_frames=3)", said.stderr


@pytest.mark.parametrize("page", ["cli.md", "how-to/minute.md"])
def test_pages_that_list_memories_have_every_name_of_the_table(page: str) -> None:
    from vidaccel.memory import POLICIES

    text = (DOCS / page).read_text(encoding="utf-8")
    assert [name for name in POLICIES if f"`{name}:" not in text] == []


def test_the_page_of_benchmarks_shows_the_benchmark_that_is_tested() -> None:
    (example,) = fenced(DOCS / "how-to" / "benchmark.md", "python")
    assert example.strip() in (ROOT / "tests" / "support" / "colour_bench.py").read_text(encoding="utf-8")


def test_the_example_of_the_memory_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = fenced(DOCS / "memory.md", "python")
    exec(compile(example, "memory.md", "exec"), {})
    assert said_by(example) == [capsys.readouterr().out.strip()]


def said_by(block: str) -> list[str]:
    """What the comments behind the `print` lines of a block say that they print."""
    return re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)


@pytest.mark.shipped
def test_the_example_of_sessions_saves_resumes_and_branches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = fenced(DOCS / "how-to" / "sessions.md", "python")
    exec(compile(example, "sessions.md", "exec"), {})
    words = " ".join(capsys.readouterr().out.split())
    assert words == "made 0 made 1 saved 0 saved 1 made 2 made 1"


def test_links_to_code_name_what_the_file_defines() -> None:
    seen = 0
    for page in TEXTS:
        for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", page.read_text(encoding="utf-8")):
            assert name in defined((page.parent / target).resolve()), f"{page.name}: {target} does not define {name}"
            seen += 1
    assert seen > 8


def test_the_page_of_the_method_names_a_place_for_every_equation() -> None:
    rows = re.findall(r"^\| (\d), .*\.py\)", (DOCS / "easycache.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows == ["2", "3", "4", "5", "6"]


def test_the_page_of_the_method_calls_things_as_the_rule_does() -> None:
    page = (DOCS / "easycache.md").read_text(encoding="utf-8")
    rule = (ROOT / "vidaccel" / "easycache" / "rule.py").read_text(encoding="utf-8")
    names = re.findall(r"`EasyCacheRule\.(\w+)", page)
    assert "_previous" in names
    assert [name for name in names if not re.search(rf"(self\.|def ){name}\b", rule)] == []
    lines = re.findall(r"the line `(\w+ =) \.\.\.`", page)
    assert len(lines) == 2
    assert [line for line in lines if f"        {line} " not in rule] == []


def commands() -> dict[tuple[str, ...], Any]:
    """Every command of `vidaccel` by its words."""
    from typer.main import get_command

    from vidaccel.cli.app import app

    found: dict[tuple[str, ...], Any] = {}

    def visit(words: tuple[str, ...], command: Any) -> None:
        loaded = command.load() if hasattr(command, "load") else command
        if hasattr(loaded, "list_commands"):
            for name in loaded.list_commands(None):
                visit((*words, name), loaded.get_command(None, name))
        else:
            found[words] = loaded

    visit((), get_command(app))
    return found


def flags_of(command: Any) -> set[str]:
    options = [name for option in command.params for name in (*option.opts, *option.secondary_opts)]
    return {name for name in options if name.startswith("--")} | {"--help"}


def test_commands_in_the_pages_exist_and_have_the_flags_that_are_given() -> None:
    known = commands()
    for page in TEXTS:
        for line in "\n".join(fenced(page, "bash")).replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|&& )vidaccel (.*)", re.sub(r'"[^"]*"', "TEXT", line.split("#")[0]))
            words = found[1].split() if found else ["models"]
            command = known.get((words[0],)) or known.get(tuple(words[:2]))
            assert command is not None, f"{page.name}: {line}"
            unknown = {word.split("=")[0] for word in words if word.startswith("--")} - flags_of(command)
            assert not unknown, f"{page.name}: {line}"


@pytest.mark.parametrize("word", RETIRED)
def test_retired_words_are_gone(word: str) -> None:
    places = [
        *TEXTS,
        *(path for folder in ("vidaccel", "pipelines", "demos") for path in (ROOT / folder).rglob("*.py")),
    ]
    places.remove(ROOT / "CHANGELOG.md")  # its table says what became of them
    found = [path for path in places if re.search(rf"\b{word}\b", path.read_text(encoding="utf-8"))]
    assert not found


def test_the_glossary_has_every_word_once_and_in_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## Glossary\n")[1]
    words = [word for word in re.findall(r"^\| ([^|]+) \|", text, flags=re.MULTILINE) if word not in ("word", "---")]
    assert words == sorted(set(words))


def test_the_layers_of_contributing_are_those_that_are_checked() -> None:
    rules = tree_of(ROOT / "tests" / "house" / "test_architecture.py")
    (ranks,) = (
        ast.literal_eval(node.value)
        for node in rules.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RANKS"
    )
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## The layers\n")[1].split("\n## ")[0]
    listed = {
        package: int(rank)
        for rank, packages in re.findall(r"^\| (\d) \| ([^|]+) \|", text, flags=re.MULTILINE)
        for package in re.findall(r"`(\w+)`", packages)
    }
    assert listed == {package: rank for package, rank in ranks.items() if package not in ("", "__main__")}


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(
        r"^## (\S+), \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert newest is not None
    assert newest[1] == version


def test_addresses_of_the_project_agree() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    home = urls["Homepage"]
    assert all(url.startswith(home) for url in urls.values())
    for name in ("mkdocs.yml", "CITATION.cff", "CONTRIBUTING.md"):
        assert home in (ROOT / name).read_text(encoding="utf-8"), name

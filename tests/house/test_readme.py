"""The README: its commands are the ones CI runs, its example runs, its tree and its links are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vidaccel.world import vocabulary

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_two_marked_commands_make_a_video_and_pass_the_tests() -> None:
    commands = re.findall(r"^<!-- ci: run -->\n```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    install, test = commands
    assert install.startswith("pip install -c constraints.txt . && vidaccel generate ")
    assert "[test]" in test
    assert test.strip().endswith("pytest")


def test_the_first_prompt_uses_only_words_the_embedded_model_knows() -> None:
    prompt = re.search(r'vidaccel generate "([^"]+)"', README)
    assert prompt is not None
    assert set(prompt[1].replace(",", "").split()) <= set(vocabulary())


def test_the_number_of_words_is_the_real_one() -> None:
    assert f"its {len(vocabulary())} words" in README


def test_the_tree_names_what_exists_and_every_module_of_the_package() -> None:
    tree = README.split("## What is where\n\n```\n")[1].split("```")[0]
    parent = ""
    listed = set()
    for line in tree.splitlines():
        names, _ = re.split(r"\s{2,}", line.strip() + "  ", maxsplit=1)
        parent = parent if line.startswith(" ") else ""
        for name in names.split(", "):
            assert (ROOT / parent / name).exists(), name
            listed.add(parent + name)
        parent = parent if line.startswith(" ") else names
    modules = {f"vidaccel/{path.name}" for path in (ROOT / "vidaccel").glob("*.py") if not path.name.startswith("_")}
    folders = {f"vidaccel/{path.parent.name}/" for path in (ROOT / "vidaccel").glob("*/__init__.py")}
    assert (modules | folders) - {"vidaccel/pipelines/"} <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_python_example_is_ten_lines_that_compile() -> None:
    (example,) = blocks("python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 10
    compile(example, "README.md", "exec")


@pytest.mark.shipped
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "ball.mp4").stat().st_size > 0
    assert "of 50 steps computed" in capsys.readouterr().out

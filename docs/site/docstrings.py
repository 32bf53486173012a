"""Reads this repository for the reference: docstrings as they are written here, and where the pipelines lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[2]
_FIELD = re.compile(r"^(?P<names>\*{0,2}[a-z_][\w*]*(?:, \*{0,2}[a-z_][\w*]*)*): (?P<text>.*)$")


def as_markdown(docstring: str) -> str:
    """The docstring with its lines `name: meaning` as a list; everything else stays."""
    lines: list[str] = []
    in_field = False
    for line in docstring.splitlines():
        field = _FIELD.match(line)
        if field is not None:
            if not in_field:
                lines.append("")
            lines.append(f"- `{field['names']}`: {field['text']}")
            in_field = True
        elif in_field and line.startswith("    "):
            lines.append(line)
        else:
            if in_field:
                lines.append("")
            in_field = False
            lines.append(line)
    return "\n".join(lines)


class HouseStyle(griffe.Extension):
    """Rewrites every docstring before it is rendered, and finds `vidaccel.pipelines` in the folder `pipelines/`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Called by griffe when a package is read; the bridge in `vidaccel/pipelines` is followed at run time only."""
        if pkg.path != "vidaccel":
            return
        pipelines = pkg["pipelines"]
        for module in pkg.modules.values():
            _hide_imports(module)
        for path in sorted((ROOT / "pipelines").glob("[!_]*.py")):
            code = path.read_text(encoding="utf-8")
            module = griffe.visit(path.stem, path, code, extensions=loader.extensions, parent=pipelines)
            pipelines.set_member(path.stem, module)


def _hide_imports(module: griffe.Module) -> None:
    """Show a name with the one module that defines it: what else a package gives out is for the code to import."""
    module.exports = None
    for inner in module.modules.values():
        if not inner.is_alias:
            _hide_imports(inner)

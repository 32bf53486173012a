"""The rules of the house that a program can check: layers, sizes, state, errors, documentation."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vidaccel", "pipelines", "demos")

# A module imports from its own layer (without circles) or from lower ones. The longest matching name counts.
LAYERS = {
    "vidaccel.errors": 0,
    "vidaccel.easycache": 0,
    "vidaccel.memory": 0,
    "vidaccel.presets": 0,
    "vidaccel.reuse": 0,
    "vidaccel.report": 0,
    "vidaccel.metrics": 0,
    "vidaccel.vmaf": 0,
    "vidaccel.video": 0,
    "vidaccel.world": 0,
    "vidaccel.attention_backends": 1,
    "vidaccel.components": 1,
    "vidaccel.hooks": 1,
    "vidaccel.models": 1,
    "vidaccel.open_sora": 1,
    "vidaccel.families": 2,
    "vidaccel.footprint": 2,
    "vidaccel.loading": 2,
    "vidaccel.model_spec": 2,
    "vidaccel.model_table": 2,
    "vidaccel.registry": 2,
    "vidaccel.swap_in": 2,
    "vidaccel.rollout": 2,
    "vidaccel.shares": 2,
    "vidaccel.bench": 3,
    "vidaccel.calls": 3,
    "vidaccel.convert": 3,
    "vidaccel.generation": 3,
    "vidaccel.pipelines": 3,
    "vidaccel.recorder": 3,
    "vidaccel.request": 3,
    "vidaccel.training": 3,
    "vidaccel": 3,
    "vidaccel.cli": 4,
    "vidaccel.__main__": 4,
    "demos": 4,
}
NOT_IN_THE_LOWEST_LAYER = ("diffusers", "transformers", "accelerate", "typer", "rich", "gradio")
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 8
# Token counts of one video size, written into many codebases; they follow from the configuration.
FORBIDDEN_NUMBERS = (1560, 32760, 75600)


MUTATORS = ("append", "add", "update", "extend", "insert", "pop", "popitem", "clear", "remove", "discard", "setdefault")


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "pipelines":
        parts = ["vidaccel", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LIBRARY = [path for path in FILES if path.relative_to(ROOT).parts[0] != "demos"]
NAMES = frozenset(map(module_name, FILES))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
each_library_file = pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def layer(module: str) -> int:
    name = module
    while name not in LAYERS:
        if "." not in name or name.rpartition(".")[0] == "vidaccel":
            raise AssertionError(f"{module} has no layer; give it one in LAYERS.")
        name = name.rpartition(".")[0]
    return LAYERS[name]


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield from _members(node.module or "", node.names)


def _members(module: str, names: list[ast.alias]) -> Iterator[str]:
    for alias in names:
        member = f"{module}.{alias.name}"
        yield member if member in NAMES else module


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_mutable_display(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if not isinstance(value, ast.Call):
        return False
    name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
    return name in ("list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter", "WeakKeyDictionary")


def assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr | None, int]]:
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield ast.unparse(target), node.value, node.lineno
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), node.value, node.lineno


def broken_rules(found: list[str]) -> str:
    return "\n".join(found)


@each_file
def test_imports_are_absolute_and_point_down_the_layers(path: Path) -> None:
    module = module_name(path)
    up = [
        f"{module} (layer {layer(module)}) imports {name} (layer {layer(name)})"
        for name in imported_modules(parsed(path))
        if name.split(".")[0] in ("vidaccel", "pipelines", "demos", "tests")
        and (name.split(".")[0] != "vidaccel" or layer(name) > layer(module))
    ]
    assert not up, broken_rules(up)


def test_no_imports_go_in_a_circle() -> None:
    graph = {module_name(path): set(imported_modules(parsed(path))) & NAMES for path in FILES}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in finished:
            for target in graph[module] - {module}:
                visit(target, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


@each_library_file
def test_the_lowest_layer_knows_no_model_library(path: Path) -> None:
    if layer(module_name(path)) > 0:
        return
    found = [name for name in imported_modules(parsed(path)) if name.split(".")[0] in NOT_IN_THE_LOWEST_LAYER]
    assert not found


@each_library_file
def test_gradio_is_only_imported_by_the_demos_and_typer_only_by_command_lines(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_modules(parsed(path))}
    assert "gradio" not in roots
    is_command_line = layer(module_name(path)) == 4 or module_name(path).endswith(".app")
    assert is_command_line or not roots & {"typer", "argparse", "rich"}


@each_file
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_FILE_LINES
    long = [
        f"{path.name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in functions(parsed(path))
        if node.end_lineno is not None and node.end_lineno - node.body[0].lineno + 1 > MOST_FUNCTION_LINES
    ]
    assert not long, broken_rules(long)


@each_file
def test_functions_take_few_parameters(path: Path) -> None:
    # The parameters of a command are its flags; those of a pipeline's call are the base class's; those of a model are
    # the keys of its configuration file and the inputs that its pipeline gives it.
    if module_name(path).startswith(("vidaccel.cli", "vidaccel.models", "vidaccel.pipelines")) or path.name == "app.py":
        return
    found = []
    for node in functions(parsed(path)):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        if count > MOST_PARAMETERS:
            found.append(f"{path.name}:{node.lineno} {node.name}: {count} parameters")
    assert not found, broken_rules(found)


@each_file
def test_no_number_is_written_down_that_follows_from_a_configuration(path: Path) -> None:
    found = [
        f"{path.name}:{node.lineno}: {node.value}"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and node.value in FORBIDDEN_NUMBERS and not isinstance(node.value, bool)
    ]
    assert not found, broken_rules(found)


@each_file
def test_no_class_holds_state(path: Path) -> None:
    found = []
    classes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]
    names = {node.name for node in classes}
    for node in classes:
        found += [
            f"{path.name}:{line} {name}" for name, value, line in assignments(node.body) if is_mutable_display(value)
        ]
    for node in ast.walk(parsed(path)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) else ():
            if isinstance(target, ast.Attribute) and _is_class(target.value, names):
                found.append(f"{path.name}:{node.lineno} writes {ast.unparse(target)}")
    assert not found, broken_rules(found)


def _is_class(node: ast.expr, names: set[str]) -> bool:
    text = ast.unparse(node)
    return text in names | {"cls"} or text.endswith(".__class__") or text.startswith("type(")


@each_file
def test_no_module_holds_state(path: Path) -> None:
    # A table in capitals is a constant as long as nothing in its module writes to it.
    tables = {name: line for name, value, line in assignments(parsed(path).body) if is_mutable_display(value)}
    found = [
        f"{path.name}:{line} {name}"
        for name, line in tables.items()
        if not name.isupper() and name not in ("__all__", "__path__")
    ]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Global) or written_name(node) in tables:
            found.append(f"{path.name}:{node.lineno} writes to a module")
    assert not found, broken_rules(found)


def written_name(node: ast.AST) -> str:
    """The name whose value `node` changes in place, or nothing."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        return getattr(node.value, "id", "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return getattr(node.func.value, "id", "")
    return ""


@each_file
def test_errors_are_caught_by_kind(path: Path) -> None:
    found = [
        f"{path.name}:{node.lineno}"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _raises_again(node)
    ]
    assert not found, broken_rules(found)


def _is_broad(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(one is None or getattr(one, "id", "") in ("Exception", "BaseException") for one in kinds)


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@each_library_file
def test_only_the_command_line_prints(path: Path) -> None:
    if layer(module_name(path)) == 4 or module_name(path).endswith(".app"):
        return
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if getattr(node.func, "id", "") == "print"]


@each_file
def test_no_file_is_unpickled(path: Path) -> None:
    names = set(imported_modules(parsed(path)))
    assert not names & {"pickle", "dill", "joblib"}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node), f"{path.name}:{node.lineno}"


@each_file
def test_everything_public_is_documented_and_typed(path: Path) -> None:
    assert ast.get_docstring(parsed(path)) or not parsed(path).body, "the module has no docstring"
    found = []
    for node in parsed(path).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            found.append(f"{path.name}:{node.lineno} {node.name} has no docstring")
        if isinstance(node, ast.FunctionDef) and not _is_typed(node):
            found.append(f"{path.name}:{node.lineno} {node.name} is not fully typed")
    assert not found, broken_rules(found)


def _is_typed(node: ast.FunctionDef) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return node.returns is not None and all(argument.annotation is not None for argument in arguments)


def test_no_file_is_named_after_nothing() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "misc", "common")]


def test_the_packages_that_are_installed_are_the_folders_that_exist() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {module_name(path) for path in (ROOT / "vidaccel").rglob("__init__.py")}
    assert set(settings["packages"]) == folders | {"vidaccel.assets"}
    assert settings["packages"] == sorted(settings["packages"])


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("from vidaccel import cli\n", test_imports_are_absolute_and_point_down_the_layers),
        ("import diffusers\n", test_the_lowest_layer_knows_no_model_library),
        ("TOKENS = 1560\n", test_no_number_is_written_down_that_follows_from_a_configuration),
        ("class A:\n    seen = []\n", test_no_class_holds_state),
        ("class A:\n    pass\nA.count = 0\n", test_no_class_holds_state),
        ("seen = {}\n", test_no_module_holds_state),
        ("SEEN = {}\ndef f():\n    SEEN[1] = 2\n", test_no_module_holds_state),
        ("SEEN = []\ndef f():\n    SEEN.append(2)\n", test_no_module_holds_state),
        ("try:\n    pass\nexcept Exception:\n    pass\n", test_errors_are_caught_by_kind),
        ("print(1)\n", test_only_the_command_line_prints),
        ("import pickle\n", test_no_file_is_unpickled),
        ("def f(a, b, c, d, e, f, g, h, i): ...\n", test_functions_take_few_parameters),
        ("def f():\n" + "    pass\n" * 61, test_files_and_functions_are_short),
        ("def f(a: int) -> int:\n    return a\n", test_everything_public_is_documented_and_typed),
    ],
)
def test_each_rule_finds_a_planted_breach(source: str, test: object, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = ROOT / "vidaccel" / "easycache.py"
    monkeypatch.setitem(globals(), "parsed", lambda path: ast.parse(source))
    assert callable(test)
    with pytest.raises(AssertionError):
        test(planted)

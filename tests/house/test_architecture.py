"""The rules of the house that a program can check: layers, sizes, state, errors, documentation."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from vidaccel.catalog.pipelines import STUDENT_PIPELINE, STUDENT_TRANSFORMER
from vidaccel.catalog.table import CATALOG

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vidaccel", "pipelines", "demos")

# A module imports from its own package, without circles, or from packages of a lower rank, never from a neighbour.
RANKS = {
    "errors": 0,
    "world": 0,
    "files": 1,
    "catalog": 2,
    "memory": 2,
    "open_sora": 4,
    "machine": 3,
    "video": 3,
    "sessions": 3,
    "convert": 3,
    "random_models": 3,
    "easycache": 4,
    "models": 4,
    "rollout": 5,
    "generation": 5,
    "training": 5,
    "pipelines": 6,
    "bench": 6,
    "cli": 7,
    "demos": 7,
    "": 8,  # the public names, of any package
    "__main__": 8,
}
WITHOUT_MODEL_LIBRARIES = ("errors", "world", "files", "memory", "video", "sessions")
MODEL_LIBRARIES = {"diffusers", "transformers", "accelerate"}
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 8
# Rows of the catalog, ports of models that no library has, and what checkpoints of theirs say about themselves.
MAY_NAME_MODELS = ("catalog", "models", "pipelines", "open_sora")
CHECKPOINT_FORMATS = ("vidaccel.convert.open_sora", "vidaccel.convert.causal_wan_map")
# Token counts of one video size, written into many codebases; they follow from the configuration.
FORBIDDEN_NUMBERS = (1560, 32760, 75600)
MUTATORS = ("append", "add", "update", "extend", "insert", "pop", "popitem", "clear", "remove", "discard", "setdefault")


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "pipelines":
        parts = ["vidaccel", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = frozenset(map(module_name, FILES))


class Module(NamedTuple):
    """One file of the project, read once."""

    path: Path
    source: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return package_of(module_name(self.path))

    @property
    def is_command_line(self) -> bool:
        return RANKS[self.package] == 7 or self.package == "__main__" or f"_{self.path.stem}".endswith("_app")


@cache
def modules() -> tuple[Module, ...]:
    sources = [path.read_text(encoding="utf-8") for path in FILES]
    return tuple(Module(path, source, ast.parse(source)) for path, source in zip(FILES, sources, strict=True))


def package_of(module: str) -> str:
    """The package that a module belongs to: `vidaccel.memory.index` is of `memory`."""
    first, *rest = module.split(".")
    return first if first != "vidaccel" else (rest[0] if rest else "")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if member in NAMES else node.module or ""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


# Rules: each says what a module does wrong, nothing if it does nothing wrong.


def imports_point_down(module: Module) -> Iterator[str]:
    for name in imported_modules(module.tree):
        if name.split(".")[0] not in ("vidaccel", "pipelines", "demos", "tests"):
            continue
        target = package_of(name)
        if target == "" and module.package in ("pipelines", "demos", "cli"):
            continue  # users of the public names
        if target != module.package and RANKS.get(target, 99) >= RANKS[module.package]:
            yield f"{module.package} (rank {RANKS[module.package]}) imports {name} (rank {RANKS.get(target)})"


def names_are_imported_from_the_module_that_defines_them(module: Module) -> Iterator[str]:
    # A package may hand on names of its modules (`vidaccel.memory`); a module may not.
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (defined := definitions().get(node.module or "")) is not None:
            names = [alias.name for alias in node.names if f"{node.module}.{alias.name}" not in NAMES]
            yield from (f"{node.lineno}: {node.module} does not define {name}" for name in names if name not in defined)


@cache
def definitions() -> dict[str, frozenset[str]]:
    """The names that each module defines, by module; packages are left out."""
    found = {}
    for module in modules():
        if module.path.stem == "__init__":
            continue
        nodes = list(ast.walk(module.tree))
        made = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        made |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        found[module_name(module.path)] = frozenset(made)
    return found


def packages_below_know_no_model_library(module: Module) -> Iterator[str]:
    if module.package in WITHOUT_MODEL_LIBRARIES:
        yield from {name for name in imported_modules(module.tree) if name.split(".")[0] in MODEL_LIBRARIES}


def command_line_libraries_stay_there(module: Module) -> Iterator[str]:
    roots = {name.split(".")[0] for name in imported_modules(module.tree)}
    if module.package != "demos":
        yield from roots & {"gradio"}
    if not module.is_command_line:
        yield from roots & {"typer", "argparse", "rich"}


def files_and_functions_are_short(module: Module) -> Iterator[str]:
    if (count := len(module.source.splitlines())) > MOST_FILE_LINES:
        yield f"{count} lines"
    for node in functions(module.tree):
        if node.end_lineno is not None and (count := node.end_lineno - node.body[0].lineno + 1) > MOST_FUNCTION_LINES:
            yield f"{node.lineno} {node.name}: {count} lines"


def functions_take_few_parameters(module: Module) -> Iterator[str]:
    # The parameters of a command are its flags; those of a pipeline's call are the base class's; those of a model are
    # the keys of its configuration file and the inputs that its pipeline gives it.
    if module.package in ("cli", "models", "pipelines") or module.is_command_line:
        return
    for node in functions(module.tree):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        if count > MOST_PARAMETERS:
            yield f"{node.lineno} {node.name}: {count} parameters"


def no_number_follows_from_a_configuration(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in FORBIDDEN_NUMBERS:
            yield f"{node.lineno}: {node.value}"


def only_the_catalog_names_models(module: Module) -> Iterator[str]:
    # `module:Name` names a class too, and so does the beginning of several, such as `Helios`.
    if module.package in (*MAY_NAME_MODELS, "") or module_name(module.path) in CHECKPOINT_FORMATS:
        return  # "": the public names
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        name = node.value.rpartition(":")[2]
        if len(name) > 2 and name[0].isupper() and name.isidentifier() and any(map(begins(name), model_classes())):
            yield f"{node.lineno}: {node.value!r}; what differs by model is a row of vidaccel.catalog"


def begins(name: str) -> Callable[[str], bool]:
    """Whether a class is called `name`, or begins with it as with a word."""
    return lambda whole: whole.startswith(name) and not whole[len(name) :][:1].islower()


@cache
def model_classes() -> tuple[str, ...]:
    """Pipelines and transformers of diffusers and of this project, by name."""
    import diffusers

    known = {name for name in dir(diffusers) if name.endswith("Pipeline") or "Transformer" in name}
    own = {STUDENT_PIPELINE, STUDENT_TRANSFORMER.partition(":")[2], *CATALOG.transformers}
    return tuple(sorted(known | own | {family.pipeline_name for family in CATALOG.families}))


def private_names_of_others_are_in_one_module(module: Module) -> Iterator[str]:
    # What a class of the module itself defines is its own, and so is what a subclass finds in `self`. PyTorch's own
    # functions with an underscore are called as `torch._name`.
    if module_name(module.path) == "vidaccel.machine.private_names":
        return
    own = {node.name for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {name.removeprefix("self.") for name, _, _ in assignments(list(ast.walk(module.tree)))}
    for line, owner, name in read_names(module.tree):
        is_private = name.startswith("_") and not name.startswith("__")
        if is_private and name not in own and owner not in ("self", "cls") and not owner.startswith("torch"):
            yield f"{line}: {name} of {owner} is private; vidaccel.machine.private_names has such names"


def read_names(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """What is read of what: line, owner, name; `getattr` and its kin count too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            yield node.lineno, ast.unparse(node.args[0]), str(getattr(node.args[1], "value", ""))


def no_class_holds_state(module: Module) -> Iterator[str]:
    classes = [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    names = {node.name for node in classes}
    for node in classes:
        yield from (f"{line} {name}" for name, value, line in assignments(node.body) if is_mutable_display(value))
    for statement in ast.walk(module.tree):
        if not isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign):
            continue
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            if isinstance(target, ast.Attribute) and _is_class(target.value, names):
                yield f"{statement.lineno} writes {ast.unparse(target)}"


def no_module_holds_state(module: Module) -> Iterator[str]:
    # A table in capitals is a constant as long as nothing in its module writes to it.
    tables = {name: line for name, value, line in assignments(module.tree.body) if is_mutable_display(value)}
    for name, line in tables.items():
        if not name.isupper() and name not in ("__all__", "__path__"):
            yield f"{line} {name}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global) or written_name(node) in tables:
            yield f"{node.lineno} writes to a module"


def errors_are_caught_by_kind(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _raises_again(node):
            yield str(node.lineno)


def only_the_command_line_prints(module: Module) -> Iterator[str]:
    if not module.is_command_line:
        calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
        yield from (str(node.lineno) for node in calls if getattr(node.func, "id", "") == "print")


def no_file_is_unpickled(module: Module) -> Iterator[str]:
    yield from set(imported_modules(module.tree)) & {"pickle", "dill", "joblib"}
    for node in ast.walk(module.tree):
        is_load = isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
        if is_load and "weights_only=True" not in ast.unparse(node):
            yield str(node.lineno)


def everything_public_is_documented_and_typed(module: Module) -> Iterator[str]:
    if module.tree.body and not ast.get_docstring(module.tree):
        yield "the module has no docstring"
    for node in module.tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{node.lineno} {node.name} has no docstring"
        if isinstance(node, ast.FunctionDef) and not _is_typed(node):
            yield f"{node.lineno} {node.name} is not fully typed"


Rule = Callable[[Module], Iterator[str]]
BREACHES: tuple[tuple[Rule, str], ...] = (
    (imports_point_down, "from vidaccel.models.causal_wan import CausalWanTransformer3DModel\n"),
    (imports_point_down, "import tests\n"),
    (names_are_imported_from_the_module_that_defines_them, "from vidaccel.catalog.registry import MODELS\n"),
    (packages_below_know_no_model_library, "import diffusers\n"),
    (command_line_libraries_stay_there, "import typer\n"),
    (command_line_libraries_stay_there, "import gradio\n"),
    (files_and_functions_are_short, "def f():\n" + "    pass\n" * 61),
    (files_and_functions_are_short, "a = 1\n" * 401),
    (functions_take_few_parameters, "def f(a, b, c, d, e, f, g, h, i): ...\n"),
    (no_number_follows_from_a_configuration, "TOKENS = 1560\n"),
    (only_the_catalog_names_models, 'if name.startswith("HunyuanVideoFramepack"):\n    pass\n'),
    (only_the_catalog_names_models, 'KIND = "diffusers:WanPipeline"\n'),
    (only_the_catalog_names_models, 'KIND = "STDiT3"\n'),
    (private_names_of_others_are_in_one_module, "def f(pipe):\n    return pipe._execution_device\n"),
    (private_names_of_others_are_in_one_module, "class A:\n    def f(self):\n        self.pipe._interrupt = True\n"),
    (private_names_of_others_are_in_one_module, 'getattr(module, "_hf_hook", None)\n'),
    (no_class_holds_state, "class A:\n    seen = []\n"),
    (no_class_holds_state, "class A:\n    pass\nA.count = 0\n"),
    (no_module_holds_state, "seen = {}\n"),
    (no_module_holds_state, "SEEN = {}\ndef f():\n    SEEN[1] = 2\n"),
    (no_module_holds_state, "SEEN = []\ndef f():\n    SEEN.append(2)\n"),
    (errors_are_caught_by_kind, "try:\n    pass\nexcept Exception:\n    pass\n"),
    (only_the_command_line_prints, "print(1)\n"),
    (no_file_is_unpickled, "import pickle\n"),
    (no_file_is_unpickled, "torch.load(path)\n"),
    (everything_public_is_documented_and_typed, "def f(a: int) -> int:\n    return a\n"),
    (everything_public_is_documented_and_typed, '"""A."""\ndef f(a: int):\n    """B."""\n'),
)
RULES = tuple(dict.fromkeys(rule for rule, _ in BREACHES))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule_that(rule: Rule) -> None:
    found = [f"{module.path.relative_to(ROOT)}: {breach}" for module in modules() for breach in rule(module)]
    assert not found, "\n".join(found)


def test_each_rule_finds_its_planted_breaches() -> None:
    for rule, source in BREACHES:
        planted = Module(ROOT / "vidaccel" / "memory" / "planted.py", source, ast.parse(source))
        assert list(rule(planted)), f"{rule.__name__} does not see\n{source}"


def test_no_imports_go_in_a_circle() -> None:
    graph = {module_name(module.path): set(imported_modules(module.tree)) & NAMES for module in modules()}
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in finished:
            for target in graph[module] - {module}:
                visit(target, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_the_top_of_the_package_holds_packages_and_nothing_loose() -> None:
    loose = {path.name for path in (ROOT / "vidaccel").iterdir() if path.is_file()}
    assert loose == {"__init__.py", "__main__.py", "errors.py", "py.typed"}
    assert {module.package for module in modules()} == set(RANKS)


def test_no_file_is_named_after_nothing() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "misc", "common")]


def test_the_packages_that_are_installed_are_the_folders_that_exist() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {module_name(path) for path in (ROOT / "vidaccel").rglob("__init__.py")}
    assert set(settings["packages"]) == folders | {"vidaccel.assets"}
    assert settings["packages"] == sorted(settings["packages"])


def is_mutable_display(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if not isinstance(value, ast.Call):
        return False
    name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
    return name in ("list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter", "WeakKeyDictionary")


def assignments(body: Sequence[ast.AST]) -> Iterator[tuple[str, ast.expr | None, int]]:
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield ast.unparse(target), node.value, node.lineno
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), node.value, node.lineno


def written_name(node: ast.AST) -> str:
    """The name whose value `node` changes in place, or nothing."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        return getattr(node.value, "id", "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return getattr(node.func.value, "id", "")
    return ""


def _is_class(node: ast.expr, names: set[str]) -> bool:
    text = ast.unparse(node)
    return text in names | {"cls"} or text.endswith(".__class__") or text.startswith("type(")


def _is_broad(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(one is None or getattr(one, "id", "") in ("Exception", "BaseException") for one in kinds)


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _is_typed(node: ast.FunctionDef) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return node.returns is not None and all(argument.annotation is not None for argument in arguments)

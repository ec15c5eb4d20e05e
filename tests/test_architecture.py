"""The layout, read from the source: which way imports go, how long files are, what is documented."""

import ast
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import recollect

SOURCE = Path(recollect.__file__).parent
FILES = {path.relative_to(SOURCE.parent): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}

# From the foundation up: a room may import what lies below it, and its neighbors on the same floor.
FLOORS = (
    {"errors"},
    {"kernels", "likelihoods", "checkpoint", "heads"},
    {"memory"},
    {"adaptation"},
    {"mbpa", "predictors"},
    {"language", "continual", "meta"},
    {"persistence", "snapshot"},
    {"integrations"},
    {"experiments"},
    {"cli", "cli_memory", "serve", "__main__"},
)
LEAVES = {"data", "models"}  # import errors alone, and only experiments import them
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}

EVERYWHERE = {"torch", "jaxtyping", "safetensors"}
# Base classes cannot be imported late; who imports this module has the package, or is told what to install.
AT_THE_TOP = {
    "recollect.integrations.sklearn": {"sklearn", "numpy"},
    "recollect.serve.app": {"fastapi", "starlette"},  # FastAPI reads the types of endpoints at run time
    "recollect.serve.metrics": {"prometheus_client"},
}
MOST_LINES = 400


def module(path: Path) -> str:
    """``recollect/memory/index.py`` -> ``recollect.memory.index``, ``recollect/memory/__init__.py`` -> its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def room(name: str) -> str:
    """``recollect.memory.index`` -> ``memory``; the package itself is the room ``recollect``."""
    return name.split(".")[1] if "." in name else name


def imported(tree: ast.AST) -> Iterator[str]:
    """All modules that a file imports, at its top or inside a function; a submodule by its own name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def through_the_door(tree: ast.AST) -> Iterator[str]:
    """The modules behind the public names that a file imports from the package itself."""
    public = {
        alias.name: f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
        for node in ast.walk(FILES[MODULES["recollect"]])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "recollect":
            yield from (public[alias.name] for alias in node.names if alias.name in public)


def edges(path: Path) -> set[str]:
    """The modules of this package that a file imports."""
    own = {name for name in imported(FILES[path]) if name.split(".")[0] == "recollect"}
    return own - {module(path)}


def may_import(source: str, target: str) -> bool:
    if source == target:
        return True
    if source in LEAVES:
        return target == "errors"
    if target in LEAVES:
        return source == "experiments"
    return FLOOR[target] <= FLOOR[source]


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("errors", "kernels", False),
        ("kernels", "likelihoods", True),
        ("memory", "kernels", True),
        ("kernels", "memory", False),
        ("memory", "adaptation", False),
        ("adaptation", "errors", True),
        ("predictors", "mbpa", True),
        ("mbpa", "continual", False),
        ("meta", "language", True),
        ("persistence", "meta", True),
        ("integrations", "experiments", False),
        ("serve", "experiments", True),
        ("experiments", "cli", False),
        ("data", "errors", True),
        ("data", "models", False),
        ("models", "memory", False),
        ("experiments", "data", True),
        ("integrations", "data", False),
        ("cli", "models", False),
    ],
)
def test_plan_says_what_the_design_says(source: str, target: str, allowed: bool) -> None:
    assert may_import(source, target) is allowed


def test_every_file_is_in_a_room_of_the_plan() -> None:
    rooms = {room(name) for name in MODULES} - {"recollect"}
    assert rooms <= FLOOR.keys() | LEAVES, f"rooms that the plan does not know: {rooms - FLOOR.keys() - LEAVES}"


@pytest.mark.parametrize("path", [path for path in FILES if module(path) != "recollect"], ids=str)
def test_imports_go_one_way(path: Path) -> None:
    source = room(module(path))
    targets = (edges(path) | set(through_the_door(FILES[path]))) - {"recollect"}
    wrong = {target for target in targets if not may_import(source, room(target))}
    assert not wrong, f"{path} must not import {wrong}"


def test_no_import_cycles() -> None:
    graph = {name: edges(path) & MODULES.keys() for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_package_imports_nothing_but_its_own_light_rooms() -> None:
    tree = FILES[MODULES["recollect"]]
    names = set(imported(tree))
    assert all(name.startswith("recollect.") for name in names), names
    heavy = {"experiments", "cli", "cli_memory", "serve", "data", "models", "integrations"}
    assert not {room(name) for name in names} & heavy


@pytest.mark.parametrize("path", FILES, ids=str)
def test_optional_packages_are_imported_late(path: Path) -> None:
    """Outside of functions and TYPE_CHECKING a file imports the standard library and what every install has.

    An integration that derives from classes of its package may import that too.
    """
    late = {
        id(node)
        for outer in ast.walk(FILES[path])
        if isinstance(outer, ast.FunctionDef) or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.dump(outer.test))
        for node in ast.walk(outer)
    }
    early = [node for node in ast.walk(FILES[path]) if id(node) not in late]
    names = {name.split(".")[0] for node in early if isinstance(node, ast.Import) for name in imported(node)}
    names |= {name.split(".")[0] for node in early if isinstance(node, ast.ImportFrom) for name in imported(node)}
    own = AT_THE_TOP.get(module(path), set())
    assert names <= EVERYWHERE | own | {"recollect"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short(path: Path) -> None:
    lines = len((SOURCE.parent / path).read_text().splitlines())
    assert lines <= MOST_LINES, f"{path} has {lines} lines: split it by subject"


def public_objects() -> dict[str, object]:
    """All public names; a module among them stands for the classes and functions that it defines."""
    found: dict[str, object] = {}
    for name in recollect.__all__:
        thing = getattr(recollect, name)
        found[name] = thing
        if isinstance(thing, types.ModuleType):
            for inner, part in vars(thing).items():
                own = inner in vars(thing).get("__all__", ()) or getattr(part, "__module__", None) == thing.__name__
                own = own and callable(part)
                if own and not inner.startswith("_") and not getattr(part, "_is_protocol", False):
                    found[f"{name}.{inner}"] = part
    return found


def test_public_names_are_sorted_and_exist() -> None:
    assert recollect.__all__ == sorted(recollect.__all__)
    assert {name for name in public_objects() if name.startswith("rules.")} >= {"rules.sgd", "rules.adam"}


@pytest.mark.parametrize("name", public_objects())
def test_public_names_are_documented_with_an_example(name: str) -> None:
    thing = public_objects()[name]
    text = inspect.getdoc(thing) or ""
    generated = isinstance(thing, type) and text.startswith(f"{thing.__name__}(")
    assert text, f"{name} has no docstring"
    assert not generated, f"{name} has no docstring of its own"
    is_result = isinstance(thing, type) and issubclass(thing, tuple)  # results are returned, not made
    if not isinstance(thing, types.ModuleType) and not is_result:
        short = name.rpartition(".")[2]
        lines = [line.strip() for line in text.splitlines()]
        assert any(line.startswith((">>>", "...")) and short in line for line in lines), f"{name} has no example"

"""Wings (packages inside rooms): imports form no circle, among files nor among packages, and folders stay small."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("bus", "planner", "stages", "loadgen", "deploy", "deepar")
LARGEST_WING = 15  # modules in one folder
Graph = dict[str, set[str]]


@cache
def modules(root: Path) -> dict[str, Path]:
    """Every module of the rooms under `root` by its dotted name; a package stands for its `__init__`."""
    found = {}
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(root: Path) -> Graph:
    """Which modules each module names in its imports, at any depth and under TYPE_CHECKING, too."""
    known = modules(root)
    graph: Graph = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named: list[str] = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                named = [one if one in known else node.module for one in full]
            graph[name] |= {one for one in named if one in known and one != name}
    return graph


def by_package(graph: Graph, packages: set[str]) -> Graph:
    """The same between packages: a module belongs to the package that holds its file."""

    def package(name: str) -> str:
        return name if name in packages else name.rpartition(".")[0]

    merged: Graph = defaultdict(set)
    for name, named in graph.items():
        merged[package(name)] |= {package(one) for one in named} - {package(name)}
    return merged


def circle(graph: Graph) -> list[str] | None:
    """One circle of imports, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(name) for name in error.args[1]]
    return None


def packages(root: Path) -> set[str]:
    return {name for name, path in modules(root).items() if path.name == "__init__.py"}


def test_files_do_not_import_in_circles() -> None:
    assert circle(imports(ROOT)) is None


def test_wings_do_not_import_in_circles() -> None:
    assert circle(by_package(imports(ROOT), packages(ROOT))) is None


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    for name, text in {
        "bus/__init__": "",
        "bus/a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bus import b",
        "bus/b": "def late():\n    import bus.a",
        "bus/wing/__init__": "",
        "bus/wing/c": "from bus.d import x",
        "bus/wing/e": "",
        "bus/d": "x = 1",
        "bus/f": "from bus.wing.e import y",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    graph = imports(tmp_path)
    assert set(circle(graph) or ()) == {"bus.a", "bus.b"}
    graph["bus.b"].clear()
    assert circle(graph) is None
    assert set(circle(by_package(graph, packages(tmp_path))) or ()) == {"bus", "bus.wing"}


@pytest.mark.parametrize("wing", sorted(packages(ROOT)))
def test_a_wing_is_small_and_says_what_it_is_for(wing: str) -> None:
    init = modules(ROOT)[wing]
    beside = [path for path in init.parent.glob("*.py") if path.name != "__init__.py"]
    assert len(beside) <= LARGEST_WING, sorted(path.name for path in beside)
    described = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
    assert described is not None
    assert len(described) > 30

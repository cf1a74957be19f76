"""The key of a run: a hash of everything that its result depends on.

It covers the scenario, the seed, the content of the profile, our own code, numpy (which draws the random numbers), and
the source of a user's policy and of every module of the user that it imports. A result may be reused only under an
equal key. Modules that are imported by a computed name, and files that a policy reads, are not covered.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.metadata import packages_distributions, version
from pathlib import Path

import numpy as np

import bus
import loadgen
import planner
from loadgen.experiments.runs import Cell
from planner.search.policies import policy_module
from planner.search.profiles import profile_text

KEY_DIGITS = 16
"""Hexadecimal digits of a key."""

OURS = tuple(Path(room.__path__[0]).resolve() for room in (bus, planner, loadgen))
"""The folders that the driver runs from."""

_STANDARD = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib"))


class RunKeys:
    """Keys of runs for the present code, profiles and policies, which are read when this object is built."""

    def __init__(self, folders: Sequence[Path] = OURS, numpy_version: str = np.__version__) -> None:
        self._code = f"{_digest(_files(folders))} numpy {numpy_version}"
        self._policies: dict[str, str | None] = {}
        self._profiles: dict[str, str] = {}

    def key(self, cell: Cell) -> str:
        """The key of one cell; empty if the policy has no source, so its result is never reused.

        Raises the errors of `load_profile`.
        """
        scenario = cell.scenario
        if scenario.policy not in self._policies:
            self._policies[scenario.policy] = policy_digest(scenario.policy)
        if scenario.profile not in self._profiles:
            self._profiles[scenario.profile] = _digest([("profile", profile_text(scenario.profile).encode())])
        if self._policies[scenario.policy] is None:
            return ""
        depends = {
            "scenario": {name: value for name, value in asdict(scenario).items() if name != "name"},
            "seed": cell.seed,
            "code": self._code,
            "policy": self._policies[scenario.policy],
            "profile": self._profiles[scenario.profile],
        }
        text = json.dumps(depends, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def policy_digest(name: str, version_of: Callable[[str], str] = version) -> str | None:
    """A hash of a policy's source, None if there is no source; empty for a built-in policy, which our own code covers."""
    module = policy_module(name)
    if module is None:
        return ""
    sources = sorted(_sources(module, version_of))
    return _digest(sources) if sources else None


def _files(folders: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".json"):
                yield f"{folder.name}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def _digest(parts: Iterator[tuple[str, bytes]] | list[tuple[str, bytes]]) -> str:
    found = hashlib.sha256()
    for name, content in parts:
        found.update(f"{name} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()


def _sources(module: str, version_of: Callable[[str], str]) -> Iterator[tuple[str, bytes]]:
    """(module, source) of `module` and of the user's modules that it imports; (package, version) of installed packages."""
    top = module.partition(".")[0]
    waiting, seen, installed = [module], {module}, set[str]()
    while waiting:
        name = waiting.pop()
        spec = _spec(name)
        path = None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin).resolve()
        if path is None or not path.is_file() or any(path.is_relative_to(folder) for folder in OURS):
            continue
        if name.partition(".")[0] != top:
            if any(path.is_relative_to(folder) for folder in _INSTALLED):
                installed.add(name.partition(".")[0])
                continue
            if any(path.is_relative_to(folder) for folder in _STANDARD):
                continue
        content = path.read_bytes()
        yield name, content
        imported = _imports(content, name, is_package=spec is not None and spec.submodule_search_locations is not None)
        new = {part for found in (name, *imported) for part in _with_parents(found)} - seen
        seen |= new
        waiting += sorted(new)
    for package in sorted(installed):
        for distribution in _distributions().get(package, []):
            yield f"{package} of {distribution}", version_of(distribution).encode()


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # `from module import name` where `name` is not a module
        return None


def _imports(content: bytes, name: str, *, is_package: bool) -> set[str]:
    """Every name that the source may import as a module, at any depth; some are not modules."""
    package = name if is_package else name.rpartition(".")[0]
    found: set[str] = set()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # compiled or invalid source is hashed without its imports
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if base:
                found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


@lru_cache(maxsize=1)
def _distributions() -> dict[str, list[str]]:
    return {package: sorted(set(found)) for package, found in packages_distributions().items()}

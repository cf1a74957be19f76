"""What the key of a run covers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import planner
from loadgen.experiments import run_key
from loadgen.experiments.run_key import RunKeys, policy_digest
from loadgen.experiments.runs import Cell
from loadgen.sim import platforms as machines
from loadgen.sim.scenario import Scenario

FILES = {
    "own/__init__.py": "",
    "own/rules/__init__.py": "LIMIT = 1",
    "own/rules/deep.py": "DEEP = 1",
    "own/policy.py": "import json\nfrom . import rules\n\ndef place(algorithm):\n    from .rules import deep\n",
    "apart.py": "",
    "own/unused.py": "",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a policy, importable."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("own", "apart")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("own/policy.py", True),
        ("own/__init__.py", True),  # importing a module runs its package
        ("own/rules/__init__.py", True),  # a relative import
        ("own/rules/deep.py", True),  # an import inside a function
        ("own/unused.py", False),
        ("apart.py", False),
    ],
)
def test_the_sources_that_a_policy_imports(folder: Path, name: str, changes: bool) -> None:
    before = policy_digest("own.policy:P")
    assert before
    (folder / name).write_text(FILES[name] + "\n# edited\n")
    assert (policy_digest("own.policy:P") != before) is changes


def test_an_installed_package_counts_by_its_version(folder: Path) -> None:
    (folder / "apart.py").write_text("import numpy")
    before = policy_digest("apart:P")
    assert policy_digest("apart:P", lambda name: "9.9") != before
    assert policy_digest("apart:P") == before


def test_a_policy_without_a_source_is_never_reused() -> None:
    assert policy_digest("deepar") == ""
    assert policy_digest("no_such_module_anywhere:P") is None
    assert RunKeys().key(Cell(Scenario(policy="no_such_module_anywhere:P"), 0)) == ""


def test_each_part_of_a_run_has_a_key_of_its_own() -> None:
    scenario = Scenario(devices=3, edges=2)
    keys = RunKeys()
    cells = [
        Cell(scenario, 0),
        Cell(scenario, 1),
        Cell(replace(scenario, devices=4), 0),
        Cell(replace(scenario, policy="edge-only"), 0),
        Cell(replace(scenario, noise=0.1), 0),
        Cell(replace(scenario, slots=(1, 2)), 0),
    ]
    assert len({keys.key(cell) for cell in cells}) == len(cells)
    assert keys.key(Cell(replace(scenario, name="other"), 0, {"label": "x"})) == keys.key(cells[0])


def test_our_code_is_covered(tmp_path: Path) -> None:
    cell = Cell(Scenario(), 0)
    (tmp_path / "core.py").write_text("x = 1")
    folders = (*run_key.OURS, tmp_path)
    before = RunKeys(folders).key(cell)
    (tmp_path / "core.py").write_text("x = 2")
    assert RunKeys(folders).key(cell) != before
    assert {path.name for path in run_key.OURS[:3]} == {"bus", "planner", "loadgen"}


def test_an_edited_profile_is_read_again(tmp_path: Path) -> None:
    profile = tmp_path / "mine.json"
    text = (Path(planner.__path__[0]) / "data" / "paper.json").read_text()
    profile.write_text(text)
    assert machines.platforms(str(profile)).link1_bps != 7
    profile.write_text(text.replace('"link1_bps": 211560924', '"link1_bps": 7'))
    assert machines.platforms(str(profile)).link1_bps == 7

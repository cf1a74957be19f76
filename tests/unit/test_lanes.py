"""What may run beside what, held by a test: a file that is renamed must not leave its lane unnoticed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.lanes import LANE_OF_PREFIX, LANES, lane_of

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
REAL_TIME = {"tests.kafka_broker", "tests.compose_engine", "tests.namespaces", "tests.prometheus", "tests.browser"}
"""Modules that start programs."""


FIXTURES = {"kafka", "kafka_own"}
"""Fixtures of a plugin that start one."""


def starts_programs(path: Path) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    return bool(modules & REAL_TIME or arguments & FIXTURES)


def test_every_name_in_the_table_is_there() -> None:
    assert all((ROOT / name).exists() for name in LANE_OF_PREFIX)
    assert {lane_of(f"{file}::test") for file in FILES} == set(LANES)


@pytest.mark.parametrize("file", FILES)
def test_who_starts_programs_has_a_lane(file: str) -> None:
    assert lane_of(f"{file}::test_it[x]") or not starts_programs(ROOT / file)

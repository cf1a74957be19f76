"""The exact optimum by CP-SAT, with the extra `solvers` in an environment of its own: no policy of its model is below it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.kafka_local.artifacts import cache_root
from tests.client_environment import ROOT, environment, unavailable

LOCK = ROOT / "requirements-solvers.lock"
Case = Mapping[str, Any]


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with CP-SAT."""
    try:
        return environment(cache_root() / "test-solvers", LOCK)
    except (OSError, subprocess.SubprocessError) as error:
        unavailable("the environment with CP-SAT", error)


@pytest.fixture(scope="module")
def cases(python: Path) -> Sequence[Case]:
    command = [str(python), "-m", "tests.solvers.exact_cases", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def below_the_optimum(cases: Sequence[Case], optimum: str) -> list[str]:
    return [
        f"{policy}: {mean_s} is below {case[optimum]} in {case['case']}"
        for case in cases
        for policy, mean_s in case["means_s"].items()
        if mean_s < case[optimum] * (1 - 1e-9)
    ]


def test_no_policy_of_the_same_model_is_below_the_optimum(cases: Sequence[Case]) -> None:
    assert all(case["proven"] for case in cases)
    assert below_the_optimum(cases, "optimum_s") == []


def test_an_optimum_that_is_too_high_is_found_out(cases: Sequence[Case]) -> None:
    assert below_the_optimum([{**case, "optimum_s": 1.02 * case["optimum_s"]} for case in cases], "optimum_s")


def test_algorithm_1_is_optimal_where_tasks_hardly_compete(cases: Sequence[Case]) -> None:
    ratios = [case["means_s"]["deepar"] / case["optimum_s"] for case in cases]
    assert min(ratios) < 1.005
    assert max(ratios) > 1.01  # and greedy where they do


def test_the_bound_of_every_policy_is_not_above_the_optimum(cases: Sequence[Case]) -> None:
    both = [case for case in cases if case["fluid_s"] is not None]
    assert len(both) > 2
    assert [case for case in both if case["fluid_s"] > case["optimum_s"] * 1.001 + 0.002] == []

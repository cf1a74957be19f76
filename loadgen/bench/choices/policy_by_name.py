"""A policy that a task's name selects: a task `X.edge-only` is placed by `edge-only`.

One planner with this policy (`--policy loadgen.bench.choices.policy_by_name:PolicyByName`) runs all fixed policies of the
regret benchmark on the same stages, in any order.
"""

from __future__ import annotations

from planner.search.algorithm1 import Algorithm
from planner.search.placements import Choice
from planner.search.policies import BUILT_IN


def task_name(prefix: str, policy: str) -> str:
    """The name of a task that `policy` is to place."""
    return f"{prefix}.{policy}"


class PolicyByName:
    """Places each task by the built-in policy at the end of its name."""

    name = "policy-by-name"

    def place(self, algorithm: Algorithm) -> Choice | None:
        """The choice of the named policy. Raises KeyError for a task that names none."""
        return BUILT_IN[algorithm.request.task_id.rpartition(".")[2]].place(algorithm)

"""Solve small cases exactly; print the optimum, the bound of every policy and the delays under policies, as JSON."""

from __future__ import annotations

import json
import sys
from statistics import fmean
from typing import Any

import numpy as np

from bus.values import Objective
from loadgen.bounds.edge_case import edge_cases
from loadgen.bounds.exact_optimum import exact_optimum
from loadgen.bounds.fluid_bound import edge_bound
from loadgen.sim.core_driver import completed, drive
from loadgen.sim.scenario import Scenario
from tests.unit.loadgen.machines import machines

POLICIES = ("edge-only", "cloud-only", "no-delay", "deepar")


def scenarios(count: int) -> list[Scenario]:
    """Few tasks that compete for slots and links."""
    numbers = np.random.default_rng(12)
    found = []
    for _ in range(count):
        link2_bps = float(numbers.choice([15e6, 40e6, 1e9]))
        edges = int(numbers.integers(1, 3))
        scenario = Scenario(
            devices=int(numbers.integers(2, 5)),
            tasks=int(numbers.integers(3, 6)),
            edges=edges,
            reachable=int(numbers.integers(1, edges + 1)),
            within_s=float(numbers.choice([1.0, 10.0])),
            slots=(1, int(numbers.integers(1, 3))),
            samples=(1, int(numbers.choice([3, 40]))),
            edge_link1_bps=(50e6, 500e6),
            edge_link2_bps=(link2_bps, 2 * link2_bps),
            objective=Objective(numbers.choice(list(Objective))),
        )
        found.append(scenario)
    return found


def solved(scenario: Scenario, seed: int) -> dict[str, Any]:
    """The bounds and means of one case, as seconds a task."""
    optimum = exact_optimum(scenario, seed, machines())
    means_s = {}
    for policy in POLICIES:
        done = completed(drive(scenario.varied(policy=policy), seed, machines()))
        means_s[policy] = fmean(outcome.delay_s or 0.0 for outcome in done)
    fluid_s = None
    if scenario.reachable == 1 or scenario.edges == 1:
        edges = [edge_bound(case) for case in edge_cases(scenario, seed, machines())]
        fluid_s = sum(edge.delay_s for edge in edges) / optimum.tasks
    return {
        "case": f"{scenario}, seed {seed}",
        "optimum_s": optimum.delay_s / optimum.tasks,
        "proven": optimum.proven,
        "fluid_s": fluid_s,
        "means_s": means_s,
    }


if __name__ == "__main__":
    print(json.dumps([solved(scenario, seed) for seed, scenario in enumerate(scenarios(int(sys.argv[1])))]))

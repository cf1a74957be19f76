"""How far policies are from a lower bound of the mean delay, case by case.

A case is a scenario; each of its seeds gives tasks, their bound and the mean delay under each policy. All policies and the
bound see the same tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from bus.errors import ConfigError
from bus.values import Objective
from loadgen.bounds.edge_case import check_predictable, edge_cases
from loadgen.bounds.exact_optimum import exact_optimum
from loadgen.bounds.fluid_bound import edge_bound
from loadgen.experiments.runs import Cell, Progress, Row, Workers, run_cells
from loadgen.experiments.sweep import Axis
from loadgen.replay.metrics import half_width_95
from loadgen.sim.platforms import platforms
from loadgen.sim.scenario import Scenario

MANY: Final = Scenario(name="bound", devices=200, within_s=50.0, objective=Objective.PIPELINED)
"""The default case: 200 tasks on 10 edges within 50 seconds."""
FEW: Final = Scenario(name="exact", devices=12, edges=1, slots=(1, 3), within_s=50.0, objective=Objective.PIPELINED)
"""The default case of the exact optimum: 12 tasks that compete for one edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundOptions:
    """The cases, and what is compared in them."""

    out: Path  # folder of the picture
    scenario: Scenario = MANY  # its policy is replaced
    axes: tuple[Axis, ...] = ()  # each combination of their values is a case
    policies: tuple[str, ...] = ("deepar",)
    seeds: int = 5
    exact: bool = False  # the optimum of the paper's own model instead of the bound of every policy
    jobs: int = 1
    progress: Progress | None = None  # (runs done, runs in all)


@dataclass(frozen=True, slots=True)
class Distance:
    """One case: the bound, and the mean delays of the policies, by seed."""

    labels: dict[str, str]  # the values of the axes
    bounds: tuple[Row, ...]  # rows of `bound_cell`
    means_s: dict[str, tuple[float, ...]]  # policy -> mean delay of each seed

    @property
    def bound_s(self) -> float:
        """The bound, on the mean over the seeds."""
        return fmean(row["bound_s"] for row in self.bounds)

    def mean_s(self, policy: str) -> float:
        """The mean delay under a policy, on the mean over the seeds."""
        return fmean(self.means_s[policy])

    def ratio(self, policy: str) -> float:
        """The mean delay under a policy over the bound."""
        return self.mean_s(policy) / self.bound_s

    def half_width(self, policy: str) -> float | None:
        """Half the 95 % confidence interval of the ratio over the seeds; None for a single seed."""
        return half_width_95(
            [mean / row["bound_s"] for mean, row in zip(self.means_s[policy], self.bounds, strict=True)]
        )

    def as_object(self) -> dict[str, Any]:
        """The object in the output of `--json`."""
        return {
            "case": self.labels,
            "bound_s": self.bound_s,
            "policies": [
                {
                    "policy": policy,
                    "mean_s": self.mean_s(policy),
                    "ratio": self.ratio(policy),
                    "ratio_half_width_95": self.half_width(policy),
                }
                for policy in self.means_s
            ],
            "runs": [
                {**row, "means_s": {policy: means[index] for policy, means in self.means_s.items()}}
                for index, row in enumerate(self.bounds)
            ],
        }


def distances(options: BoundOptions) -> list[Distance]:
    """The distance of every policy to the bound in every case. Raises `ConfigError`."""
    cases = _cases(options)
    seeds = range(options.seeds)
    runs = [
        Cell(scenario.varied(policy=policy), seed)
        for _, scenario in cases
        for policy in options.policies
        for seed in seeds
    ]
    bounds = [Cell(scenario, seed) for _, scenario in cases for seed in seeds]
    total = len(runs) + len(bounds)
    tell = options.progress or (lambda done, total: None)
    rows = run_cells(runs, Workers(options.jobs), lambda done, _: tell(done, total))
    means = iter(complete_means(runs, rows))
    found = run_cells(
        bounds,
        Workers(options.jobs, None, partial(bound_cell, exact=options.exact)),
        lambda done, _: tell(len(runs) + done, total),
    )
    chunks = iter(found)
    return [
        Distance(
            labels,
            tuple(itertools.islice(chunks, options.seeds)),
            {policy: tuple(itertools.islice(means, options.seeds)) for policy in options.policies},
        )
        for labels, _ in cases
    ]


def bound_cell(cell: Cell, *, exact: bool) -> Row:
    """The bound of one scenario and seed, as the mean over its tasks."""
    scenario, seed = cell.scenario, cell.seed
    machines = platforms(scenario.profile)
    if exact:
        optimum = exact_optimum(scenario, seed, machines)
        return {"seed": seed, "bound_s": optimum.delay_s / optimum.tasks, "proven": optimum.proven}
    edges = [edge_bound(case) for case in edge_cases(scenario, seed, machines)]
    tasks = sum(edge.tasks for edge in edges)
    bound_s = sum(edge.delay_s for edge in edges) / tasks
    return {"seed": seed, "bound_s": bound_s, "program_s": sum(edge.program_s for edge in edges) / tasks}


def _cases(options: BoundOptions) -> list[tuple[dict[str, str], Scenario]]:
    found = []
    for values in itertools.product(*(axis.values for axis in options.axes)):
        varied = {axis.name: value for axis, value in zip(options.axes, values, strict=True)}
        scenario = options.scenario.varied(**varied)
        platforms(scenario.profile).require(scenario.models)
        check_predictable(scenario)
        found.append(({name: str(value) for name, value in varied.items()}, scenario))
    return found


def complete_means(runs: Sequence[Cell], rows: Sequence[Row]) -> list[float]:
    """The mean delays of runs. Raises `ConfigError` if a task of one did not complete."""
    for cell, row in zip(runs, rows, strict=True):
        if row["completed"] < row["tasks"]:
            raise ConfigError(
                f"policy {cell.scenario.policy}, seed {cell.seed}: {row['completed']} of {row['tasks']} tasks completed",
                remedy="leave this policy out: a mean over some of the tasks has no bound",
            )
    return [row["mean_delay_s"] for row in rows]

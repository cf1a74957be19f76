"""The optimum of the paper's own model for a few tasks with known arrivals: fixed grants, one pair of cuts, one start.

Each task chooses one way (edge, family, bandwidths) and a start from its arrival on. It holds its slot, its bandwidths and
its device for the whole delay, as in Algorithm 1. Bandwidths come from a grid and times are whole milliseconds, both rounded
so that the optimum stays a lower bound of every such schedule:

* A grant between two points of the grid has the delay of the upper one and takes the capacity of the lower one.
* Let a schedule be given. Replace each start and each end by the millisecond that it lies in. Tasks that then share a
  millisecond share the instants before its end in the schedule, too, so capacities hold; no start is before its arrival's
  millisecond, no task became shorter than its delay in whole milliseconds, and no end is later.

CP-SAT (the extra `solvers`) solves it. If that takes more than `EFFORT`, the bound that it has proven is returned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from bus.errors import ConfigError
from bus.messages import NodeAnnounced, TaskSubmitted
from bus.values import Objective, Role
from loadgen.bounds.edge_case import check_predictable
from loadgen.replay.schedule import Entry
from loadgen.sim.platforms import Platforms
from loadgen.sim.scenario import Scenario
from planner.search.cost import Overheads, PlatformRow
from planner.search.cut_search import CutSearch
from planner.search.families import ALL_THREE, DEVICE_CLOUD, DEVICE_EDGE

PER_S: Final = 1_000
"""Units of time in a second."""
STEP: Final = 1.1
"""Ratio of neighbouring bandwidths of the grid."""
LEVELS: Final = 24  # of the grid; less than the least of them takes no capacity
MOST_TASKS: Final = 20
WORKERS: Final = 2
EFFORT: Final = 30.0
"""Limit of the solver's work, in its own unit: about a second of a processor."""


class Way(NamedTuple):
    """One way to run a task, and what it holds while it runs."""

    delay: int  # whole milliseconds, rounded down
    edge: str  # "" for the device alone
    slots: int
    link1_bps: int
    link2_bps: int
    computes: bool  # the device computes layers


@dataclass(frozen=True, slots=True)
class Optimum:
    """The result of one case."""

    tasks: int
    delay_s: float  # lower bound of the sum of the delays of every schedule
    proven: bool  # it is the optimum of the rounded model, not just a bound of it


@dataclass(frozen=True, slots=True)
class _Edge:
    node: NodeAnnounced
    most1_bps: int  # all tasks that reach it together
    most2_bps: int


def exact_optimum(scenario: Scenario, seed: int, machines: Platforms) -> Optimum:
    """Solve one case. Raises `ConfigError` if CP-SAT is not installed or the case is too large."""
    if scenario.task_count > MOST_TASKS:
        raise ConfigError(
            f"--exact: {scenario.task_count} tasks are more than {MOST_TASKS}",
            remedy="lower `devices` or `tasks`, or leave out --exact for a bound of any number of tasks",
        )
    check_predictable(scenario)
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise ConfigError(
            "--exact needs CP-SAT", remedy="pip install 'deepar[solvers]', or pip install -r requirements-solvers.lock"
        ) from None
    entries = scenario.schedule(seed).entries
    choices = _ways(scenario, seed, machines, entries)
    nodes = {node.node: node for node in scenario.nodes(seed, machines.profiles) if node.role is Role.EDGE}
    model: Any = cp_model.CpModel()
    horizon = math.floor(max(entry.at_s for entry in entries) * PER_S) + sum(
        max(w.delay for w in one) for one in choices
    )
    held: dict[tuple[str, str], list[tuple[Any, int]]] = {}
    ends = []
    for entry, ways in zip(entries, choices, strict=True):
        start = model.new_int_var(math.floor(entry.at_s * PER_S), horizon, entry.task.task_id)
        chosen = [model.new_bool_var("") for _ in ways]
        model.add_exactly_one(chosen)
        ends.append(start + sum(way.delay * one for way, one in zip(ways, chosen, strict=True)))
        for way, one in zip(ways, chosen, strict=True):
            time = model.new_optional_fixed_size_interval_var(start, way.delay, one, "")
            for what, name, amount in _held(way, entry.task.device):
                held.setdefault((what, name), []).append((time, amount))
    for (what, name), users in held.items():
        capacity = 1 if what == "device" else getattr(nodes[name], what)
        model.add_cumulative([time for time, _ in users], [amount for _, amount in users], capacity)
    model.minimize(sum(ends))
    solver = cp_model.CpSolver()
    solver.parameters.max_deterministic_time = EFFORT
    solver.parameters.num_workers = WORKERS
    status = solver.solve(model)
    arrivals_s = sum(entry.at_s for entry in entries)
    bound_s = max(0.0, math.ceil(solver.best_objective_bound - 1e-6) / PER_S - arrivals_s)
    return Optimum(len(entries), bound_s, status == cp_model.OPTIMAL)


def _held(way: Way, device: str) -> Iterator[tuple[str, str, int]]:
    for what, amount in (
        ("slots", way.slots),
        ("link1_capacity_bps", way.link1_bps),
        ("link2_capacity_bps", way.link2_bps),
    ):
        if amount:
            yield what, way.edge, amount
    if way.computes:
        yield "device", device, 1


def _ways(scenario: Scenario, seed: int, machines: Platforms, entries: Sequence[Entry]) -> list[list[Way]]:
    """The ways of each task that no other way makes needless."""
    nodes = {node.node: node for node in scenario.nodes(seed, machines.profiles)}
    every = tuple(node.node for node in nodes.values() if node.role is Role.EDGE)
    rows = {role: {one.model: PlatformRow(one) for one in machines.profiles[role]} for role in Role}
    reach = [nodes[entry.task.device].reachable_edges or every for entry in entries]
    edges = {
        name: _Edge(
            nodes[name],
            *(
                sum(
                    _cap(entry.task, nodes[name], link)
                    for entry, near in zip(entries, reach, strict=True)
                    if name in near
                )
                for link in (1, 2)
            ),
        )
        for name in every
    }
    overheads = Overheads(scenario.link1_latency_s, scenario.link2_latency_s)
    found = []
    for entry, near in zip(entries, reach, strict=True):
        model = entry.task.model
        search = CutSearch(*(rows[role].get(model) for role in (Role.DEVICE, Role.EDGE, Role.CLOUD)))  # type: ignore[arg-type]
        ways = list(_alone(entry.task, search, scenario.objective))
        for name in near:
            ways += _through(entry.task, edges[name], search, scenario.objective, overheads)
        found.append(_undominated(ways))
    return found


def _cap(task: TaskSubmitted, edge: NodeAnnounced, link: int) -> int:
    own, capacity = (
        (task.max_link1_bps, edge.link1_capacity_bps) if link == 1 else (task.max_link2_bps, edge.link2_capacity_bps)
    )
    return min(own or capacity, capacity)


def _alone(task: TaskSubmitted, search: CutSearch, objective: Objective) -> Iterator[Way]:
    delay_s = search.device_s(task.samples, objective)
    if delay_s is not None:
        yield Way(math.floor(delay_s * PER_S), "", 0, 0, 0, True)


def _through(
    task: TaskSubmitted, edge: _Edge, search: CutSearch, objective: Objective, overheads: Overheads
) -> Iterator[Way]:
    """Every family through one edge, at every grant of the grids, with and without layers on the device."""
    node = edge.node
    grants1 = _grants(_cap(task, node, 1), edge.most1_bps <= node.link1_capacity_bps)
    grants2 = _grants(_cap(task, node, 2), edge.most2_bps <= node.link2_capacity_bps)
    for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE):
        if family != DEVICE_CLOUD and not node.slots:
            continue
        for low1, high1 in grants1:
            for low2, high2 in ((0, 1),) if family == DEVICE_EDGE else grants2:
                for free in (True, False):
                    best = search.best(family, high1, high2, task.samples, objective, task.input_bytes, free, overheads)
                    if best is not None:
                        delay_s, cut1, cut2 = best
                        slots = int(cut1 != cut2)
                        yield Way(math.floor(delay_s * PER_S), node.node, slots, low1, low2, cut1 > 0)


def _grants(cap_bps: int, enough: bool) -> list[tuple[int, int]]:
    """The cells of a grid of grants: what is taken, and what the delay is computed with. One cell if all caps fit."""
    if enough:
        return [(0, cap_bps)]
    points = [cap_bps, *(math.floor(cap_bps / STEP**level) for level in range(1, LEVELS)), 0]
    return [(points[0], points[0]), *((low, high) for high, low in itertools.pairwise(points) if high)]


def _undominated(ways: Sequence[Way]) -> list[Way]:
    """The ways without those that take as long and hold as much as another one."""
    kept: list[Way] = []
    for way in sorted(set(ways)):  # by delay
        if not any(other.edge in ("", way.edge) and _holds_no_more(other, way) for other in kept):
            kept.append(way)
    return kept


def _holds_no_more(one: Way, other: Way) -> bool:
    return (
        one.slots <= other.slots
        and one.link1_bps <= other.link1_bps
        and one.link2_bps <= other.link2_bps
        and one.computes <= other.computes
    )

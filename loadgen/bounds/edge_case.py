"""The tasks and the capacity of one edge, as the bounds see them: station times of every route at full bandwidth caps.

A route is a pair of cuts. If each device reaches one edge, edges share nothing, and a bound of the region is the sum of the
bounds of its edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bus.errors import ConfigError
from bus.messages import NodeAnnounced
from bus.values import Role
from loadgen.replay.schedule import Entry
from loadgen.sim.platforms import Platforms
from loadgen.sim.scenario import Scenario
from planner.search.cost import Costs, PlatformRow

Vector = npt.NDArray[np.float64]

STATIONS = 7  # device, link 1, edge, link 2, cloud, result over link 2, result over link 1
LINK1, SLOT, LINK2 = 1, 2, 3  # the stations whose capacity tasks share
SHARED = (SLOT, LINK1, LINK2)


@dataclass(frozen=True, slots=True, eq=False)
class FluidTask:
    """One task: its routes, with the least station times that any grant allows."""

    task_id: str
    arrival_s: float
    samples: int
    stations_s: Vector  # (routes, stations): seconds of one sample
    caps_bps: tuple[int, int]  # most bandwidth on link 1 and link 2: at these the station times were taken

    @property
    def shortest_s(self) -> float:
        """The least time of one sample from end to end."""
        return float(self.stations_s.sum(axis=1).min())

    def weight(self, station: int) -> float:
        """What the task takes of the capacity of a shared station while it uses it fully: a slot, or its bandwidth."""
        return 1.0 if station == SLOT else float(self.caps_bps[0 if station == LINK1 else 1])

    def ends_s(self) -> tuple[Vector, Vector]:
        """For each station the least time of a sample before it, and behind it, on a route that uses it."""
        times = self.stations_s
        before = np.cumsum(times, axis=1) - times
        behind = times.sum(axis=1, keepdims=True) - before - times
        used = times > 0
        heads = np.where(used, before, np.inf).min(axis=0)
        tails = np.where(used, behind, np.inf).min(axis=0)
        return np.where(np.isfinite(heads), heads, 0.0), np.where(np.isfinite(tails), np.maximum(tails, 0.0), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class EdgeCase:
    """One edge and the tasks that can only use it."""

    edge: str
    slots: int
    link1_bps: int
    link2_bps: int
    tasks: tuple[FluidTask, ...]

    def capacity(self, station: int) -> float:
        """The capacity of a shared station."""
        return float({SLOT: self.slots, LINK1: self.link1_bps, LINK2: self.link2_bps}[station])

    @property
    def scarce(self) -> tuple[int, ...]:
        """The shared stations that all tasks together can exhaust."""
        return tuple(k for k in SHARED if sum(task.weight(k) for task in self.tasks) > self.capacity(k))


def edge_cases(scenario: Scenario, seed: int, machines: Platforms) -> list[EdgeCase]:
    """The edges of a scenario that have tasks, with these. Raises `ConfigError` where the bound does not hold."""
    _check(scenario)
    nodes = scenario.nodes(seed, machines.profiles)
    near = {node.node: node for node in nodes if node.role is Role.DEVICE}
    entries: dict[str, list[Entry]] = {}
    for entry in scenario.schedule(seed).entries:
        reachable = near[entry.task.device].reachable_edges
        edge = reachable[0] if reachable else next(node.node for node in nodes if node.role is Role.EDGE)
        entries.setdefault(edge, []).append(entry)
    rows = {role: {one.model: PlatformRow(one) for one in machines.profiles[role]} for role in Role}
    edges = {node.node: node for node in nodes if node.role is Role.EDGE}
    return [_case(edges[name], entries[name], rows) for name in sorted(entries)]


def _check(scenario: Scenario) -> None:
    if scenario.reachable != 1 and scenario.edges > 1:
        raise ConfigError(
            "the bound needs devices that reach one edge, because it is computed for each edge alone",
            remedy="set reachable = 1, or use --exact for a few tasks",
        )
    check_predictable(scenario)


def check_predictable(scenario: Scenario) -> None:
    """Raise `ConfigError` if a scenario has what no bound of predicted delays covers."""
    if scenario.codecs:
        raise ConfigError(
            "codecs: the bound knows activations as they are, so encoded ones may be below it",
            remedy="leave codecs out of the scenario",
        )
    for name in ("noise", "drift", "learn", "deadline_s", "link1_trace", "link2_trace", "codecs"):
        if getattr(scenario, name):
            raise ConfigError(
                f"{name}: the bound covers tasks that take what is predicted, all complete, and send raw activations",
                remedy=f"leave {name} out of the scenario",
            )


def _case(edge: NodeAnnounced, entries: Sequence[Entry], rows: dict[Role, dict[str, PlatformRow]]) -> EdgeCase:
    link1_bps, link2_bps = edge.link1_capacity_bps, edge.link2_capacity_bps
    tasks = []
    for entry in entries:
        task = entry.task
        device, middle, cloud = (rows[role].get(task.model) for role in (Role.DEVICE, Role.EDGE, Role.CLOUD))
        if device is None:
            raise ConfigError(f"no device profile of {task.model}")
        caps = min(task.max_link1_bps or link1_bps, link1_bps), min(task.max_link2_bps or link2_bps, link2_bps)
        costs = Costs(device, middle, cloud)
        forbidden = device.forbidden.union(*(row.forbidden for row in (middle, cloud) if row is not None))
        times = [costs.sample_parts(c1, c2, *caps, task.input_bytes) for c1, c2 in _routes(costs, forbidden)]
        tasks.append(FluidTask(task.task_id, entry.at_s, task.samples, np.array(times), caps))
    return EdgeCase(edge.node, edge.slots, link1_bps, link2_bps, tuple(tasks))


def _routes(costs: Costs, forbidden: frozenset[int]) -> list[tuple[int, int]]:
    """Every pair of cuts: the device alone first."""
    layers = costs.layers
    positions = [at for at in range(layers) if at not in forbidden]
    found = [(layers, layers)]
    for cut1 in positions:
        if costs.edge is not None:
            found.append((cut1, layers))
        if costs.cloud is not None:
            found.append((cut1, cut1))
        if costs.edge is not None and costs.cloud is not None:
            found += [(cut1, cut2) for cut2 in positions if cut2 > cut1]
    return found

"""A loaded planner core without shells: many tasks in flight, and a new task for each that ends."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from typing import Any

from bus.messages import NodeAnnounced, SeedInput, Start, TaskCompleted, TaskSubmitted
from bus.values import ModelProfile, Objective, Parts, Role
from planner.core.core import PlannerCore
from planner.core.options import CoreOptions
from planner.search.profiles import load_profile

REACHABLE = 4
CROWDED = 500
"""Tasks per edge from which a step takes milliseconds. Above it fewer steps are measured, and the region is filled in a
tenth of the time so that fewer tasks end meanwhile.
"""

SHARE_LINK1_BPS = (80e6, 300e6)
SHARE_LINK2_BPS = (8e6, 40e6)
SHARE_SLOTS = (0.1, 0.6)
"""Capacity of an edge per task in flight, chosen so that about a third of the tasks wait."""


@dataclass
class BusyRegion:
    """A region in steady state: a constant number of tasks in flight, with a new task for each that ends."""

    core: PlannerCore
    rng: random.Random
    models: list[str]
    now: float = 0.0
    submitted: int = 0
    ends: list[tuple[float, str, TaskCompleted]] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)  # devices without a task; a device has at most one

    def next_task(self) -> TaskSubmitted:
        """A task with Figure 4's parameters, for a device without a task."""
        rng = self.rng
        self.submitted += 1
        at = rng.randrange(len(self.idle))
        self.idle[at], self.idle[-1] = self.idle[-1], self.idle[at]
        return TaskSubmitted(
            task_id=f"t{self.submitted}",
            device=self.idle.pop(),
            model=rng.choice(self.models),
            samples=rng.randint(1, 1000),
            input=SeedInput(seed=self.submitted),
            max_link1_bps=int(rng.uniform(20e6, 300e6)),
            max_link2_bps=int(rng.uniform(10e6, 50e6)),
            input_bytes=rng.randint(10_000, 1_000_000),
        )

    def take(self, event: TaskSubmitted | TaskCompleted) -> list[Any]:
        """Handle an event and schedule the ends of the tasks that it starts."""
        changes = self.core.handle(event, self.now)
        self.note(changes)
        return changes

    def note(self, changes: list[Any]) -> None:
        """Schedule the end of a started task, slightly before or after its predicted end."""
        for change in changes:
            if isinstance(change, Start):
                length = self.core.ledger.reservations[change.task_id].length_s
                end_s = self.now + length * self.rng.uniform(0.9, 1.02)
                done = TaskCompleted(
                    task_id=change.task_id, attempt=1, node=change.device, measured=Parts(), delay_s=length
                )
                heapq.heappush(self.ends, (end_s, change.task_id, done))

    def one_ends(self) -> None:
        """Advance to the next completion."""
        end_s, _, done = heapq.heappop(self.ends)
        self.now = max(self.now, end_s)
        self.take(done)
        self.idle.append(done.node)


def busy_region(edges: int, tasks: int, objective: Objective, seed: int, policy: str = "deepar") -> BusyRegion:
    """A region with `tasks` tasks in flight that arrived one after another."""
    rng = random.Random(f"{seed} {edges} {tasks} {objective}")
    rows = load_profile("paper")
    core = PlannerCore(0, policy, objective, options=CoreOptions(max_waiting=1 << 30))
    share = max(1.0, tasks / edges)
    devices = tasks + 50
    core.handle(_node("cloud", Role.CLOUD, rows.cloud), 0.0)
    for i in range(edges):
        capacities = {
            "slots": max(1, round(share * rng.uniform(*SHARE_SLOTS))),
            "link1_capacity_bps": int(share * rng.uniform(*SHARE_LINK1_BPS)),
            "link2_capacity_bps": int(share * rng.uniform(*SHARE_LINK2_BPS)),
        }
        core.handle(_node(f"e{i}", Role.EDGE, rows.edge, **capacities), 0.0)
    for i in range(devices):
        reachable = tuple(f"e{j}" for j in rng.sample(range(edges), REACHABLE))
        core.handle(_node(f"d{i}", Role.DEVICE, rows.device, reachable_edges=reachable), 0.0)
    region = BusyRegion(core, rng, rows.models, idle=[f"d{i}" for i in range(devices)])
    crowded = tasks / edges >= CROWDED
    gap_s = (3.0 if crowded else 30.0) / tasks  # a task takes about a minute
    while len(core.tasks) < tasks:
        region.take(region.next_task())
        region.now += rng.expovariate(1.0) * gap_s
        while region.ends and region.ends[0][0] <= region.now:
            region.one_ends()
        if region.submitted > tasks and region.submitted % (tasks // 4) == 0:
            gap_s *= 0.6  # tasks end as fast as they arrive
    for _ in range(100 if crowded else min(tasks, 1000)):
        region.one_ends()
        region.take(region.next_task())
    return region


def _node(name: str, role: Role, models: dict[str, ModelProfile], **values: Any) -> NodeAnnounced:
    return NodeAnnounced(node=name, role=role, incarnation="i", lease_s=1e9, models=tuple(models.values()), **values)

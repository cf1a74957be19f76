"""Core-only driver: the real `PlannerCore` in virtual time, with stages replaced by their delays.

A heap of (time, priority, sequence, event) feeds the core with the messages that the service reads from the bus. A
task that the core starts ends after its predicted delay, or after what `loadgen.sim.environment` says if the scenario has
noise or drift. There is no bus, no encoding and no event loop, so figures, sweeps and runs with millions of tasks use this
driver.
`loadgen.sim.simulator` runs the complete live code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, NamedTuple

from bus.errors import ConfigError, InvariantError, PolicyError
from bus.messages import (
    Ended,
    LinkMeasurement,
    NodeAnnounced,
    NodeHeartbeat,
    Placed,
    Rerouted,
    Retried,
    Start,
    TaskCompleted,
    TaskState,
)
from bus.unchecked_constructors import maker
from bus.values import Parts, Role
from loadgen.replay.outcome import Outcome
from loadgen.replay.schedule import Entry
from loadgen.sim.environment import Drift, Environment, LogNormal, Ran, World, as_predicted
from loadgen.sim.platforms import Platforms
from loadgen.sim.scenario import Scenario
from planner.core.core import PlannerCore, Tick
from planner.core.options import CoreOptions
from planner.core.rerouting import samples_left
from planner.search.cost import Overheads

_END = 0  # at equal times, resources are freed before new requests are handled
UNLIMITED = 1 << 60
LINKS_EVERY_S = 5.0
"""Least time between two reports of links, as of heartbeats of live nodes."""
MOST_LINKS = 100
"""Limit of links in one heartbeat."""
_completed = maker(TaskCompleted)  # skips validation: the values are computed here


class _Run(NamedTuple):
    """What a running task takes: all of it, or the rest since it was last rerouted."""

    attempt: int
    samples: int  # at `from_s`
    from_s: float
    end_s: float
    ran: Ran  # from `from_s` on
    before: Parts  # busy times until then


@dataclass(slots=True)
class Drive:
    """One run of the core over a schedule."""

    core: PlannerCore
    on_end: Callable[[Outcome], None]  # called once per task, in order of end time
    world: World = as_predicted  # what a started task takes
    now_s: float = 0.0
    _heap: list[tuple[float, int, int, Any]] = field(default_factory=list)
    _sequence: int = 0
    _live: dict[str, Outcome] = field(default_factory=dict)  # tasks that have not ended
    _runs: dict[str, _Run] = field(default_factory=dict)  # of running tasks
    _wakeup_s: float = math.inf
    _links: list[NodeHeartbeat] = field(default_factory=list)
    _reported_s: float = 0.0  # when the links were last reported
    _idle_speeds: Callable[[float], Iterable[NodeHeartbeat]] | None = None  # see `measure_speeds`

    def announce(self, nodes: Iterable[NodeAnnounced]) -> None:
        """Let the nodes join at time 0."""
        for node in nodes:
            self._handle(node)

    def measure_links(self, nodes: Sequence[NodeAnnounced]) -> None:
        """Report the links of these nodes now and, while tasks arrive, every `LINKS_EVERY_S`."""
        self._links = self._reports(nodes)
        self._report_links()

    def measure_speeds(self, reports: Callable[[float], Iterable[NodeHeartbeat]]) -> None:
        """Report with the links what nodes without work measure of their speed; `reports`: the heartbeats at a time."""
        self._idle_speeds = reports

    def _report_links(self) -> None:
        for heartbeat in self._links:
            self._handle(heartbeat)
        for heartbeat in () if self._idle_speeds is None else self._idle_speeds(self.now_s):
            self._handle(heartbeat)
        self._reported_s = self.now_s

    def _reports(self, nodes: Sequence[NodeAnnounced]) -> list[NodeHeartbeat]:
        """Heartbeats with the declared latencies: what a link carries is learned only of a link that is measured."""
        edges = [node.node for node in nodes if node.role is Role.EDGE]
        found = []
        for node in nodes:
            link, ends, latency_s = 1, node.reachable_edges, node.link1_latency_s
            if node.role is Role.EDGE:
                link, ends, latency_s = 2, (node.node,), node.link2_latency_s
            elif node.role is Role.CLOUD:
                continue
            links = tuple(
                LinkMeasurement(link=link, edge=edge, latency_s=latency_s or 0.0)
                for edge in (edges if ends is None else ends)[:MOST_LINKS]
            )
            if links:
                found.append(NodeHeartbeat(node=node.node, incarnation=node.incarnation, links=links))
        return found

    def run(self, entries: Iterable[Entry]) -> None:
        """Run until the last task has ended. `entries` may be a generator; it is read one entry ahead.

        Raises `InvariantError` if unfinished tasks remain and no event is left that could end them.
        """
        arrivals = iter(entries)
        upcoming = next(arrivals, None)
        heap = self._heap
        while upcoming is not None or heap:
            if heap and (upcoming is None or heap[0][0] <= upcoming.at_s):
                instant, completion = heap[0][0], True
            else:
                assert upcoming is not None
                instant, completion = upcoming.at_s, False
            if self._wakeup_s < instant:
                self.now_s = max(self.now_s, self._wakeup_s)
                self._handle(Tick())
                continue
            self.now_s = instant
            if completion:
                self._complete(heappop(heap)[3])
            else:
                assert upcoming is not None
                if self._links and self.now_s >= self._reported_s + LINKS_EVERY_S:
                    self._report_links()
                self._submit(upcoming)
                upcoming = next(arrivals, None)
        while self._live and self._wakeup_s < math.inf and self._expires():
            self.now_s = self._wakeup_s
            self._handle(Tick())
        if self._live:
            names = ", ".join(list(self._live)[:5])
            raise InvariantError(f"{len(self._live)} tasks are unfinished and no event is left: {names}")

    def _expires(self) -> bool:
        # Only a deadline can end a task now; a wake-up after the last deadline is a lease of a simulated node.
        return self._wakeup_s < 1e8

    def _submit(self, entry: Entry) -> None:
        task = entry.task
        outcome = Outcome(task.task_id, task.model, task.device, task.samples, entry.at_s, entry.warmup)
        outcome.submitted_s = self.now_s
        self._live[task.task_id] = outcome
        self._handle(task)

    def _complete(self, completion: tuple[str, _Run]) -> None:
        task_id, run = completion
        outcome = self._live.get(task_id)
        if outcome is None or self._runs.get(task_id) is not run:
            return  # the task ended for another reason, was retried or rerouted
        started_s = outcome.started_s if outcome.started_s is not None else self.now_s
        self._handle(
            _completed(
                task_id=task_id,
                attempt=run.attempt,
                node=outcome.device,
                measured=run.before.plus(run.ran.parts),
                delay_s=self.now_s - started_s,
                wait_s=started_s - outcome.scheduled_s,
                route_samples=run.ran.route_samples,
            )
        )

    def _handle(self, event: Any) -> None:
        now_s, live = self.now_s, self._live
        for change in self.core.handle(event, now_s):
            if isinstance(change, Placed):
                live[change.task_id].place(change, now_s)
            elif isinstance(change, Start):
                task_id = change.task_id
                outcome = live[task_id]
                outcome.started_s = now_s
                task = self.core.tasks.get(task_id)
                if task is None or task.placed is None:
                    continue  # a later change of the same event ended it
                ran = self.world(task.submitted, task.placed, now_s)
                self._run(task_id, _Run(change.attempt, outcome.samples, now_s, now_s + ran.delay_s, ran, Parts()))
            elif isinstance(change, Rerouted):
                self._reroute(change)
            elif isinstance(change, Retried):
                live[change.task_id].started_s = None
                self._runs.pop(change.task_id, None)
            elif isinstance(change, Ended):
                outcome = live.pop(change.task_id)
                self._runs.pop(change.task_id, None)
                outcome.state, outcome.cause, outcome.ended_s = change.state, change.cause, now_s
                outcome.measured, outcome.device_delay_s = change.measured, change.delay_s
                if change.cause == "policy_error":
                    raise PolicyError(f"task {change.task_id}: {change.detail}")
                self.on_end(outcome)
        wakeup_s = self.core.next_wakeup()
        self._wakeup_s = math.inf if wakeup_s is None else wakeup_s

    def _run(self, task_id: str, run: _Run) -> None:
        self._runs[task_id] = run
        self._sequence += 1
        heappush(self._heap, (run.end_s, _END, self._sequence, (task_id, run)))

    def _reroute(self, change: Rerouted) -> None:
        """End a task by what is really left of it: the share of its delay that has not passed, on its new placement."""
        now_s, task_id, old = self.now_s, change.task_id, self._runs[change.task_id]
        task = self.core.tasks.get(task_id)
        if task is None or task.placed is None:
            return  # a later change of the same event ended it
        self._live[task_id].reroute(task.placed)
        left = samples_left(old.samples, old.from_s, old.end_s, now_s)
        ran = self.world(task.submitted, task.placed, now_s)
        if left != change.samples:  # the planner's prediction was off
            ran = Ran(Parts().plus(ran.parts, left / change.samples), ran.delay_s * left / change.samples)
        before = old.before.plus(old.ran.parts, 1.0 - left / old.samples)
        self._run(task_id, _Run(old.attempt, left, now_s, now_s + ran.delay_s, ran, before))


def core_for(scenario: Scenario) -> PlannerCore:
    """A new core with the scenario's policy and objective."""
    return PlannerCore(
        0,
        policy=scenario.policy,
        objective=scenario.objective,
        execution=scenario.runs_as,
        options=CoreOptions(  # the paper's queue is unbounded
            max_waiting=UNLIMITED, max_waiting_per_device=UNLIMITED, learning=scenario.learn
        ),
    )


def drive(scenario: Scenario, seed: int, platforms: Platforms) -> list[Outcome]:
    """Run a scenario through the core and return the outcomes in due order.

    Delays are the predicted ones, unless the scenario has noise or drift: see `loadgen.sim.environment`. Raises
    `ConfigError`, `InvariantError`, `PolicyError`.
    """
    if scenario.link1_trace is not None or scenario.link2_trace is not None:
        raise ConfigError(
            f"{scenario.name}: this driver ends tasks after their predicted delay, and no prediction knows a trace",
            remedy="give a latency (link1_latency_s, link2_latency_s), or play traces with `deepar simulate compare`",
        )
    platforms.require(scenario.models)
    outcomes: list[Outcome] = []
    run = Drive(core_for(scenario), outcomes.append, world_of(scenario, seed, platforms))
    nodes = scenario.nodes(seed, platforms.profiles)
    run.announce(nodes)
    if scenario.learn:
        run.measure_links(nodes)
    run.run(scenario.schedule(seed).entries)
    return sorted(outcomes, key=lambda outcome: (outcome.scheduled_s, int(outcome.task_id.rpartition("-")[2])))


def world_of(scenario: Scenario, seed: int, platforms: Platforms) -> World:
    """What tasks take in a scenario; the same for every policy."""
    if not (scenario.noise or scenario.drift):
        return as_predicted
    factor = LogNormal(scenario.noise, seed) if scenario.noise else None
    speed = Drift(scenario.drift, seed) if scenario.drift else None
    return Environment(platforms, factor, speed, Overheads(scenario.link1_latency_s, scenario.link2_latency_s))


def completed(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The completed outcomes, over which figures compute means. In the paper's settings all tasks complete."""
    return [outcome for outcome in outcomes if outcome.state is TaskState.COMPLETED]

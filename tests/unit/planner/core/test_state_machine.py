"""A region to which anything happens: (8)-(11) hold at every instant, and every task ends once.

The books are kept here a second time, from the changes alone: what runs, where, with how much.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bus.messages import (
    Change,
    Decision,
    Ended,
    HandleInput,
    NodeAnnounced,
    NodeHeartbeat,
    NodeJoined,
    NodeLeft,
    NodeLost,
    Placed,
    Rerouted,
    Retried,
    SeedInput,
    SessionTerms,
    Start,
    TaskCancelled,
    TaskSubmitted,
)
from bus.values import Objective, Role
from planner.core.core import Event, PlannerCore, Tick
from planner.core.options import CoreOptions
from tests.unit.planner.scenes import MBPS, cloud, completed, decision_of, device, edge, failed, task

EDGES, DEVICES, CLOUDS = ("e1", "e2"), ("d1", "d2", "d3"), ("c1", "c2")
NODES = EDGES + DEVICES + CLOUDS
LEASE_S = 20.0


class Region(RuleBasedStateMachine):
    """Every rule is something that can happen to a planner."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.log: list[Decision] = []
        self.submitted: list[TaskSubmitted] = []
        self.ended: dict[str, Ended] = {}
        self.attempts: dict[str, int] = {}
        self.placed: dict[str, Placed] = {}
        self.running: dict[str, Placed] = {}
        self.joined: dict[str, NodeAnnounced] = {}
        self.incarnations = 0

    @initialize(
        objective=st.sampled_from(Objective),
        fair=st.booleans(),
        policy=st.sampled_from(["deepar", "edge-only", "no-delay", "elastic", "elastic"]),
    )
    def open(self, objective: Objective, fair: bool, policy: str) -> None:
        self.settings: dict[str, Any] = {
            "objective": Objective.PIPELINED if policy == "elastic" else objective,
            "policy": policy,
            "options": CoreOptions(max_waiting=6, patience_s=200.0, fair=fair),
        }
        self.core = PlannerCore(0, **self.settings)
        for name in ("e1", "c1", "d1", "d2"):
            self.join(name, 1, 200, 40)

    # --- what can happen

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for name, node in self.joined.items():
            self.take(NodeHeartbeat(node=name, incarnation=node.incarnation))

    @rule(seconds=st.sampled_from([1.0, 15.0, 25.0]))
    def silence(self, seconds: float) -> None:
        self.now += seconds
        self.take(Tick())

    @rule(
        node=st.sampled_from(DEVICES),
        samples=st.integers(1, 60),
        held=st.booleans(),
        deadline_s=st.sampled_from([None, None, 3.0, 30.0]),
        input_bytes=st.sampled_from([None, 1_000, 400_000]),
        link1=st.sampled_from([None, 0, 20, 90]),
        link2=st.sampled_from([None, 10, 60]),
        priority=st.sampled_from([None, None, 1, 5]),
    )
    def submit(self, node, samples, held, deadline_s, input_bytes, link1, link2, priority) -> None:  # type: ignore[no-untyped-def]
        event = task(
            f"t{len(self.submitted)}",
            node,
            samples=samples,
            input=HandleInput(handle="h") if held else SeedInput(seed=1),
            deadline_s=deadline_s,
            input_bytes=input_bytes,
            priority=priority,
            max_link1_bps=None if link1 is None else link1 * MBPS,
            max_link2_bps=None if link2 is None else link2 * MBPS,
        )
        self.submitted.append(event)
        self.take(event)
        assert event.task_id in self.attempts

    @rule(
        node=st.sampled_from(DEVICES),
        rate_hz=st.sampled_from([0.5, 5.0, 40.0]),
        latency_s=st.sampled_from([None, 0.01, 0.5]),
        held=st.booleans(),
        link1=st.sampled_from([None, 0, 20]),
        tiers=st.sampled_from([None, (Role.EDGE,), (Role.DEVICE, Role.CLOUD)]),
    )
    def open_session(self, node, rate_hz, latency_s, held, link1, tiers) -> None:  # type: ignore[no-untyped-def]
        event = task(
            f"t{len(self.submitted)}",
            node,
            samples=1,
            input=HandleInput(handle="h") if held else SeedInput(seed=1),
            max_link1_bps=None if link1 is None else link1 * MBPS,
            session=SessionTerms(rate_hz=rate_hz, latency_s=latency_s),
            tiers=tiers,
        )
        self.submitted.append(event)
        self.take(event)

    @rule(which=st.integers(0, 99))
    def submit_again(self, which: int) -> None:
        if self.submitted:
            assert self.take(self.submitted[which % len(self.submitted)]) == []

    @rule(which=st.integers(0, 99), when=st.sampled_from(["now", "on time", "late"]), again=st.booleans())
    def complete(self, which: int, when: str, again: bool) -> None:
        if not self.running:
            return
        task_id = sorted(self.running)[which % len(self.running)]
        held = self.core.ledger.reservations[task_id]
        if when != "now" and self.placed[task_id].session is None:
            self.now = max(self.now, held.end_s + (0.4 if when == "late" else 0.0))
        event = completed(task_id, self.running[task_id].device, self.attempts[task_id])
        self.take(event)
        if again:
            assert self.take(event) == []

    @rule(which=st.integers(0, 99), retryable=st.booleans(), stale=st.booleans())
    def fail(self, which: int, retryable: bool, stale: bool) -> None:
        if not self.running:
            return
        task_id = sorted(self.running)[which % len(self.running)]
        attempt = self.attempts[task_id] - stale
        if attempt < 1:
            return
        changes = self.take(failed(task_id, "e1", attempt, retryable=retryable))
        assert bool(changes) != stale

    @rule(which=st.integers(0, 99))
    def complete_what_was_taken_back(self, which: int) -> None:
        """A completion that was on its way while its attempt was fenced: reordered, and still true."""
        late = sorted(t for t, attempt in self.attempts.items() if attempt > 1 and t not in self.ended)
        if late:
            task_id = late[which % len(late)]
            self.take(completed(task_id, self.core.tasks[task_id].submitted.device, attempt=1))
            assert task_id in self.ended

    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        if self.submitted:
            self.take(TaskCancelled(task_id=self.submitted[which % len(self.submitted)].task_id))

    @rule(
        name=st.sampled_from(NODES),
        slots=st.integers(0, 3),
        link1=st.sampled_from([0, 30, 200]),
        link2=st.sampled_from([0, 10, 40]),
    )
    def join(self, name: str, slots: int, link1: int, link2: int) -> None:
        """A node starts, or starts again without having left."""
        self.incarnations += 1
        self.announce(name, f"i{self.incarnations}", slots, link1, link2)

    @rule(
        name=st.sampled_from(NODES),
        slots=st.integers(0, 3),
        link1=st.sampled_from([0, 30, 200]),
        link2=st.sampled_from([0, 10, 40]),
    )
    def change(self, name: str, slots: int, link1: int, link2: int) -> None:
        """A node announces something else under the same incarnation: perhaps less than runs there."""
        if name in self.joined:
            self.announce(name, self.joined[name].incarnation, slots, link1, link2)

    @rule(name=st.sampled_from(NODES), drains=st.booleans())
    def drain(self, name: str, drains: bool) -> None:
        """A node wants nothing new, or wants it again after all."""
        if name in self.joined:
            self.take(self.joined[name].model_copy(update={"draining": True if drains else None}))
            waits = [t for t, p in self.placed.items() if t in self.core.tasks and p.placement.edge == name]
            if drains and name in EDGES:
                assert all(t in self.running or self.core.tasks[t].placed is not self.placed[t] for t in waits)

    @rule(name=st.sampled_from(NODES), stale=st.booleans())
    def leave(self, name: str, stale: bool) -> None:
        if name in self.joined:
            incarnation = "old" if stale else self.joined[name].incarnation
            assert bool(self.take(NodeLeft(node=name, incarnation=incarnation))) != stale

    @rule(from_snapshot=st.booleans())
    def crash(self, from_snapshot: bool) -> None:
        """The planner is killed, and another goes on from what was recorded."""
        again = PlannerCore(0, **self.settings)
        if from_snapshot:
            again.restore(json.loads(json.dumps(self.core.to_state())))
        else:
            for decision in self.log:
                again.fold(decision)
                assert again.state_hash == decision.ledger_hash
        again.restart_leases(self.now)
        assert again.state_hash == self.core.state_hash
        self.core = again

    # --- what must hold

    @invariant()
    def nothing_is_given_away_twice(self) -> None:
        """(8)-(10) in reality: what runs on an edge fits it, by books kept from the changes alone."""
        for name, node in self.joined.items():
            here = [placed.placement for placed in self.running.values() if placed.placement.edge == name]
            tasks = [placed for placed in self.running.values() if placed.session is None]
            sessions = [(p.device, p.placement, p.session) for p in self.running.values() if p.session is not None]
            if node.role is Role.EDGE:
                assert sum(p.placement.uses_slot for p in tasks if p.placement.edge == name) <= node.slots
                own = [(p, booked) for _, p, booked in sessions if p.edge == name]
                assert sum(booked.edge_load for _, booked in own) <= 0.8 * node.slots
                assert sum(p.link1_bps for p, _ in own) <= 0.8 * node.link1_capacity_bps
                assert sum(p.link2_bps for p, _ in own) <= 0.8 * node.link2_capacity_bps
                assert sum(p.link1_bps for p in here) <= node.link1_capacity_bps
                assert sum(p.link2_bps for p in here) <= node.link2_capacity_bps
            elif node.role is Role.DEVICE:
                computing = [p for p in tasks if p.device == name and p.placement.uses_device]
                assert len(computing) <= 1
                assert sum(booked.device_load for device_, _, booked in sessions if device_ == name) <= 0.8
        for placed in self.running.values():
            assert placed.device in self.joined
            assert placed.placement.edge is None or placed.placement.edge in self.joined

    @invariant()
    def the_core_is_sound(self) -> None:
        if hasattr(self, "core"):
            self.core.validate()
            assert set(self.running) == {t for t, r in self.core.ledger.reservations.items() if r.running}

    def teardown(self) -> None:
        """Everything that was admitted ends, once, whatever happened before."""
        if not hasattr(self, "core"):
            return
        for _ in range(10 * len(self.submitted) + 20):
            for task_id in sorted(self.running):
                self.take(completed(task_id, self.running[task_id].device, self.attempts[task_id]))
            if not self.core.tasks:
                break
            self.now = max(self.now, self.core.next_wakeup() or self.now)
            self.take(Tick())
        assert set(self.ended) == {event.task_id for event in self.submitted}
        self.core.validate()

    # --- the second books

    def announce(self, name: str, incarnation: str, slots: int, link1: int, link2: int) -> None:
        values: dict[str, Any] = {"incarnation": incarnation, "lease_s": LEASE_S}
        if name in EDGES:
            values |= {"slots": slots, "link1_capacity_bps": link1 * MBPS, "link2_capacity_bps": link2 * MBPS}
            self.take(edge(name, **values))
        elif name in CLOUDS:
            self.take(cloud(name, **values))
        else:
            self.take(device(name, **values, reachable_edges=[None, EDGES, ("e1",), ()][slots]))

    def take(self, event: Event) -> list[Change]:
        changes = self.core.handle(event, self.now)
        for change in changes:
            if isinstance(change, NodeJoined):
                self.joined[change.node.node] = change.node
            elif isinstance(change, NodeLost):
                del self.joined[change.node]
            elif change.type == "admitted":
                self.attempts[change.task.task_id] = 1
            elif isinstance(change, Placed):
                if change.session is not None and change.placement.cut1 < change.placement.cut2:
                    assert change.session.edge_load > 0 or change.placement.edge is None
                assert change.attempt == self.attempts[change.task_id]
                assert not self.joined[change.device].draining
                assert change.placement.edge is None or not self.joined[change.placement.edge].draining
                self.placed[change.task_id] = change
            elif isinstance(change, Start):
                assert change.task_id not in self.running
                assert change.at_s <= self.now
                self.running[change.task_id] = self.placed[change.task_id]
            elif isinstance(change, Rerouted):
                running = self.running[change.task_id]
                assert running.session is None
                assert change.attempt == self.attempts[change.task_id]
                assert change.placement.edge is None or not self.joined[change.placement.edge].draining
                self.running[change.task_id] = running.model_copy(update={"placement": change.placement})
            elif isinstance(change, Retried):
                assert change.attempt == self.attempts[change.task_id] + 1
                self.attempts[change.task_id] = change.attempt
                self.running.pop(change.task_id, None)
            elif isinstance(change, Ended):
                assert change.task_id not in self.ended
                self.ended[change.task_id] = change
                self.running.pop(change.task_id, None)
        if changes:
            decision = decision_of(changes, len(self.log) + 1, self.now, self.core)
            self.log.append(Decision.model_validate_json(decision.model_dump_json()))
        return changes


Region.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestRegion = Region.TestCase

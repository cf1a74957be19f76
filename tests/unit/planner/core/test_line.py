"""The line of waiting tasks: urgent tasks first, devices in turns, and no task is overtaken for long."""

from __future__ import annotations

from typing import Any

import pytest

from bus.messages import Change, Decision, Moved, NodeLeft, Placed, Start, TaskSubmitted
from bus.values import Role
from planner.core.core import Event, PlannerCore
from planner.core.options import CoreOptions
from tests.unit.planner.scenes import MBPS, cloud, completed, decision_of, device, edge, task


class Queue:
    """One edge with one slot; every task computes there alone, for 0.15 s plus its transfer."""

    def __init__(self, **options: Any) -> None:
        self.options = CoreOptions(**options)
        self.core = PlannerCore(0, options=self.options)
        self.log: list[Decision] = []
        self.now = 0.0
        self.started: list[str] = []
        self.devices: dict[str, str] = {}
        self.take(edge(lease_s=1e6))
        for name in ("a", "b", "c"):
            self.take(device(name, lease_s=1e6))

    def take(self, event: Event) -> list[Change]:
        changes = self.core.handle(event, self.now)
        if changes:
            decision = decision_of(changes, len(self.log) + 1, self.now, self.core)
            self.log.append(Decision.model_validate_json(decision.model_dump_json()))
        self.core.validate()
        self.started += [change.task_id for change in changes if isinstance(change, Start)]
        return changes

    def submit(self, name: str, **values: Any) -> list[Change]:
        """A task whose device is the first letter of its name."""
        submitted: TaskSubmitted = task(name, name[0], tiers=(Role.EDGE,), max_link1_bps=500 * MBPS, **values)
        self.devices[name] = name[0]
        return self.take(submitted)

    def finish(self) -> list[str]:
        """The order in which everything starts, if every task ends on time."""
        while self.core.tasks:
            running = [r for r in self.core.ledger.reservations.values() if r.running]
            r = min(running, key=lambda r: (r.end_s, r.seq))
            self.now = max(self.now, r.end_s)
            self.take(completed(r.task_id, self.devices[r.task_id]))
        again = PlannerCore(0, options=self.options)
        for decision in self.log:
            again.fold(decision)
            assert again.state_hash == decision.ledger_hash
        return self.started


def moved(log: list[Decision]) -> list[Moved]:
    return [change for decision in log for change in decision.changes if isinstance(change, Moved)]


@pytest.mark.parametrize("fair", [False, True])
def test_an_urgent_task_goes_before_those_that_wait_and_after_the_one_that_runs(fair: bool) -> None:
    queue = Queue(fair=fair)
    for name in ("a1", "b1", "c1", "a2"):
        queue.submit(name)
    queue.submit("c2", priority=1)
    assert queue.finish() == ["a1", "c2", "b1", "c1", "a2"]
    assert all(change.overtaken for change in moved(queue.log))


def test_a_task_that_is_placed_in_the_same_step_as_an_overtaking_one_finds_the_others_moved() -> None:
    """Both lose their edge: one is put before what waits for their device, the other needs only the device's link."""
    core = PlannerCore()
    for node in (edge("e1"), cloud(), device()):
        core.handle(node, 0.0)
    core.handle(task("runs", tiers=(Role.DEVICE,), samples=1_000), 0.0)
    core.handle(task("waits", tiers=(Role.DEVICE,), samples=1_000), 0.0)
    core.handle(task("urgent", tiers=(Role.DEVICE, Role.EDGE), priority=1), 0.0)
    core.handle(task("relayed", tiers=(Role.CLOUD,), samples=10_000), 0.0)
    core.handle(edge("e2", slots=0), 1.0)
    changes = core.handle(NodeLeft(node="e1", incarnation="i1"), 2.0)
    placed = {change.task_id: change for change in changes if isinstance(change, Placed)}
    assert placed["urgent"].line is not None
    assert placed["urgent"].line.overtakes == 1
    assert (placed["relayed"].placement.edge, placed["relayed"].wait_s) == ("e2", 0.0)
    assert placed["relayed"].start_s + placed["relayed"].delay_s > placed["urgent"].start_s
    core.validate()


def test_more_urgent_goes_before_less_urgent() -> None:
    queue = Queue()
    for name, priority in (("a1", None), ("b1", None), ("b2", 20), ("c1", 2), ("a2", 1)):
        queue.submit(name, priority=priority)
    assert queue.finish() == ["a1", "a2", "c1", "b2", "b1"]


def test_a_task_that_waits_for_longer_than_the_head_start_is_not_overtaken() -> None:
    """Priority 1 is worth 60 s, priority 2 half of it."""
    for waited, priority, first in ((59.0, 1, "c1"), (61.0, 1, "b1"), (29.0, 2, "c1"), (31.0, 2, "b1")):
        queue = Queue()
        queue.submit("a1", samples=10_000)
        queue.submit("b1")
        queue.now = waited
        queue.submit("c1", priority=priority)
        assert queue.finish()[1] == first


def test_without_priorities_and_fairness_tasks_go_in_order_of_admission() -> None:
    queue = Queue()
    names = ["a1", "a2", "a3", "b1", "a4", "c1"]
    for name in names:
        queue.submit(name)
    assert queue.finish() == names
    assert not moved(queue.log)


def test_one_device_alone_gets_the_same_decisions_with_and_without_fairness() -> None:
    starts = []
    for fair in (False, True):
        queue = Queue(fair=fair)
        for number in range(6):
            queue.submit(f"a{number}", samples=10 + number)
        starts.append(queue.finish())
        assert not moved(queue.log)
    assert starts[0] == starts[1]


def test_devices_take_turns_on_a_contended_edge() -> None:
    """A burst of one device does not hold up another: it waits for one task of the burst, not for all."""
    queue = Queue(fair=True)
    for number in range(1, 7):
        queue.submit(f"a{number}")
    for number in range(1, 4):
        queue.submit(f"b{number}")
    order = queue.finish()
    assert order[:2] == ["a1", "a2"]
    assert [name for name in order if name[0] == "a"] == [f"a{number}" for number in range(1, 7)]
    assert [name for name in order if name[0] == "b"] == ["b1", "b2", "b3"]
    for count in range(2, 8):
        share = sum(name[0] == "b" for name in order[1 : 1 + count])
        assert share >= count // 2 - 1
    lines = [change.line for d in queue.log for change in d.changes if change.type == "placement" and change.line]
    assert sum(line.overtakes > 0 for line in lines) >= 3


def test_overtaking_never_makes_a_task_go_first_for_good_and_never_starves_it() -> None:
    """Urgent tasks without end: a task without a priority starts at the latest a minute after its admission."""
    queue = Queue()
    queue.submit("a0")
    queue.submit("b0")
    number = 0
    while "b0" not in queue.started:
        number += 1
        queue.submit(f"c{number}", priority=1)
        held = queue.core.ledger.reservations
        assert all(r.moves == 0 for r in held.values())
        running = next(r for r in held.values() if r.running)
        queue.now = running.end_s
        queue.take(completed(running.task_id, queue.devices[running.task_id]))
        assert queue.now < 62.0
    assert queue.now > 55.0
    assert number > 100

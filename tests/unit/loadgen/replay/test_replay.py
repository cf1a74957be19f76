"""A replay over the bus in virtual time, against a planner that the test scripts: what it reads and what it
counts.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bus import messages, topics
from bus.errors import BusUnavailableError
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import (
    Decision,
    Ended,
    EpochOpened,
    NodeAnnounced,
    NodeLeft,
    Placed,
    Snapshot,
    Start,
    TaskCompleted,
    TaskState,
    TaskSubmitted,
)
from bus.values import Execution, Kind, Objective, Parts, Placement, Role
from loadgen.replay import arrivals, metrics, report
from loadgen.replay import schedule as schedules
from loadgen.replay.outcome import NOT_ACKNOWLEDGED
from loadgen.replay.readiness import await_planner, find_nodes
from loadgen.replay.replay import ReplayResult, replay
from loadgen.replay.task_mix import Mix
from loadgen.sim.virtual_loop import run_virtual
from tests.known import known

MIX = Mix(models={"lenet": 1, "alexnet": 1}, samples=(1, 5))
PLACEMENT = Placement(kind=Kind.EDGE, edge="e1", cut1=0, cut2=5, cut1_name="input", cut2_name="fc_3")


class ScriptedPlanner:
    """Starts every task at once and ends it after `service_s`; nothing is decided here."""

    def __init__(self, bus: MemoryBus, service_s: Callable[[TaskSubmitted], float], *, offset: int = 0) -> None:
        self.bus, self.service_s, self.seq = bus, service_s, offset
        self.states: dict[str, TaskState] = {}

    async def opened(self, epoch: int = 1) -> None:
        opening = EpochOpened(region=0, epoch=epoch, nonce="n", planner="p", lease_s=10)
        await self.bus.send(topics.DECISIONS, messages.encode(opening), key="0", partition=0)

    async def decide(self, *changes: object, epoch: int = 1, nonce: str = "n", seq: int | None = None) -> None:
        if seq is None:
            self.seq += 1
            seq = self.seq
        decision = Decision(
            region=0, epoch=epoch, nonce=nonce, seq=seq, now_s=0, inputs={}, changes=changes, ledger_hash="h"
        )
        await self.bus.send(topics.DECISIONS, messages.encode(decision), key="0", partition=0)

    async def run(self) -> None:
        reader = await self.bus.reader([(topics.TASKS, 0)], start="end")
        async with asyncio.TaskGroup() as group:
            while True:
                for record in await reader.fetch(timeout_s=1):
                    group.create_task(self._serve(messages.decode(topics.TASKS, record.value)))

    async def _serve(self, task: TaskSubmitted) -> None:
        service_s = self.service_s(task)
        parts = Parts(edge_s=service_s)
        placed = Placed(
            task_id=task.task_id, attempt=1, device=task.device, model=task.model, sha256="0" * 64,
            samples=task.samples, policy="deepar", objective=Objective.SEQUENTIAL,
            execution=Execution.SEQUENTIAL, placement=PLACEMENT, start_s=0, wait_s=0, delay_s=service_s, parts=parts,
        )  # fmt: skip
        await self.decide(placed, Start(task_id=task.task_id, attempt=1, device=task.device, at_s=0))
        await asyncio.sleep(service_s)
        state = self.states.get(task.task_id, TaskState.COMPLETED)
        if state is TaskState.COMPLETED:
            event = TaskCompleted(task_id=task.task_id, attempt=1, node="d0", measured=parts, delay_s=service_s)
            await self.bus.send(topics.EVENTS, messages.encode(event), key=task.task_id, partition=0)
        await asyncio.sleep(0.5)  # the planner is slow to end it; the task was over before
        await self.decide(
            Ended(task_id=task.task_id, attempt=1, state=state, cause="" if state is TaskState.COMPLETED else "why")
        )


def play(
    schedule: schedules.Schedule,
    service_s: Callable[[TaskSubmitted], float],
    *,
    states: dict[str, TaskState] | None = None,
    prepare: Callable[[ScriptedPlanner], object] | None = None,
    offset: int = 0,
    drain_timeout_s: float = 60,
    submit_timeout_s: float = 30,
    away_s: tuple[float, float] | None = None,
) -> ReplayResult:
    """`away_s`: from when to when the broker is away."""

    async def main() -> ReplayResult:
        broker = MemoryBroker()
        loadgen = MemoryBus(broker, "loadgen", delivery_timeout_s=submit_timeout_s)
        async with MemoryBus(broker, "planner") as planner_bus, loadgen as bus:
            if away_s is not None:
                asyncio.get_running_loop().call_at(away_s[0], broker.pause)
                asyncio.get_running_loop().call_at(away_s[1], broker.resume)
            await bus.create_topics(topics.specs(["e1"]))
            planner = ScriptedPlanner(planner_bus, service_s, offset=offset)
            planner.states = states or {}
            if prepare is None:
                await planner.opened()
            else:
                await prepare(planner)  # type: ignore[misc]
            serving = asyncio.create_task(planner.run())
            await asyncio.sleep(1)
            result = await replay(bus, schedule, drain_timeout_s=drain_timeout_s)
            serving.cancel()
            return result

    return run_virtual(main(), horizon_s=10_000)


def test_delays_count_from_the_instant_that_was_due() -> None:
    schedule = schedules.make(30, arrivals.uniform(20), MIX, ["d0", "d1"], seed=4)
    result = play(schedule, lambda task: 0.1 * task.samples)
    assert result.unfinished == 0
    for entry, outcome in zip(schedule.entries, result.outcomes, strict=True):
        assert outcome.submitted_s == pytest.approx(entry.at_s, abs=1e-6)
        assert outcome.delay_s == pytest.approx(0.1 * entry.task.samples, abs=0.01)
        assert outcome.kind == "edge"
    summary = result.summary
    assert summary["submitted"] == summary["completed"] == 30
    assert summary["delay_s"]["mean"] == pytest.approx(
        sum(0.1 * e.task.samples for e in schedule.entries) / 30, abs=0.01
    )
    assert summary["by_kind"]["edge"]["tasks"] == 30
    assert set(summary["by_model"]) == {"lenet", "alexnet"}


def test_the_loop_is_open_however_slow_the_system() -> None:
    schedule = schedules.make(10, arrivals.constant(10), MIX, ["d0"], seed=0)
    result = play(schedule, lambda task: 30.0)
    assert [o.submitted_s for o in result.outcomes] == pytest.approx([i / 10 for i in range(10)], abs=1e-6)


def test_a_closed_loop_sends_the_next_when_the_last_has_ended() -> None:
    schedule = schedules.make(5, arrivals.at_once(), MIX, ["d0"], seed=0)
    schedule = replace(schedule, closed=True)
    result = play(schedule, lambda task: 2.0)
    submitted = [known(outcome.submitted_s) for outcome in result.outcomes]
    gaps = [later - earlier for earlier, later in itertools.pairwise(submitted)]
    assert all(gap == pytest.approx(2.5, abs=0.05) for gap in gaps)
    assert all(outcome.delay_s == pytest.approx(2.0, abs=0.05) for outcome in result.outcomes)


def test_ends_are_counted_by_state_and_cause_and_only_completions_have_a_delay() -> None:
    schedule = schedules.make(6, arrivals.constant(1), MIX, ["d0"], seed=0)
    states = {
        "task-1": TaskState.FAILED,
        "task-2": TaskState.REJECTED,
        "task-3": TaskState.EXPIRED,
    }
    summary = play(schedule, lambda task: 0.2, states=states).summary
    assert (summary["completed"], summary["failed"], summary["rejected"], summary["expired"]) == (3, 1, 1, 1)
    assert summary["causes"] == {"why": 3}


def test_tasks_without_an_end_are_unfinished_after_the_drain() -> None:
    schedule = schedules.make(4, arrivals.constant(1), MIX, ["d0"], seed=0)
    result = play(schedule, lambda task: 1.0 if task.task_id != "task-2" else 1e4, drain_timeout_s=20)
    assert result.unfinished == 1
    assert result.summary["unfinished"] == 1
    assert result.summary["completed"] == 3


def test_tasks_that_wait_for_the_broker_are_no_reason_to_give_up() -> None:
    """A drain timeout counts from the end of an outage, as long as the tasks may still be accepted."""
    schedule = schedules.make(6, arrivals.uniform(4), MIX, ["d0"], seed=4)
    result = play(schedule, lambda task: 0.1, away_s=(3.0, 200.0), submit_timeout_s=300.0)
    assert result.summary["completed"] == 6
    result = play(schedule, lambda task: 0.1, away_s=(3.0, 200.0), submit_timeout_s=20.0)
    assert 0 < result.summary["causes"][NOT_ACKNOWLEDGED] < 6
    assert result.summary["completed"] + result.summary["causes"][NOT_ACKNOWLEDGED] == 6


def test_decisions_of_a_stale_planner_are_not_believed() -> None:
    async def two_planners(planner: ScriptedPlanner) -> None:
        await planner.opened()
        # A planner of no epoch, a wrong sequence number: neither may end task-0.
        ended = Ended(task_id="task-0", attempt=1, state=TaskState.REJECTED, cause="forged")

        async def forge() -> None:
            await asyncio.sleep(2.2)
            await planner.decide(ended, epoch=1, nonce="other", seq=1)
            await planner.decide(ended, seq=99)

        planner.forging = asyncio.create_task(forge())  # type: ignore[attr-defined]

    schedule = schedules.make(2, arrivals.constant(1), MIX, ["d0"], seed=0)
    result = play(schedule, lambda task: 3.0, prepare=two_planners)
    assert result.summary["completed"] == 2
    assert result.dropped_records == 2


def test_reading_begins_behind_the_last_snapshot() -> None:
    async def long_history(planner: ScriptedPlanner) -> None:
        await planner.opened()
        # Without the snapshot a reader from the start would find no sequence number 1 and drop everything.
        planner.seq = 40
        await planner.decide()
        end = (await planner.bus.end_offsets(topics.DECISIONS))[0]
        snapshot = Snapshot(
            region=0, epoch=1, nonce="n", seq=41, offset=end - 1, now_s=0, inputs={}, ledger_hash="h", state={}
        )
        await planner.bus.send(topics.SNAPSHOTS, messages.encode(snapshot), key="0", partition=0)

    schedule = schedules.make(3, arrivals.constant(1), MIX, ["d0"], seed=0)
    result = play(schedule, lambda task: 0.5, prepare=long_history)
    assert result.summary["completed"] == 3
    assert result.dropped_records == 0


def test_warm_up_is_left_out_of_the_summary() -> None:
    schedule = schedules.make(6, arrivals.constant(1), MIX, ["d0"], seed=0).with_warmup(2)
    summary = play(schedule, lambda task: 9.0 if task.task_id in ("task-0", "task-1") else 1.0).summary
    assert summary["submitted"] == summary["completed"] == 4
    assert summary["warmup"] == 2
    assert summary["delay_s"]["max"] == pytest.approx(1.0, abs=0.01)


def test_a_planner_that_is_silent_is_named_with_what_to_do() -> None:
    async def main() -> None:
        async with MemoryBus(MemoryBroker(), "loadgen") as bus:
            await bus.create_topics(topics.specs())
            await await_planner(bus, 0, timeout_s=3)

    with pytest.raises(BusUnavailableError, match="no planner") as caught:
        run_virtual(main())
    assert caught.value.remedy == "start one: deepar planner"


def test_devices_are_found_and_those_that_left_are_not() -> None:
    async def main() -> list[str]:
        async with MemoryBus(MemoryBroker(), "loadgen") as bus:
            await bus.create_topics(topics.specs())
            for node, role in (("d2", Role.DEVICE), ("d1", Role.DEVICE), ("d3", Role.DEVICE), ("e1", Role.EDGE)):
                announced = NodeAnnounced(node=node, role=role, incarnation="i")
                await bus.send(topics.NODES, messages.encode(announced), key=node, partition=0)
            drains = NodeAnnounced(node="d4", role=Role.DEVICE, incarnation="i", draining=True)
            await bus.send(topics.NODES, messages.encode(drains), key="d4", partition=0)
            left = NodeLeft(node="d3", incarnation="i")
            await bus.send(topics.NODES, messages.encode(left), key="d3", partition=0)
            return [node.node for node in await find_nodes(bus, 0)]

    assert run_virtual(main()) == ["d1", "d2"]


def test_the_files_of_a_replay(tmp_path: Path) -> None:
    schedule = schedules.make(12, arrivals.uniform(5), MIX, ["d0"], seed=1)
    result = play(schedule, lambda task: 0.3)
    paths = report.write_files(tmp_path, result.outcomes, result.summary)
    assert [path.name for path in paths] == ["profile_export.jsonl", "summary.json", "summary.csv", "report.html"]
    rows = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert len(rows) == 12
    assert rows[0]["placement"]["edge"] == "e1"
    assert rows[0]["predicted"]["edge_s"] == pytest.approx(0.3)
    assert rows[0]["measured"]["edge_s"] == pytest.approx(0.3)
    assert rows[0]["scheduled_s"] <= rows[0]["submitted_s"] <= rows[0]["started_s"] <= rows[0]["ended_s"]
    assert json.loads(paths[1].read_text())["completed"] == 12
    table = paths[2].read_text().splitlines()
    assert table[0] == "group,name,tasks,avg_s,p50_s,p90_s,p99_s,p99_9_s"
    assert {line.split(",")[0] for line in table[1:]} == {"all", "kind", "model"}
    page = paths[3].read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.split("</style>")[1]  # nothing is loaded from outside


def test_a_report_without_any_completed_task(tmp_path: Path) -> None:
    schedule = schedules.make(1, arrivals.constant(1), MIX, ["d0"], seed=0)
    result = play(schedule, lambda task: 1.0, states={"task-0": TaskState.FAILED})
    assert result.summary["delay_s"]["mean"] is None
    assert report.write_files(tmp_path, result.outcomes, result.summary)[3].exists()


def test_thresholds() -> None:
    found = {"delay_s": {"p99": 2.5, "mean": 1.0}}
    assert "2.5 s" in (metrics.Threshold("max-p99", "p99", 2.0).missed(found) or "")
    assert metrics.Threshold("max-mean", "mean", 1.0).missed(found) is None
    nothing = {"delay_s": {"mean": None}}
    assert "no task" in (metrics.Threshold("max-mean", "mean", 1.0).missed(nothing) or "")


def test_distribution_and_confidence() -> None:
    found = metrics.distribution([float(value) for value in range(1, 102)])
    assert found["mean"] == 51
    assert found["p50"] == 51
    assert found["p90"] == 91
    assert found["p99"] == 100
    assert found["max"] == 101
    # Student's t with one degree of freedom: 12.706 times the standard error.
    assert metrics.half_width_95([1.0, 3.0]) == pytest.approx(12.706, rel=1e-3)
    assert metrics.half_width_95([1.0]) is None  # one value says nothing about its spread

"""Failed attempts: a task goes elsewhere, and a node at which attempts keep failing is given less."""

import pytest

from bus.messages import CircuitChanged, Decision, Ended, NodeLeft, Placed, Retried, Start, TaskState
from bus.values import Kind
from planner.core.core import Event, PlannerCore
from planner.core.options import CoreOptions
from planner.core.region.circuits import OPEN_S, OPENS_AFTER
from planner.explain import explain
from tests.unit.planner.scenes import cloud, completed, decision_of, device, edge, failed, only, task

LONG_LEASE_S = 1e6


class Region:
    """A core whose decisions are kept, folded into a second core, and restored into a third."""

    def __init__(self, *nodes: Event, policy: str = "edge-only", **settings: object) -> None:
        self.policy = policy
        self.core = PlannerCore(0, policy, options=CoreOptions(**settings))  # type: ignore[arg-type]
        self.folded = PlannerCore(0, policy)
        self.log: list[Decision] = []
        for node in nodes:
            self.handle(node, 0.0)

    def handle(self, event: Event, now: float) -> list[object]:
        changes = self.core.handle(event, now)
        self.core.validate()
        if changes:
            decision = decision_of(changes, len(self.log) + 1, now, self.core)
            self.log.append(decision)
            self.folded.fold(Decision.model_validate_json(decision.model_dump_json()))
            assert self.folded.state_hash == self.core.state_hash
            again = PlannerCore.from_state(self.core.to_state(), policy=self.policy)
            again.validate()
            assert again.state_hash == self.core.state_hash
        return list(changes)

    def placed_at(self, task_id: str) -> str | None:
        placed = self.core.tasks[task_id].placed
        assert placed is not None
        return placed.placement.edge

    def stall(self, task_id: str, now: float) -> list[object]:
        """The device says that the present attempt stalled."""
        live = self.core.tasks[task_id]
        return self.handle(failed(task_id, live.submitted.device, live.attempt, cause="stalled", retryable=True), now)


def two_edges(**values: object) -> list[Event]:
    return [
        edge("e1", slots=4, speed=8.0, lease_s=LONG_LEASE_S),
        edge("e2", slots=4, speed=2.0, lease_s=LONG_LEASE_S),
        *(device(f"d{i}", lease_s=LONG_LEASE_S) for i in range(6)),
    ]


def test_a_task_goes_elsewhere_after_a_failed_attempt_and_comes_round_when_all_have_failed() -> None:
    region = Region(*two_edges(), edge("e3", slots=4, speed=1.0, lease_s=LONG_LEASE_S))
    region.handle(task("t1", "d1"), 0.0)
    tried = [region.placed_at("t1")]
    for attempt in range(5):
        changes = region.stall("t1", 1.0 + attempt)
        assert only(changes, Retried).failed_at == tried[-1]  # type: ignore[arg-type]
        tried.append(region.placed_at("t1"))
    assert tried == ["e1", "e2", "e3", "e1", "e2", "e3"]


def test_where_there_is_no_other_place_a_task_is_tried_there_again() -> None:
    region = Region(edge("e1", lease_s=LONG_LEASE_S), device("d1", lease_s=LONG_LEASE_S))
    region.handle(task("t1", "d1"), 0.0)
    for attempt in range(2 * OPENS_AFTER):
        changes = region.stall("t1", 1.0 + attempt)
        assert only(changes, Start).attempt == attempt + 2  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["deepar", "neurosurgeon"])
def test_the_device_alone_and_the_cloud_are_places_too(policy: str) -> None:
    region = Region(cloud(lease_s=LONG_LEASE_S), *two_edges(), policy=policy)
    region.handle(task("t1", "d1", samples=20), 0.0)
    kinds, stations = [], []
    for attempt in range(3):
        placed = region.core.tasks["t1"].placed
        assert placed is not None
        kinds.append(placed.placement.kind)
        stations.append(placed.placement.edge)
        region.stall("t1", 1.0 + attempt)
    assert len(set(stations)) == 3  # both edges, and the device alone
    assert kinds[stations.index(None)] is Kind.DEVICE


def test_what_the_cloud_reports_is_not_laid_at_the_edges_door() -> None:
    nodes = [cloud("c1", lease_s=LONG_LEASE_S, speed=200.0), *two_edges()]
    region = Region(*nodes, policy="deepar")
    slow = task("t1", "d1", samples=1, input_bytes=1000)
    placed = only(region.handle(slow, 0.0), Placed)  # type: ignore[arg-type]
    assert placed.placement.uses_cloud
    changes = region.handle(failed("t1", "c1", 1, cause="stage_error", retryable=True), 1.0)
    assert only(changes, Retried).failed_at == "c1"  # type: ignore[arg-type]
    again = only(changes, Placed)  # type: ignore[arg-type]
    assert not again.placement.uses_cloud


def opened(region: Region, now: float) -> None:
    """Let attempts of different tasks fail at the first edge until its circuit is open."""
    for number in range(OPENS_AFTER):
        region.handle(task(f"f{number}", f"d{number}"), now)
        assert region.placed_at(f"f{number}") == "e1"
        circuit = only(region.stall(f"f{number}", now), CircuitChanged)  # type: ignore[arg-type]
        assert (circuit.node, circuit.failures) == ("e1", number + 1)
        assert (circuit.until_s is not None) == (number + 1 >= OPENS_AFTER)


def test_a_circuit_opens_is_tried_by_one_task_and_closes_on_its_success() -> None:
    region = Region(*two_edges())
    opened(region, 1.0)
    region.handle(task("t1", "d5"), 2.0)
    assert region.placed_at("t1") == "e2"
    later = 1.0 + OPEN_S
    region.handle(task("probe", "d4"), later)
    region.handle(task("t2", "d5"), later)
    assert (region.placed_at("probe"), region.placed_at("t2")) == ("e1", "e2")
    # the probe fails: open for as long again
    circuit = only(region.stall("probe", later + 1.0), CircuitChanged)  # type: ignore[arg-type]
    assert circuit.until_s == later + 1.0 + OPEN_S
    region.handle(task("t3", "d5"), later + OPEN_S)
    assert region.placed_at("t3") == "e2"
    # the next one succeeds
    later = later + 1.0 + OPEN_S
    region.handle(task("second", "d4"), later)
    assert region.placed_at("second") == "e1"
    closed = only(region.handle(completed("second", "d4"), later + 1.0), CircuitChanged)  # type: ignore[arg-type]
    assert (closed.node, closed.failures, closed.until_s) == ("e1", 0, None)
    assert region.core.circuits == {}
    for number in range(3):
        region.handle(task(f"n{number}", f"d{number}"), later + 2.0)
        assert region.placed_at(f"n{number}") == "e1"


def test_a_probe_that_ends_otherwise_leaves_the_circuit_to_the_next() -> None:
    region = Region(*two_edges())
    opened(region, 1.0)
    later = 1.0 + OPEN_S
    region.handle(task("probe", "d4"), later)
    region.handle(
        failed("probe", "e1", 1, cause="bad_frame"), later
    )  # the task's own fault: it says nothing of the edge
    region.handle(task("next", "d5"), later)
    assert region.placed_at("next") == "e1"


def test_a_success_in_between_starts_the_count_anew_and_so_does_a_new_process() -> None:
    region = Region(*two_edges())
    for number in range(3 * OPENS_AFTER):
        now = float(number)
        region.handle(task(f"g{number}", "d1"), now)
        assert region.placed_at(f"g{number}") == "e1"
        region.stall(f"g{number}", now)
        region.handle(completed(f"g{number}", "d1", attempt=2), now)  # at the other edge
        region.handle(task(f"s{number}", "d2"), now)
        region.handle(completed(f"s{number}", "d2"), now)
    assert region.core.circuits == {}
    opened(region, 100.0)
    region.handle(NodeLeft(node="e1", incarnation="i1"), 101.0)
    region.handle(edge("e1", slots=4, speed=8.0, incarnation="i2", lease_s=LONG_LEASE_S), 102.0)
    region.handle(task("t1", "d5"), 102.0)
    assert region.placed_at("t1") == "e1"


def test_what_was_to_start_at_a_node_is_planned_again_when_its_circuit_opens() -> None:
    slow = edge("e2", slots=4, speed=0.5, lease_s=LONG_LEASE_S)
    region = Region(edge("e1", slots=1, speed=8.0, lease_s=LONG_LEASE_S), slow, *two_edges()[2:])
    core = region.core
    for number in range(6):
        region.handle(task(f"t{number}", f"d{number}", max_link1_bps=900_000_000), 0.0)
        assert region.placed_at(f"t{number}") == "e1"
    for number in range(OPENS_AFTER):
        assert core.tasks[f"t{number}"].state is TaskState.RUNNING
        changes = region.stall(f"t{number}", 0.001 * number)
    assert {c.task_id: c.cause for c in changes if isinstance(c, Retried)} == {
        "t2": "stalled",
        "t3": "circuit_open",
        "t4": "circuit_open",
        "t5": "circuit_open",
    }
    assert {region.placed_at(f"t{number}") for number in range(6)} == {"e2"}


def test_after_a_hundred_stalled_attempts_at_one_edge_the_healthy_one_has_served_nearly_all() -> None:
    region = Region(*two_edges())
    stalled = done = 0
    now = 0.0
    for number in range(60):
        now += 1.0
        name = f"d{number % 6}"
        region.handle(task(f"t{number}", name), now)
        while f"t{number}" in region.core.tasks:
            if region.placed_at(f"t{number}") == "e1":
                stalled += 1
                region.stall(f"t{number}", now)
            else:
                attempt = region.core.tasks[f"t{number}"].attempt
                ended = only(region.handle(completed(f"t{number}", name, attempt), now), Ended)  # type: ignore[arg-type]
                done += ended.state is TaskState.COMPLETED
    assert done == 60
    assert stalled <= OPENS_AFTER + 1


def test_explain_says_where_attempts_failed() -> None:
    region = Region(*two_edges())
    opened(region, 1.0)
    found = explain(region.log, "f0")
    assert any("failed" not in line and "stalled at e1" in line for line in found.story)
    first = next(c for c in found.candidates if c.edge == "e1" and c.family == "device+edge")
    assert "an attempt of this task failed at e1" in first.lacked
    region.handle(task("t1", "d5"), 2.0)
    first = next(c for c in explain(region.log, "t1").candidates if c.edge == "e1" and c.family == "device+edge")
    assert f"{OPENS_AFTER} attempts in a row failed at e1" in first.lacked

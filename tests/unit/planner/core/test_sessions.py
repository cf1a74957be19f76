"""Sessions in the planner's core: placed at once, booked by load, without an end, and exactly replayed."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from bus.messages import (
    Change,
    Decision,
    Ended,
    NodeAnnounced,
    NodeHeartbeat,
    NodeLeft,
    Overran,
    Placed,
    Retried,
    SessionTerms,
    Start,
    TaskState,
    TaskSubmitted,
)
from bus.values import Codec, Kind, Objective, Role
from planner.core.core import Event, PlannerCore, Tick
from planner.core.options import CoreOptions
from planner.search.what_if import Constraints, Situation, plans
from tests.unit.planner.scenes import (
    MBPS,
    cloud,
    completed,
    decision_of,
    device,
    edge,
    failed,
    faster,
    only,
    profile,
    task,
    types,
    with_codecs,
)


def session(task_id: str = "s1", node: str = "d1", rate_hz: float = 10.0, **values: Any) -> TaskSubmitted:
    terms = SessionTerms(rate_hz=rate_hz, latency_s=values.pop("latency_s", None))
    return task(task_id, node, samples=1, session=terms, **{"max_link1_bps": None, **values})


class Recorded:
    """A core whose decisions are recorded, as a planner does it."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.core = PlannerCore(0, **settings)
        self.log: list[Decision] = []

    def take(self, event: Event, now: float = 0.0) -> list[Change]:
        changes = self.core.handle(event, now)
        if changes:
            decision = decision_of(changes, len(self.log) + 1, now, self.core)
            self.log.append(Decision.model_validate_json(decision.model_dump_json()))
        self.core.validate()
        return changes

    def replayed(self) -> PlannerCore:
        again = PlannerCore(0, **self.settings)
        for decision in self.log:
            again.fold(decision)
            assert again.state_hash == decision.ledger_hash
        again.validate()
        return again


@pytest.fixture
def region() -> Recorded:
    """A device, an edge and a cloud."""
    found = Recorded()
    for node in (device(), edge(), cloud()):
        found.take(node)
    return found


def test_a_session_is_placed_at_once_runs_without_an_end_and_is_ended_by_its_device(region: Recorded) -> None:
    changes = region.take(session(), 1.0)
    placed = only(changes, Placed)
    assert placed.session is not None
    assert (placed.wait_s, placed.samples, placed.session.rate_hz) == (0.0, 1, 10.0)
    assert only(changes, Start).at_s == 1.0
    held = region.core.ledger.reservations["s1"]
    assert (held.slots, held.computes, held.end_s) == (0, False, float("inf"))
    for node in ("d1", "e1", "c1"):
        region.take(NodeHeartbeat(node=node, incarnation="i1"), 10_000.0)
    assert region.take(Tick(), 10_000.0) == []
    text = json.dumps(region.core.to_state(), allow_nan=False)
    again = PlannerCore(0)
    again.restore(json.loads(text))
    again.validate()
    assert again.state_hash == region.core.state_hash == region.replayed().state_hash
    ended = only(region.take(completed("s1"), 10_001.0), Ended)
    assert (ended.state, ended.released_slots, ended.released_link1_bps) == (
        TaskState.COMPLETED,
        0,
        placed.placement.link1_bps,
    )
    assert region.replayed().state_hash == region.core.state_hash


def test_a_session_moves_scheduled_tasks_and_waits_for_running_ones(region: Recorded) -> None:
    """Tasks that run hold the whole link; what is only scheduled makes room, and nothing is rejected."""
    region.take(edge(link1_capacity_bps=50 * MBPS, incarnation="i2"), 0.5)
    first = only(region.take(task("t1", tiers=None, max_link1_bps=None), 1.0), Placed)
    assert first.placement.link1_bps == 50 * MBPS
    for number in (2, 3):
        region.take(device(f"d{number}"), 1.0)
        region.take(task(f"t{number}", f"d{number}", max_link1_bps=None), 1.0)
    region.take(device("d9", models=(device().models[0].model_copy(update={"layer_s": (9.0, 9.0, 9.0)}),)), 1.0)
    changes = region.take(session("s1", "d9"), 1.01)
    placed = next(change for change in changes if isinstance(change, Placed) and change.task_id == "s1")
    end_s = region.core.ledger.reservations["t1"].end_s
    assert placed.placement.edge == "e1"
    assert placed.start_s == end_s
    changes = region.take(completed("t1"), end_s)
    started = [change.task_id for change in changes if isinstance(change, Start)]
    assert started[0] == "s1"
    assert not [change for change in changes if isinstance(change, Overran)]
    ends = [change for decision in region.log for change in decision.changes if isinstance(change, Ended)]
    assert [end.state for end in ends] == [TaskState.COMPLETED]
    assert region.replayed().state_hash == region.core.state_hash


def slow_device(node: str, **values: Any) -> NodeAnnounced:
    """A device that cannot compute the model at any useful rate."""
    model = device().models[0]
    return device(node, models=(model.model_copy(update={"layer_s": (9.0,) * model.layers}),), **values)


def placement_of(changes: list[Change], task_id: str) -> Placed:
    return next(change for change in changes if isinstance(change, Placed) and change.task_id == task_id)


def test_a_session_that_finds_nothing_free_waits_until_another_ends() -> None:
    """Never `never_fits`: what waits only behind sessions gets its turn."""
    region = Recorded()
    region.take(edge(slots=1, speed=0.001))  # 60 s for a sample: 0.02 samples a second take all that may be booked
    for node in ("d1", "d2"):
        region.take(slow_device(node))
    values: dict[str, Any] = {"rate_hz": 0.02, "tiers": (Role.EDGE,)}
    first = placement_of(region.take(session("s1", "d1", **values), 1.0), "s1")
    assert first.session is not None
    assert first.session.edge_load == 819 / 1024
    assert types(region.take(session("s2", "d2", **values), 2.0)) == ["admitted"]
    changes = region.take(completed("s1", "d1"), 3.0)
    assert placement_of(changes, "s2").start_s == 3.0
    assert region.replayed().state_hash == region.core.state_hash


@pytest.mark.parametrize(
    ("tiers", "kinds"),
    [
        ((Role.DEVICE,), {Kind.DEVICE}),
        ((Role.EDGE,), {Kind.EDGE}),
        ((Role.CLOUD,), {Kind.CLOUD}),
        ((Role.DEVICE, Role.EDGE), {Kind.DEVICE, Kind.EDGE, Kind.DEVICE_EDGE}),
        ((Role.DEVICE, Role.CLOUD), {Kind.DEVICE, Kind.CLOUD, Kind.DEVICE_CLOUD}),
        ((Role.EDGE, Role.CLOUD), {Kind.EDGE, Kind.CLOUD, Kind.EDGE_CLOUD}),
    ],
)
@pytest.mark.parametrize("objective", list(Objective))
def test_only_the_allowed_tiers_compute_and_the_best_of_these_placements_is_taken(
    tiers: tuple[Role, ...], kinds: set[Kind], objective: Objective
) -> None:
    region = Recorded(objective=objective)
    for node in (device(), edge(), cloud()):
        region.take(node)
    submitted = task("t1", tiers=tiers)
    found = placement_of(region.take(submitted), "t1")
    assert found.placement.kind in kinds
    used = {
        role
        for role, computes in (
            (Role.DEVICE, found.placement.cut1 > 0),
            (Role.EDGE, found.placement.uses_slot),
            (Role.CLOUD, found.placement.uses_cloud),
        )
        if computes
    }
    assert used <= set(tiers)
    situation = Situation(
        device=device().models[0],
        edge=edge().models[0],
        cloud=cloud().models[0],
        link1_bps=100 * MBPS,
        link2_bps=100 * MBPS,
        samples=10,
        objective=objective,
        constraints=Constraints(forbidden=frozenset(Role) - frozenset(tiers)),
    )
    assert found.delay_s == pytest.approx(plans(situation)[0].delay_s)
    kind = placement_of(region.take(session("s1", tiers=tiers), 1.0), "s1").placement.kind
    assert kind in kinds


def test_a_policy_without_a_placement_on_the_allowed_tiers_rejects_the_task() -> None:
    region = Recorded(policy="device-only")
    region.take(device())
    for event in (task("t1", tiers=(Role.EDGE,)), session("s1", tiers=(Role.EDGE,))):
        ended = only(region.take(event), Ended)
        assert (ended.state, ended.cause) == (TaskState.REJECTED, "never_fits")
        assert "device-only has no placement that computes only on these tiers: edge" in ended.detail


def test_tasks_beside_a_session_are_predicted_to_take_longer(region: Recorded) -> None:
    values: dict[str, Any] = {"tiers": (Role.DEVICE,)}
    alone = placement_of(region.take(task("t1", **values)), "t1")
    region.take(completed("t1"), 1.0)
    load = placement_of(region.take(session("s1", rate_hz=6.0, **values), 1.0), "s1").session
    assert load is not None
    assert load.device_load == pytest.approx(0.36, abs=0.001)  # 6 samples of 60 ms a second
    beside = placement_of(region.take(task("t2", **values), 1.0), "t2")
    assert beside.delay_s == pytest.approx(alone.delay_s / (1 - 12 / 32))  # 0.36 in steps of 1/32, rounded up
    region.take(completed("t2"), 2.0)
    region.take(completed("s1"), 2.0)
    after = placement_of(region.take(task("t3", **values), 2.0), "t3")
    assert after.delay_s == alone.delay_s


def test_a_second_session_goes_where_the_first_one_is_not() -> None:
    region = Recorded()
    for node in (edge("e1"), edge("e2"), slow_device("d1"), slow_device("d2")):
        region.take(node)
    places = [placement_of(region.take(session(f"s{n}", f"d{n}", rate_hz=20.0)), f"s{n}") for n in (1, 2)]
    assert [placed.placement.edge for placed in places] == ["e1", "e2"]


def test_a_session_leaves_an_edge_that_drains_or_is_lost(region: Recorded) -> None:
    region.take(edge("e2"))
    region.take(slow_device("d2"))
    first = placement_of(region.take(session("s1", "d2"), 1.0), "s1")
    assert first.placement.edge == "e1"
    changes = region.take(edge("e1", draining=True), 2.0)
    assert only(changes, Retried).cause == "draining"
    assert placement_of(changes, "s1").placement.edge == "e2"
    region.take(edge("e1", incarnation="i2"), 3.0)
    changes = region.take(NodeLeft(node="e2", incarnation="i1"), 4.0)
    assert only(changes, Retried).cause == "node_lost"
    moved = placement_of(changes, "s1")
    assert (moved.placement.edge, moved.attempt, moved.start_s) == ("e1", 3, 4.0)


def test_a_session_that_worked_for_long_has_all_its_attempts_again() -> None:
    region = Recorded(options=CoreOptions(max_attempts=3))
    for node in (edge(), slow_device("d1")):
        region.take(node)
    region.take(session(), 0.0)
    for attempt in range(1, 9):
        now = 100.0 * attempt
        changes = region.take(failed("s1", attempt=attempt, cause="stalled", retryable=True), now)
        assert only(changes, Retried).attempt == attempt + 1
    restored = PlannerCore(0, options=CoreOptions(max_attempts=3))
    restored.restore(json.loads(json.dumps(region.core.to_state())))
    assert restored.state_hash == region.core.state_hash == region.replayed().state_hash
    for attempt in (9, 10):
        changes = region.take(failed("s1", attempt=attempt, cause="stalled", retryable=True), 801.0)
        assert "retried" in types(changes)
    ended = only(region.take(failed("s1", attempt=11, cause="stalled", retryable=True), 802.0), Ended)
    assert (ended.state, ended.cause) == (TaskState.FAILED, "stalled")


def test_opening_and_closing_sessions_never_uses_up_the_attempts_of_a_task_that_waits() -> None:
    """A task that was promised a whole link is planned again beside each session, however many come."""
    region = Recorded(options=CoreOptions(max_attempts=3))
    for node in (edge(link1_capacity_bps=50 * MBPS, speed=1.0), *(slow_device(f"d{n}") for n in (1, 2, 3))):
        region.take(node)
    only_edge = (Role.EDGE,)
    region.take(task("t1", "d1", samples=1000, max_link1_bps=2 * MBPS, tiers=only_edge))
    for number in range(12):
        name = f"s{number}"
        if number == 0:
            region.take(task("t2", "d2", max_link1_bps=None, tiers=only_edge), 0.1)
        region.take(session(name, "d3", rate_hz=5.0, tiers=only_edge), 0.2)
        region.take(completed(name, "d3"), 0.2)
        region.take(edge(link1_capacity_bps=50 * MBPS, speed=1.0, slots=1 + number % 2), 0.2)
        region.take(task(f"t{number + 3}", "d2", max_link1_bps=None, tiers=only_edge), 0.2)
    ends = [change for decision in region.log for change in decision.changes if isinstance(change, Ended)]
    assert {end.state for end in ends} == {TaskState.COMPLETED}
    assert max(found.attempt for found in region.core.tasks.values()) > 3
    assert region.replayed().state_hash == region.core.state_hash


def test_an_edge_that_shrinks_gives_up_sessions_until_the_others_fit() -> None:
    region = Recorded()
    region.take(edge("e1", slots=2, speed=1.0))
    for n in range(3):
        region.take(slow_device(f"d{n}"))
        region.take(session(f"s{n}", f"d{n}", rate_hz=6.0, tiers=(Role.EDGE,)), 1.0)  # 0.36 slots each
    assert region.core.ledger.edges["e1"].sessions.units == 3 * 369
    changes = region.take(edge("e1", slots=1, speed=1.0), 2.0)
    retried = only(changes, Retried)
    assert (retried.task_id, retried.cause) == ("s2", "capacity_lowered")
    lowest = region.core.ledger.edges["e1"].sessions.link1_bps // 2
    region.take(edge("e1", slots=1, speed=1.0, link1_capacity_bps=2 * lowest), 2.0)
    assert region.core.ledger.edges["e1"].sessions.link1_bps <= 0.8 * 2 * lowest


def test_a_session_moves_to_a_better_place_but_not_sooner_than_after_30_s_nor_for_a_small_gain() -> None:
    region = Recorded()
    for node in (edge("e1", speed=2.0, lease_s=1e6), slow_device("d1", lease_s=1e6)):
        region.take(node)
    first = placement_of(region.take(session("s1", "d1", rate_hz=2.0, tiers=(Role.EDGE,)), 1.0), "s1")
    assert first.placement.edge == "e1"
    region.take(edge("e2", speed=2.2, lease_s=1e6), 2.0)  # too little to move
    assert region.take(Tick(), 31.5) == []
    region.take(edge("e3", speed=8.0, lease_s=1e6), 32.0)
    assert region.take(Tick(), 60.0) == []
    assert region.core.next_wakeup() == 61.5
    changes = region.take(Tick(), 61.5)
    assert only(changes, Retried).cause == "better_place"
    moved = placement_of(changes, "s1")
    assert (moved.placement.edge, moved.attempt) == ("e3", 2)
    assert moved.delay_s < 0.8 * first.delay_s
    assert only(changes, Start).at_s == 61.5
    assert region.take(Tick(), 100.0) == []
    assert region.replayed().state_hash == region.core.state_hash


def test_a_session_that_does_not_get_its_rate_moves_to_where_it_does_and_a_satisfied_one_stays() -> None:
    region = Recorded()
    for node in (edge("e1", speed=0.01, lease_s=1e6), slow_device("d1", lease_s=1e6), slow_device("d2", lease_s=1e6)):
        region.take(node)
    slow = placement_of(region.take(session("s1", "d1", rate_hz=2.0, tiers=(Role.EDGE,))), "s1").session
    assert slow is not None
    assert slow.rate_hz < 2.0
    region.take(session("s2", "d2", rate_hz=0.01, latency_s=1000.0, tiers=(Role.EDGE,)))
    region.take(edge("e2", speed=1.0, lease_s=1e6), 1.0)
    changes = region.take(Tick(), 50.0)
    moved = placement_of(changes, "s1")
    assert moved.placement.edge == "e2"
    assert moved.session is not None
    assert moved.session.rate_hz == 2.0
    assert {change.task_id for change in changes if isinstance(change, Retried)} == {"s1"}


CODED = with_codecs(profile(), random.Random(1))


def coded_region(**more: Any) -> Recorded:
    """Nodes that have measured codecs, and slow links."""
    found = Recorded()
    for node in (
        device(models=(CODED,), **more),
        edge(models=(faster(CODED, 4.0),), link1_capacity_bps=5 * MBPS),
        cloud(models=(faster(CODED, 20.0),)),
    ):
        found.take(node)
    return found


def test_a_session_uses_lossy_codecs_only_with_consent() -> None:
    delays_s = []
    for consent in (None, 0.8):
        region = coded_region()
        placed = only(region.take(session(tiers=("edge",), min_agreement=consent)), Placed)
        assert placed.placement.routes is not None
        (route,) = placed.placement.routes
        assert route.codec1.lossless == (consent is None)
        assert route.codec1 is not Codec.RAW
        assert placed.parts.link1_s == pytest.approx(route.stations_s[1])
        assert placed.parts.device_s == pytest.approx(route.stations_s[0])
        assert placed.parts.device_s > 0  # for encoding its input
        delays_s.append(placed.delay_s)
        region.replayed()
    assert delays_s[1] < delays_s[0]


def test_a_session_with_codecs_sustains_a_rate_that_raw_activations_do_not() -> None:
    rates = []
    for consent in (None, 0.8):
        placed = only(coded_region().take(session(rate_hz=1_000.0, tiers=("edge",), min_agreement=consent)), Placed)
        assert placed.session is not None
        rates.append(placed.session.rate_hz)
    assert rates[1] > 1.5 * rates[0]


def test_a_session_with_inputs_of_its_own_size_sends_them_raw() -> None:
    placed = only(coded_region().take(session(tiers=("edge",), min_agreement=0.8, input_bytes=5_000)), Placed)
    assert placed.placement.routes is None

"""What the core does with each event, the odd ones included."""

import pytest

from bus.errors import ConfigError, InvariantError
from bus.messages import (
    BandwidthGrant,
    Ended,
    HandleInput,
    Moved,
    NodeAnnounced,
    NodeHeartbeat,
    NodeJoined,
    NodeLeft,
    NodeLost,
    Overran,
    Placed,
    Retried,
    Start,
    TaskCancelled,
    TaskProgress,
    TaskState,
)
from bus.values import Execution, Kind, ModelProfile, Objective, Role
from planner.core.core import Event, PlannerCore, Tick
from planner.core.options import CoreOptions, WhenLate
from planner.core.region.records import hash_of
from planner.search.algorithm1 import Algorithm
from planner.search.families import ALL_THREE, DEVICE, DEVICE_EDGE
from planner.search.placements import Choice
from planner.search.policies import BUILT_IN, Policy, Restriction
from tests.unit.planner.scenes import (
    MBPS,
    SHA,
    cloud,
    completed,
    device,
    edge,
    failed,
    faster,
    only,
    profile,
    task,
    types,
)


def core_with(*events: Event, policy: str | Policy = "deepar", **settings: object) -> PlannerCore:
    core = PlannerCore(0, policy, options=CoreOptions(**settings))  # type: ignore[arg-type]
    for event in events:
        core.handle(event, 0.0)
    return core


def test_a_task_is_admitted_placed_granted_and_started_in_one_step() -> None:
    core = core_with(edge(), cloud(), device())
    changes = core.handle(task(), 1.0)
    placed = only(changes, Placed)
    assert types(changes)[:2] == ["admitted", "placement"]
    assert only(changes, Start).at_s == 1.0
    assert placed.parts.total_s == pytest.approx(placed.delay_s)
    grants = {change.link: change.bps for change in changes if isinstance(change, BandwidthGrant)}
    assert grants == {
        link: bps for link, bps in ((1, placed.placement.link1_bps), (2, placed.placement.link2_bps)) if bps
    }
    core.validate()


def test_completion_frees_what_was_held() -> None:
    core = core_with(edge(), device())
    core.handle(task(), 0.0)
    ended = only(core.handle(completed(), 5.0), Ended)
    assert (ended.state, ended.edge, ended.released_slots) == (TaskState.COMPLETED, "e1", 1)
    assert ended.released_link1_bps == 100 * MBPS
    assert core.live_tasks == 0
    assert not core.ledger.reservations
    core.validate()


def drains(node: NodeAnnounced) -> NodeAnnounced:
    return node.model_copy(update={"draining": True})


def test_what_runs_on_an_edge_that_drains_goes_on_and_what_waits_for_it_goes_elsewhere() -> None:
    slow = edge("e2", speed=2.0)
    core = core_with(edge("e1"), slow, device(), device("d2"), device("d3"), device("d4"), policy="edge-only")
    for number, name in enumerate(("d1", "d2", "d3", "d4"), 1):
        core.handle(task(f"t{number}", name, samples=100), 0.0)
    on = {r.task_id: r for r in core.ledger.edges["e1"].reservations.values()}
    assert {r.running for r in on.values()} == {True, False}
    changes = core.handle(drains(edge("e1")), 1.0)
    assert {c.task_id for c in changes if isinstance(c, Retried)} == {t for t, r in on.items() if not r.running}
    assert {c.cause for c in changes if isinstance(c, Retried)} == {"draining"}
    assert {c.placement.edge for c in changes if isinstance(c, Placed)} == {"e2"}
    assert {r.running for r in core.ledger.edges["e1"].reservations.values()} == {True}
    assert only(core.handle(task("t9"), 2.0), Placed).placement.edge == "e2"
    assert core.handle(drains(edge("e1")), 3.0) == []
    core.validate()
    again = PlannerCore.from_state(core.to_state(), policy="edge-only")
    assert again.state_hash == core.state_hash
    assert only(again.handle(task("t10", "d2"), 4.0), Placed).placement.edge == "e2"


def test_where_nothing_but_a_draining_edge_would_do_a_task_waits_for_another() -> None:
    core = core_with(drains(edge("e1")), device(), policy="edge-only")
    assert types(core.handle(task(), 0.0)) == ["admitted"]
    core.handle(NodeLeft(node="e1", incarnation="i1"), 1.0)
    changes = core.handle(edge("e1", incarnation="i2"), 2.0)
    assert types(changes)[:2] == ["node_joined", "placement"]
    core.validate()


def test_a_node_that_does_not_drain_counts_in_the_hash_as_it_always_did() -> None:
    unknown = {"draining": True, "link1_latency_s": True, "link2_latency_s": True}
    first = {
        "model",
        "sha256",
        "platform",
        "layer_names",
        "layer_s",
        "cut_bytes",
        "forbidden",
        "whole_s",
        "sum_of_slices_s",
    }
    later = set(ModelProfile.model_fields) - first
    text = edge().model_dump_json(exclude={**unknown, "models": {"__all__": later}})
    assert core_with(edge()).nodes["e1"].digest == hash_of("node|" + text)
    assert core_with(drains(edge())).nodes["e1"].digest != hash_of("node|" + text)
    assert core_with(edge(link2_latency_s=0.04)).nodes["e1"].digest != hash_of("node|" + text)
    for more in ({"codecs": ()}, {"accelerator": "cpu"}, {"not_on_gpu": "no driver"}, {"executors": 2}):
        measured = edge().models[0].model_copy(update=more)
        assert core_with(edge(models=(measured,))).nodes["e1"].digest != hash_of("node|" + text)


@pytest.mark.parametrize(("policy", "latency_s"), [("edge-only", 0.020), ("cloud-only", 0.060)])
@pytest.mark.parametrize(("objective", "crossings"), [(Objective.SEQUENTIAL, 10), (Objective.PIPELINED, 1)])
def test_declared_latencies_are_part_of_the_predicted_delay(
    policy: str, latency_s: float, objective: Objective, crossings: int
) -> None:
    def placed(link1_s: float | None, link2_s: float | None) -> Placed:
        core = PlannerCore(0, policy, objective=objective, execution=objective.execution)
        for node in (edge(link2_latency_s=link2_s), cloud(), device(link1_latency_s=link1_s)):
            core.handle(node, 0.0)
        core.validate()
        placed: Placed = only(core.handle(task(), 0.0), Placed)
        return placed

    near, far = placed(None, None), placed(0.020, 0.040)
    assert far.placement == near.placement
    assert far.delay_s - near.delay_s == pytest.approx(2 * crossings * latency_s)


def test_declared_latencies_survive_a_restart() -> None:
    core = core_with(edge(slots=9, link2_latency_s=0.04), cloud(), device(link1_latency_s=0.02), policy="cloud-only")
    again = PlannerCore.from_state(core.to_state(), policy="cloud-only")
    assert again.state_hash == core.state_hash
    assert again.handle(task(), 1.0) == core.handle(task(), 1.0)


def test_a_device_with_a_long_way_to_the_edge_computes_itself_and_one_beside_it_does_not() -> None:
    core = core_with(edge(slots=9), cloud(), device("d1", link1_latency_s=10.0), device("d2", link1_latency_s=0.001))
    assert only(core.handle(task("t1", "d1"), 0.0), Placed).placement.edge is None
    assert only(core.handle(task("t2", "d2"), 0.0), Placed).placement.edge == "e1"


@pytest.mark.parametrize("changed", [device(link1_latency_s=0.5), edge(link2_latency_s=0.5)])
def test_a_scheduled_task_is_planned_again_when_a_latency_that_it_rests_on_changes(changed: NodeAnnounced) -> None:
    core = core_with(
        edge(link1_capacity_bps=80 * MBPS, link2_capacity_bps=80 * MBPS), cloud(), device(), policy="cloud-only"
    )
    for name in ("t1", "t2"):
        core.handle(task(name), 0.0)
    scheduled = [one.task_id for one in core.tasks.values() if one.state is TaskState.SCHEDULED]
    assert scheduled
    same = {"link1_capacity_bps": 80 * MBPS, "link2_capacity_bps": 80 * MBPS} if changed.role is Role.EDGE else {}
    changes = core.handle(changed.model_copy(update=same), 0.1)
    assert {change.task_id for change in changes if isinstance(change, Retried)} == set(scheduled)
    core.validate()


def test_duplicates_change_nothing() -> None:
    core = core_with(edge(), device())
    core.handle(task(), 0.0)
    assert core.handle(task(), 0.1) == []
    core.handle(completed(), 1.0)
    for event in (task(), completed(), failed(), TaskCancelled(task_id="t1"), TaskCancelled(task_id="t9")):
        assert core.handle(event, 2.0) == []
    assert core.handle(TaskProgress(task_id="t1", attempt=1, node="d1", done=3), 2.0) == []


def test_only_the_last_ended_tasks_are_remembered() -> None:
    core = core_with(edge(), device(), remember_ended=3)
    for i in range(5):
        core.handle(task(f"t{i}"), float(i))
        core.handle(completed(f"t{i}"), i + 0.5)
    assert len(core.ended) == 3
    assert core.handle(task("t2"), 9.0) == []
    assert types(core.handle(task("t0"), 9.0))[0] == "admitted"
    core.validate()


# --- what waits, and what can never be


def test_a_task_of_an_unknown_device_waits_until_it_joins() -> None:
    core = core_with(edge())
    assert types(core.handle(task(), 0.0)) == ["admitted"]
    assert "placement" in types(core.handle(device(), 1.0))
    core.validate()


def test_patience_ends() -> None:
    core = core_with(edge(), patience_s=60.0)
    core.handle(task(), 1.0)
    assert core.next_wakeup() == edge().lease_s
    core.handle(NodeHeartbeat(node="e1", incarnation="i1"), 55.0)
    assert core.handle(Tick(), 60.9) == []
    ended = only(core.handle(Tick(), 61.0), Ended)
    assert (ended.state, ended.cause, ended.detail) == (TaskState.REJECTED, "no_device", "d1 has not joined for 60 s")


def test_patience_with_a_device_that_does_not_come_back_ends() -> None:
    core = core_with(edge(lease_s=1000.0), device(), patience_s=60.0)
    core.handle(task(), 1.0)
    core.handle(NodeLeft(node="d1", incarnation="i1"), 2.0)
    assert core.handle(Tick(), 61.9) == []
    ended = only(core.handle(Tick(), 62.0), Ended)
    assert (ended.state, ended.cause) == (TaskState.FAILED, "device_lost")


@pytest.mark.parametrize(
    ("policy", "events", "submitted", "cause"),
    [
        ("deepar", (device(models=()),), task(), "unknown_model"),
        ("edge-only", (edge(), device(reachable_edges=())), task(), "unreachable"),
        ("edge-only", (edge(slots=0), device(reachable_edges=("e1",))), task(), "never_fits"),
        ("edge-only", (edge(models=()), device(reachable_edges=("e1",))), task(), "never_fits"),
        ("edge-only", (edge(), device()), task(max_link1_bps=0), "never_fits"),
        ("cloud-only", (edge(link2_capacity_bps=0), cloud(), device(reachable_edges=("e1",))), task(), "never_fits"),
    ],
)
def test_what_can_never_fit_is_rejected_with_the_reason(policy, events, submitted, cause) -> None:  # type: ignore[no-untyped-def]
    core = core_with(*events, policy=policy)
    ended = only(core.handle(submitted, 0.0), Ended)
    assert (ended.state, ended.cause) == (TaskState.REJECTED, cause)
    assert ended.detail
    core.validate()


def test_cloud_only_waits_for_a_cloud_and_edge_only_for_the_edge_that_is_named() -> None:
    core = core_with(edge(), device(), policy="cloud-only")
    assert types(core.handle(task(), 0.0)) == ["admitted"]
    assert only(core.handle(cloud(), 1.0), Placed).placement.kind is Kind.CLOUD
    core = core_with(edge("e2"), device(reachable_edges=("e1",)), policy="edge-only")
    assert types(core.handle(task(), 0.0)) == ["admitted"]
    assert only(core.handle(edge("e1"), 1.0), Placed).placement.edge == "e1"


def test_a_device_that_reaches_no_edge_computes_itself() -> None:
    core = core_with(edge(), cloud(), device(reachable_edges=()))
    assert only(core.handle(task(), 0.0), Placed).placement.kind is Kind.DEVICE


def test_a_model_of_another_hash_is_not_used_on_an_edge() -> None:
    core = core_with(edge(models=(profile(sha256="1" * 64),)), device())
    placed = only(core.handle(task(), 0.0), Placed)
    assert placed.placement.kind is Kind.DEVICE
    assert placed.sha256 == SHA


def test_a_full_queue_rejects_only_what_would_have_to_wait() -> None:
    core = core_with(edge(slots=1), device("d1"), device("d2"), policy="edge-only", max_waiting=1)
    core.handle(task("t1"), 0.0)
    assert only(core.handle(task("t2"), 0.0), Placed).wait_s > 0
    ended = only(core.handle(task("t3", "d2"), 0.0), Ended)
    assert (ended.state, ended.cause) == (TaskState.REJECTED, "queue_full")
    core.handle(edge("e2"), 0.1)
    assert only(core.handle(task("t4", "d2"), 0.2), Start).task_id == "t4"
    core.validate()


def test_a_deadline_expires_a_task_in_every_state() -> None:
    core = core_with(edge(slots=1, lease_s=100), device(lease_s=100), policy="edge-only", when_late=WhenLate.LEAST_LATE)
    core.handle(task("running", deadline_s=5.0, samples=1000), 0.0)
    core.handle(task("scheduled", deadline_s=6.0), 0.0)
    core.handle(task("waiting", "d9", deadline_s=7.0), 0.0)
    assert core.next_wakeup() == 5.0
    changes = core.handle(Tick(), 5.0)
    assert (only(changes, Ended).task_id, only(changes, Ended).state) == ("running", TaskState.EXPIRED)
    assert only(changes, Start).task_id == "scheduled"
    assert {change.task_id for change in core.handle(Tick(), 8.0) if isinstance(change, Ended)} == {
        "scheduled",
        "waiting",
    }
    assert core.live_tasks == 0


def test_a_task_that_no_placement_ends_by_its_deadline_is_rejected_at_once_or_placed_by_an_option() -> None:
    for when_late, wanted in ((WhenLate.REJECT, "ended"), (WhenLate.LEAST_LATE, "placement")):
        core = core_with(edge(slots=1), device("d1"), device("d2"), policy="edge-only", when_late=when_late)
        first = only(core.handle(task("t1", "d1", samples=1000), 0.0), Placed)
        changes = core.handle(task("t2", "d2", samples=1000, deadline_s=first.delay_s + 1.0), 0.0)
        assert types(changes)[:2] == ["admitted", wanted]
        core.validate()
        if when_late is WhenLate.LEAST_LATE:
            assert only(changes, Placed).start_s == first.delay_s
            continue
        ended = only(changes, Ended)
        assert (ended.state, ended.cause) == (TaskState.REJECTED, "deadline")
        assert f"{first.delay_s - 1.0:.3g} s after the deadline" in ended.detail
        # with enough time it waits, as ever
        assert only(core.handle(task("t3", "d2", samples=1000, deadline_s=2.1 * first.delay_s), 0.0), Placed)


def test_a_deadline_is_looked_at_again_when_a_task_is_planned_again() -> None:
    core = core_with(edge("e1"), edge("e2", speed=1.5), device(), policy="edge-only")
    whole_s = only(core.handle(task("t1", samples=100, deadline_s=4.0), 0.0), Placed).delay_s
    assert whole_s < 4.0
    changes = core.handle(NodeLeft(node="e1", incarnation="i1"), 0.5)
    assert types(changes) == ["retried", "node_lost", "ended"]
    assert (only(changes, Ended).state, only(changes, Ended).cause) == (TaskState.REJECTED, "deadline")


class Frugal:
    """Prefers the device to any edge, as long as that is allowed."""

    name = "frugal"

    def place(self, algorithm: Algorithm) -> Choice | None:
        return algorithm.best({DEVICE}) or algorithm.best()


def test_a_policy_is_offered_only_what_ends_by_the_deadline_while_there_is_any() -> None:
    core = PlannerCore(0, Frugal())
    for node in (edge(), device()):
        core.handle(node, 0.0)
    assert only(core.handle(task("t1", samples=10, deadline_s=100.0), 0.0), Placed).placement.kind is Kind.DEVICE
    core.handle(completed("t1"), 1.0)
    device_s = 10 * 0.06
    assert only(core.handle(task("t2", samples=10, deadline_s=0.9 * device_s), 2.0), Placed).placement.kind is Kind.EDGE


def test_what_is_past_its_deadline_never_starts_whatever_event_frees_its_place() -> None:
    core = core_with(edge(slots=1), device("d1"), device("d2"), device("d3"), policy="edge-only")
    first = only(core.handle(task("t1", "d1", samples=100), 0.0), Placed)
    core.handle(task("t2", "d2", samples=100, deadline_s=2 * first.delay_s + 0.1), 0.0)
    core.handle(task("t3", "d3", samples=100), 0.0)
    # the first is late, and ends when the second is past its deadline; no tick comes in between
    changes = core.handle(completed("t1", "d1"), 2 * first.delay_s + 0.2)
    assert [(c.task_id, c.state) for c in changes if isinstance(c, Ended)] == [
        ("t1", TaskState.COMPLETED),
        ("t2", TaskState.EXPIRED),
    ]
    assert only(changes, Start).task_id == "t3"
    core.validate()


def test_what_runs_past_its_deadline_is_left_to_the_tick() -> None:
    core = core_with(edge(slots=1), device("d1"), device("d2"), policy="edge-only")
    first = only(core.handle(task("t1", "d1", samples=100, deadline_s=3.0), 0.0), Placed)
    assert first.delay_s < 3.0
    core.handle(task("t2", "d2", deadline_s=50.0), 2.9)
    assert not [c for c in core.handle(task("t3", "d2"), 3.1) if isinstance(c, Ended)]
    assert only(core.handle(completed("t1", "d1"), 3.2), Ended).state is TaskState.COMPLETED
    core.validate()


# --- reality against prediction


def test_an_early_end_pulls_the_next_forward_and_a_late_one_pushes_it_back() -> None:
    core = core_with(edge(slots=1), device("d1"), device("d2"), policy="edge-only")
    first = only(core.handle(task("t1", "d1"), 0.0), Placed)
    core.handle(task("t2", "d2"), 0.0)
    early = core.handle(completed("t1"), first.delay_s / 2)
    assert only(early, Start).at_s == first.delay_s / 2
    core.handle(task("t3", "d1"), first.delay_s / 2)
    end_s = first.delay_s * 1.5
    late = core.handle(task("t4", "d1"), end_s + 0.01)  # t2 should have ended
    assert only(late, Overran).task_id == "t2"
    assert only(late, Moved).task_ids == ("t3",)
    assert not [change for change in late if isinstance(change, Start)]
    core.validate()
    now_starts = core.handle(completed("t2", "d2"), end_s + 0.02)
    assert only(now_starts, Start).task_id == "t3"
    core.validate()


def test_a_task_never_starts_merely_because_its_time_has_come() -> None:
    core = core_with(edge(slots=1), device("d1"), device("d2"), policy="edge-only")
    first = only(core.handle(task("t1", "d1"), 0.0), Placed)
    core.handle(task("t2", "d2"), 0.0)
    for late in (1.0, 2.0, 4.0, 8.0):
        assert "start" not in types(core.handle(Tick(), first.delay_s * late))
        core.validate()


# Two edges that run one model each, and a device whose tasks on both must share it: its processor, or its own link.
_HEAVY_INPUT = (20_000_000, 1_000, 1_000, 10)
_LIGHT_INPUT = (500_000, 500_000, 500_000, 10)


def two_edges_and_a_device(cut_bytes: tuple[int, ...], own_bps: int) -> PlannerCore:
    models = [profile(model, (0.01, 0.3, 0.3), cut_bytes) for model in ("a", "b")]
    return core_with(
        edge("e1", slots=1, models=(faster(models[0], 10.0),)),
        edge("e2", slots=1, models=(faster(models[1], 10.0),)),
        device("d1", models=tuple(models), link1_capacity_bps=own_bps),
        device("d2", models=tuple(models)),
        policy=Restriction("through-edges", frozenset({DEVICE_EDGE})),
    )


@pytest.mark.parametrize(
    ("cut_bytes", "own_bps", "computes"), [(_HEAVY_INPUT, 0, True), (_LIGHT_INPUT, 20 * MBPS, False)]
)
@pytest.mark.parametrize("ends_at", [0.5, 1.5], ids=["early", "late"])
def test_moving_a_task_moves_what_its_device_was_promised_on_another_edge(
    cut_bytes: tuple[int, ...], own_bps: int, computes: bool, ends_at: float
) -> None:
    core = two_edges_and_a_device(cut_bytes, own_bps)
    first = only(core.handle(task("t1", "d2", model="a", samples=100), 0.0), Placed)
    second = only(core.handle(task("t2", "d1", model="a", samples=50), 0.0), Placed)
    third = only(core.handle(task("t3", "d1", model="b", samples=200), 0.0), Placed)
    assert [placed.placement.edge for placed in (first, second, third)] == ["e1", "e1", "e2"]
    assert [placed.placement.cut1 > 0 for placed in (second, third)] == [computes, computes]
    assert second.start_s == first.delay_s
    assert third.start_s == second.start_s + second.delay_s  # the second edge is idle all the time
    now = ends_at * first.delay_s
    core.handle(task("t4", "d2", model="b", samples=1), now)  # an event that finds the first task late, if it is
    core.validate()
    if ends_at > 1.0:
        assert core.ledger.reservations["t2"].start_s > now
        assert core.ledger.reservations["t3"].start_s == core.ledger.reservations["t2"].end_s
    core.handle(completed("t1", "d2"), now)
    core.validate()
    moved = core.ledger.reservations["t2"]
    assert moved.running
    assert core.ledger.reservations["t3"].start_s == moved.end_s == now + second.delay_s


@pytest.mark.parametrize("policy", ["deepar", "edge-only", "cloud-only", "no-delay", "neurosurgeon"])
def test_what_a_device_is_promised_at_once_never_exceeds_its_own_link(policy: str) -> None:
    own = 20 * MBPS
    nodes = [edge(f"e{i}", slots=8) for i in range(3)]
    core = core_with(*nodes, cloud(), device(link1_capacity_bps=own), policy=policy)
    for number in range(6):
        core.handle(task(f"t{number}", samples=20 + 5 * number, max_link1_bps=own), 0.1 * number)
        core.validate()
    held = list(core.ledger.reservations.values())
    assert sum(r.link1_bps > 0 for r in held) >= (1 if policy == "no-delay" else 3) or policy == "neurosurgeon"
    for at_s in {r.start_s for r in held}:
        assert sum(r.link1_bps for r in held if r.start_s <= at_s < r.end_s) <= own


def test_tasks_with_smaller_caps_share_a_devices_own_link() -> None:
    core = core_with(edge(slots=8), device(link1_capacity_bps=20 * MBPS), policy="edge-only")
    for number in range(4):
        core.handle(task(f"t{number}", max_link1_bps=8 * MBPS), 0.0)
    grants = [r.link1_bps for r in core.ledger.reservations.values() if r.running]
    assert grants == [8 * MBPS, 8 * MBPS, 4 * MBPS]
    core.validate()


def test_a_device_that_lowers_its_own_link_gets_back_what_no_longer_fits() -> None:
    core = core_with(edge(slots=8), device(), policy="edge-only")
    for number in range(4):
        core.handle(task(f"t{number}", max_link1_bps=20 * MBPS), 0.0)
    assert sum(r.running for r in core.ledger.reservations.values()) == 4
    changes = core.handle(device(link1_capacity_bps=50 * MBPS), 0.1)
    assert [c.task_id for c in changes if isinstance(c, Retried)] == ["t3", "t2"]
    core.validate()
    assert [r.link1_bps for r in core.ledger.reservations.values() if r.running] == [20 * MBPS, 20 * MBPS, 10 * MBPS]
    again = PlannerCore.from_state(core.to_state(), policy="edge-only")
    again.validate()
    assert again.state_hash == core.state_hash
    # a device without a limit again: its tasks no longer wait for one another
    changes = core.handle(device(), 0.2)
    assert {c.task_id for c in changes if isinstance(c, Start)} == {
        t for t, r in again.ledger.reservations.items() if not r.running
    }
    core.validate()


# --- failures


def test_a_failure_ends_a_task_and_a_retryable_one_starts_it_again() -> None:
    core = core_with(edge(), device())
    core.handle(task(), 0.0)
    changes = core.handle(failed(retryable=True), 1.0)
    assert types(changes)[0] == "retried"
    assert only(changes, Start).attempt == 2
    assert core.handle(failed(attempt=1), 1.5) == []  # of an attempt that was taken back
    ended = only(core.handle(failed(attempt=2), 2.0), Ended)
    assert (ended.state, ended.cause) == (TaskState.FAILED, "bad_frame")
    core.validate()


def test_retries_are_bounded() -> None:
    core = core_with(edge(), device(), max_attempts=3)
    core.handle(task(), 0.0)
    for attempt in (1, 2):
        assert only(core.handle(failed(attempt=attempt, retryable=True), 1.0), Retried)
    assert only(core.handle(failed(attempt=3, retryable=True), 1.0), Ended).state is TaskState.FAILED


def test_completion_of_an_attempt_that_was_taken_back_is_still_true() -> None:
    core = core_with(edge(), device())
    core.handle(task(), 0.0)
    core.handle(failed(retryable=True), 1.0)
    assert only(core.handle(completed(attempt=1), 1.5), Ended).state is TaskState.COMPLETED
    core.validate()


def test_completion_from_another_node_than_the_device_is_not_believed() -> None:
    core = core_with(edge(), device())
    core.handle(task(), 0.0)
    assert core.handle(completed(node="d2"), 1.0) == []


def test_cancelling_fails_a_task() -> None:
    core = core_with(edge(), device())
    core.handle(task(), 0.0)
    ended = only(core.handle(TaskCancelled(task_id="t1"), 1.0), Ended)
    assert (ended.state, ended.cause, ended.released_slots) == (TaskState.FAILED, "cancelled", 1)


# --- nodes


def test_a_silent_node_is_lost_after_a_whole_lease_and_not_before() -> None:
    core = core_with(edge(lease_s=10.0), device(lease_s=1000.0))
    core.handle(NodeHeartbeat(node="e1", incarnation="i1"), 6.0)
    core.handle(NodeHeartbeat(node="e1", incarnation="i0"), 15.0)  # an old incarnation renews nothing
    core.handle(NodeHeartbeat(node="e9", incarnation="i1"), 15.0)
    assert core.next_wakeup() == 16.0
    assert core.handle(Tick(), 15.9) == []
    lost = only(core.handle(Tick(), 16.0), NodeLost)
    assert (lost.node, lost.cause) == ("e1", "lease_expired")
    assert core.next_wakeup() == 1000.0


def test_heartbeats_leave_no_trace_and_leases_begin_anew_after_a_restart() -> None:
    core = core_with(edge(lease_s=10.0), device(lease_s=10.0))
    before = core.state_hash
    assert core.handle(NodeHeartbeat(node="e1", incarnation="i1"), 6.0) == []
    assert core.state_hash == before
    again = PlannerCore.from_state(core.to_state())
    assert again.next_wakeup() is None
    again.restart_leases(100.0)
    assert again.next_wakeup() == 110.0


def test_an_edges_tasks_are_placed_again_when_it_is_lost() -> None:
    core = core_with(edge("e1"), edge("e2", speed=2.0), device())
    assert only(core.handle(task(), 0.0), Placed).placement.edge == "e1"
    changes = core.handle(NodeLeft(node="e1", incarnation="i1"), 1.0)
    assert types(changes)[:2] == ["retried", "node_lost"]
    assert only(changes, Placed).placement.edge == "e2"
    assert only(changes, Start).attempt == 2
    core.validate()


def test_a_lost_device_takes_its_handles_with_it_and_the_rest_waits_for_it() -> None:
    core = core_with(edge(), device())
    core.handle(task("kept"), 0.0)
    core.handle(task("held", input=HandleInput(handle="h")), 0.0)
    changes = core.handle(NodeLeft(node="d1", incarnation="i1"), 0.1)
    ended = only(changes, Ended)
    assert (ended.task_id, ended.cause) == ("held", "input_lost")
    assert only(changes, Retried).task_id == "kept"
    assert "placement" not in types(changes)
    back = core.handle(device(incarnation="i2"), 5.0)
    assert (only(back, Start).task_id, only(back, Start).attempt) == ("kept", 2)
    core.validate()


def test_a_new_incarnation_replaces_the_old_one() -> None:
    core = core_with(edge(), device())
    core.handle(task(), 0.0)
    changes = core.handle(device(incarnation="i2"), 1.0)
    assert types(changes)[:3] == ["retried", "node_lost", "node_joined"]
    assert only(changes, NodeLost).cause == "replaced"
    assert only(changes, Start).attempt == 2
    assert core.handle(device(incarnation="i2"), 2.0) == []  # the same again refreshes the lease
    assert core.next_wakeup() == 10.0
    assert core.handle(NodeLeft(node="d1", incarnation="i1"), 3.0) == []  # the old one's farewell comes late


def test_a_node_of_another_region_is_not_ours() -> None:
    core = PlannerCore(region=2)
    assert core.handle(edge(), 0.0) == []
    assert types(core.handle(edge(region=2), 0.0)) == ["node_joined"]


def test_a_lowered_capacity_takes_back_the_latest() -> None:
    core = core_with(edge(slots=2), device("d1"), device("d2"), policy="edge-only")
    core.handle(task("t1", "d1", samples=100), 0.0)
    core.handle(task("t2", "d2", samples=100), 0.1)
    changes = core.handle(edge(slots=1), 0.2)
    assert (only(changes, Retried).task_id, only(changes, Retried).cause) == ("t2", "capacity_lowered")
    assert only(changes, NodeJoined)
    assert only(changes, Placed).wait_s > 0
    core.validate()


def test_a_scheduled_task_that_can_no_longer_fit_is_planned_again() -> None:
    core = core_with(edge(slots=1), device("d1"), device("d2"), policy="edge-only")
    core.handle(task("t1", "d1", max_link1_bps=10 * MBPS), 0.0)
    core.handle(task("t2", "d2", max_link1_bps=90 * MBPS), 0.0)
    changes = core.handle(edge(slots=1, link1_capacity_bps=50 * MBPS), 0.1)
    assert (only(changes, Retried).task_id, only(changes, Retried).cause) == ("t2", "no_longer_fits")
    assert only(changes, Placed).placement.link1_bps == 50 * MBPS
    core.validate()


def test_an_edge_that_drops_the_model_loses_the_task() -> None:
    core = core_with(edge("e1"), edge("e2", speed=2.0), device())
    core.handle(task(), 0.0)
    changes = core.handle(edge("e1", models=()), 0.1)
    assert only(changes, Retried).cause == "model_gone"
    assert only(changes, Placed).placement.edge == "e2"


def test_the_last_cloud_takes_its_tasks_along_and_one_of_two_does_not() -> None:
    core = core_with(edge(), cloud("c1", speed=1000.0), cloud("c2", speed=1000.0), device(), policy="cloud-only")
    core.handle(task(), 0.0)
    assert types(core.handle(NodeLeft(node="c1", incarnation="i1"), 0.1)) == ["node_lost"]
    changes = core.handle(NodeLeft(node="c2", incarnation="i1"), 0.2)
    assert types(changes) == ["retried", "node_lost"]
    assert only(core.handle(cloud("c3"), 0.3), Start).attempt == 2
    core.validate()


def test_a_name_that_comes_back_in_another_role_is_another_node() -> None:
    core = core_with(edge("n1"), device())
    changes = core.handle(cloud("n1"), 1.0)
    assert types(changes) == ["node_lost", "node_joined"]
    assert core.nodes["n1"].announced.role is Role.CLOUD


# --- caps


def test_grants_keep_to_the_least_of_all_caps() -> None:
    core = core_with(edge(link1_capacity_bps=80 * MBPS), device(link1_capacity_bps=60 * MBPS), policy="edge-only")
    placed = only(core.handle(task(max_link1_bps=70 * MBPS), 0.0), Placed)
    assert placed.placement.link1_bps == 60 * MBPS
    core = core_with(edge(link1_capacity_bps=80 * MBPS), device(), policy="edge-only")
    assert only(core.handle(task(max_link1_bps=None), 0.0), Placed).placement.link1_bps == 80 * MBPS


def test_ledger_time_does_not_go_back() -> None:
    core = core_with(edge(), device())
    core.handle(task("t1"), 10.0)
    assert only(core.handle(completed("t1"), 3.0), Ended)
    assert core.now_s == 10.0


def test_a_change_that_cannot_be_is_a_bug() -> None:
    core = core_with(edge(), device())
    changes = core.handle(task(), 0.0)
    ended = only(core.handle(completed(), 1.0), Ended)
    for change in (ended, only(changes, Placed), only(changes, Start)):
        with pytest.raises(InvariantError):
            core.apply(change, 2.0)


# --- numbers without an end


def objectives_of(policy: str) -> list[Objective]:
    """Mixes of routes are for streams of samples only."""
    return [Objective.PIPELINED] if policy in ("routes", "elastic") else list(Objective)


@pytest.mark.parametrize(
    ("policy", "objective"),
    [(policy, objective) for policy in sorted(BUILT_IN) for objective in objectives_of(policy)],
)
@pytest.mark.parametrize("endless", ["device", "edge", "cloud", "device edge", "device edge cloud"])
def test_a_delay_that_is_not_finite_is_no_candidate(policy: str, objective: Objective, endless: str) -> None:
    """Validation refuses such a profile; should one come in all the same, nothing is put there and the planner goes on."""
    slow = profile().model_copy(update={"layer_s": (1e308, 1e308, 1e308)})
    core = PlannerCore(0, policy, objective)
    for made in (edge, cloud, device):
        announced: NodeAnnounced = made()
        core.handle(announced.model_copy(update={"models": (slow,)}) if made.__name__ in endless else announced, 0.0)
    for i in range(3):
        core.handle(task(f"t{i}"), 0.1)
    for one in core.tasks.values():
        if one.placed is not None:
            assert one.placed.delay_s < 1e6
            placement = one.placed.placement
            assert not (placement.cut1 and "device" in endless)
            assert not (placement.uses_slot and "edge" in endless)
            assert not (placement.uses_cloud and "cloud" in endless)
    core.validate()


def test_a_task_that_no_edge_can_serve_waits_where_another_edge_may_join() -> None:
    core = core_with(edge(slots=0), device(), policy="edge-only")
    assert types(core.handle(task(), 0.0)) == ["admitted"]
    assert only(core.handle(edge("e2"), 1.0), Start).task_id == "t1"
    core.validate()


# --- a node changes under the same incarnation


def scheduled_behind_another() -> tuple[PlannerCore, Placed]:
    """A region in which t1 runs and t2 is scheduled behind it, on the same edge and with the cloud."""
    core = PlannerCore(0, Restriction("all-three", frozenset({ALL_THREE})))
    for node in (edge(slots=1), cloud(), device("d1"), device("d2")):
        core.handle(node, 0.0)
    core.handle(task("t1", "d1"), 0.0)
    placed = only(core.handle(task("t2", "d2"), 0.0), Placed)
    assert placed.wait_s > 0
    return core, placed


@pytest.mark.parametrize(
    "changed",
    [
        device("d2", models=(profile(forbidden=(1,)),)),
        device("d2", models=(faster(profile(), 50.0),)),
        device("d2", link1_capacity_bps=3 * MBPS),
        edge(slots=1, speed=2.0),
        edge(slots=1, speed=8.0, link1_capacity_bps=900 * MBPS),
        cloud(speed=1.5),
    ],
    ids=["forbidden", "faster device", "slower link", "slower edge", "faster edge", "slower cloud"],
)
def test_what_rests_on_what_a_node_said_before_is_planned_again(changed: NodeAnnounced) -> None:
    core, before = scheduled_behind_another()
    changes = core.handle(changed, 0.01)
    retried, again = only(changes, Retried), only(changes, Placed)
    assert (retried.task_id, retried.cause, retried.detail) == ("t2", "node_changed", changed.node)
    assert again.task_id == "t2"
    assert (again.placement, again.delay_s, again.start_s) != (before.placement, before.delay_s, before.start_s)
    core.validate()
    # it is what a planner would choose that never knew anything else
    fresh = PlannerCore(0, core.policy)
    for name in ("e1", "c1", "d1", "d2"):
        fresh.handle(core.nodes[name].announced, 0.0)
    fresh.handle(task("t1", "d1"), 0.0)
    fresh.ledger.prolong("t1", core.ledger.reservations["t1"].end_s)
    wanted = fresh.decide(task("t2", "d2"), 0.01)
    assert wanted is not None
    assert (wanted.cut1, wanted.cut2) == (again.placement.cut1, again.placement.cut2)


@pytest.mark.parametrize(
    "changed",
    [
        device("d2", link1_capacity_bps=2_000 * MBPS),
        device("d2", lease_s=20.0),
        device("d1", models=(faster(profile(), 3.0),)),
        edge(slots=2),
        edge("e1", slots=1, models=(faster(profile(), 4.0), profile("other"))),
        cloud(lease_s=20.0),
        cloud("c2", speed=5.0),
    ],
    ids=["more link", "lease", "another device", "more slots", "another model", "cloud's lease", "slower second cloud"],
)
def test_what_rests_on_nothing_that_changed_stays(changed: NodeAnnounced) -> None:
    core, _ = scheduled_behind_another()
    assert "retried" not in types(core.handle(changed, 0.01))
    core.validate()


def test_what_runs_keeps_its_placement_when_a_node_changes() -> None:
    core = core_with(edge(slots=1), device(), policy="edge-only")
    core.handle(task(), 0.0)
    assert types(core.handle(edge(slots=1, speed=2.0), 0.01)) == ["node_joined"]


# --- one rule for what is minimised and what the stages do


def test_an_objective_goes_with_one_execution() -> None:
    assert PlannerCore(0, objective=Objective.PIPELINED).execution is Execution.STREAMING
    assert PlannerCore(0, objective=Objective.SEQUENTIAL).execution is Execution.SEQUENTIAL
    for objective in Objective:
        for execution in Execution:
            if execution is objective.execution:
                assert PlannerCore(0, objective=objective, execution=execution).execution is execution
            else:
                with pytest.raises(ConfigError, match=f"objective {objective} requires execution"):
                    PlannerCore(0, objective=objective, execution=execution)

"""The doctor's judgements that need no broker: limits compared, clocks blamed."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from bus import snapshots, topics
from bus.decisions import DecisionLog
from bus.kafka.connection import KafkaConnection
from bus.kafka.limits import BrokerLimits, SiteLimits
from bus.kafka.readers import FETCH_BYTES
from bus.limits import MAX_RECORD_BYTES
from bus.messages import Change, CircuitChanged, Decision, Learned, LearnedLink, NodeAnnounced, NodeLost
from bus.values import Role
from deploy.doctor import topic_checks
from deploy.doctor.latency_checks import latency_checks
from deploy.doctor.machine_checks import Check
from deploy.doctor.region_checks import (
    Leader,
    Seen,
    clock_checks,
    failing_checks,
    leader_of,
    nodes_check,
    planner_check,
)
from deploy.doctor.size_checks import NEEDED_BYTES, compare
from loadgen.sim.virtual_loop import run_virtual
from planner.learning.lessons import Lessons
from tests.sim.planners import town

KAFKAS_DEFAULTS = BrokerLimits(1, 1_048_588, 1_048_576, 104_857_600)


def compared(broker: BrokerLimits = KAFKAS_DEFAULTS, hidden: tuple[str, ...] = (), **limits: int) -> list[Check]:
    names = {spec.name: broker.message_max_bytes for spec in topics.specs(["e1"])}
    site = SiteLimits("here:9092", names | {f"deepar.{name}": size for name, size in limits.items()}, (broker,), hidden)
    producer_bytes = KafkaConnection().max_record_bytes
    return compare([site], producer_bytes=producer_bytes, consumer_bytes=FETCH_BYTES)


def test_kafkas_own_defaults_agree_with_ours() -> None:
    (check,) = compared()
    assert check.ok
    assert NEEDED_BYTES <= MAX_RECORD_BYTES


@pytest.mark.parametrize(
    ("broker", "said"),
    [
        (BrokerLimits(1, 1_048_588, 500_000, 104_857_600), "replica.fetch.max.bytes=500,000"),
        (BrokerLimits(1, 1_048_588, 1_048_576, 1_000_000), "socket.request.max.bytes=1,000,000"),
    ],
)
def test_a_broker_that_is_set_too_low_is_named(broker: BrokerLimits, said: str) -> None:
    (check,) = compared(broker)
    assert not check.ok
    assert said in check.detail
    assert "server.properties" in check.remedy


def test_only_what_a_topic_really_carries_is_asked_of_it() -> None:
    """Control messages are smaller than frames."""
    assert compared(tasks=1_010_000)[0].ok
    (check,) = compared(results=1_010_000)
    assert "deepar.results refuses" in check.detail


def test_what_may_not_be_looked_at_is_said() -> None:
    (check,) = compared(hidden=("broker 1",))
    assert check.ok
    assert "DescribeConfigs: broker 1" in check.detail


def test_where_all_clocks_differ_alike_it_is_this_machines() -> None:
    seen = Seen(clock_off_s={"d1": -100.2, "e1": -100.0, "planner": -99.9})
    (check,) = clock_checks(seen, 0.0)
    assert "this machine's clock" in check.remedy
    seen.clock_off_s["c1"] = 0.1
    (check,) = clock_checks(seen, 0.0)
    assert check.remedy.startswith("set them by NTP")
    (check,) = clock_checks(Seen(clock_off_s={"d1": 0.2}), 0.0)
    assert check.ok


def test_a_planner_is_silent_only_after_its_lease() -> None:
    log = DecisionLog(epoch=3, nonce="n")
    log.planner, log.lease_s = "p1", 5.0
    assert planner_check(Leader(0, log, newest_s=100.0), 104.0).ok
    assert "stale planner lock" in planner_check(Leader(0, log, newest_s=100.0), 106.0).detail
    assert planner_check(Leader(0, log, newest_s=100.0, heard=True), 7300.0).ok


def look(*, snapshot: bool) -> tuple[Leader, list[Check]]:
    """What the doctor finds in a region whose log has lost its first records, while its planner leads."""

    async def main() -> tuple[Leader, list[Check]]:
        async with town(played=False) as place:
            planner = place.start("p7", snapshot_every=2 if snapshot else 10_000, lease_s=4.0)
            await place.submit(range(3))
            await asyncio.sleep(20.0)
            begin = (await place.bus.end_offsets(topics.DECISIONS))[0] - 3
            if snapshot:
                async with aclosing(snapshots.found(place.bus, 0)) as candidates:
                    begin = (await anext(aiter(candidates))).snapshot.offset
            place.broker.delete_records(topics.DECISIONS, 0, begin)
            leader = await leader_of(place.bus, 0)
            assert planner.service.context.decision_log.epoch == leader.log.epoch == 1
            return leader, await topic_checks.settings(place.bus)

    return run_virtual(main())


@pytest.mark.parametrize("snapshot", [True, False])
def test_a_planner_whose_opening_is_gone_is_seen_to_lead(snapshot: bool) -> None:
    leader, _ = look(snapshot=snapshot)
    found = planner_check(leader, leader.newest_s + 1.0)
    assert found.ok
    assert ("p7" if snapshot else "a planner") + " leads epoch 1" in found.detail
    assert not planner_check(leader, leader.newest_s + 60.0).ok
    assert leader.log.lease_s == (4.0 if snapshot else 0.0)
    assert bool(leader.lost) is not snapshot


def test_topics_that_are_made_by_us_are_set_right() -> None:
    _, checks = look(snapshot=True)
    assert [check.state for check in checks] == ["ok"]


def test_silent_nodes_are_a_warning_unless_all_are() -> None:
    announced = NodeAnnounced(node="d1", role=Role.DEVICE, incarnation="i", lease_s=1.0)
    seen = Seen(nodes={"d1": (announced, 0.0), "d2": (announced, 0.0)}, clock_off_s={"d1": 0.0})
    assert nodes_check(seen).state == "warning"
    assert nodes_check(seen).ok
    assert "silent now: d2" in nodes_check(seen).detail
    assert nodes_check(Seen(nodes=seen.nodes)).state == "failed"
    seen.clock_off_s["d2"] = 0.0
    assert nodes_check(seen).state == "ok"


def test_nodes_at_which_attempts_keep_failing_are_a_warning_until_one_succeeds_or_they_are_replaced() -> None:
    leader = Leader(0, DecisionLog())

    def noted(*changes: Change) -> list[Check]:
        leader.note(
            Decision(region=0, epoch=1, nonce="n", seq=1, now_s=1.0, inputs={}, changes=changes, ledger_hash="0" * 32)
        )
        return failing_checks(Seen([leader]))

    assert noted(CircuitChanged(node="e1", failures=2)) == []
    (check,) = noted(CircuitChanged(node="e1", failures=3, until_s=61.0))
    assert (check.state, check.detail) == ("warning", "e1 (region 0): 3 attempts in a row failed there")
    assert noted(CircuitChanged(node="e1", failures=0)) == []
    assert len(noted(CircuitChanged(node="e1", failures=4, until_s=61.0))) == 1
    assert noted(NodeLost(node="e1", incarnation="i1", cause="replaced")) == []


@pytest.mark.parametrize(
    ("declared_s", "measured_s", "said"),
    [
        (0.02, 0.065, "d1 - e1: 20 ms declared, 65 ms measured"),
        (0.065, 0.02, "d1 - e1: 65 ms declared, 20 ms measured"),
        (0.0, 0.02, "d1 - e1: 0 s declared, 20 ms measured"),
        (0.02, 0.03, ""),
        (0.001, 0.004, ""),  # what the bus takes
        (None, 0.5, ""),
    ],
)
def test_a_declared_latency_that_measurements_contradict_is_a_warning(
    declared_s: float | None, measured_s: float, said: str
) -> None:
    leader = Leader(0, DecisionLog())
    latest = LearnedLink(link=1, device="d1", edge="e1", latency_s=measured_s)
    for link in (latest.model_copy(update={"latency_s": 9.0}), latest):  # the last one counts
        changes = (Learned(links=(link,)),)
        leader.note(
            Decision(region=0, epoch=1, nonce="n", seq=1, now_s=1.0, inputs={}, changes=changes, ledger_hash="h")
        )
    device = NodeAnnounced(node="d1", role=Role.DEVICE, incarnation="i", link1_latency_s=declared_s)
    found = latency_checks([leader.lessons], {"d1": device})
    assert [check.detail for check in found] == ([said] if said else [])
    assert all(check.state == "warning" for check in found)


def test_the_latency_of_link_2_is_declared_by_its_edge() -> None:
    lessons = Lessons()
    lessons.learn(Learned(links=(LearnedLink(link=2, edge="e1", latency_s=0.2),)))
    edge = NodeAnnounced(node="e1", role=Role.EDGE, incarnation="i", slots=1, link2_latency_s=0.04)
    assert [check.detail for check in latency_checks([lessons], {"e1": edge})] == [
        "e1 - cloud: 40 ms declared, 200 ms measured"
    ]

"""The doctor's judgements that need no broker: limits compared, clocks blamed."""

from __future__ import annotations

import pytest

from bus import topics
from bus.decisions import DecisionLog
from bus.kafka_connection import KafkaConnection
from bus.kafka_limits import BrokerLimits, SiteLimits
from bus.kafka_readers import FETCH_BYTES
from bus.limits import MAX_RECORD_BYTES
from deploy.machine_checks import Check
from deploy.region_checks import Leader, Seen, clock_checks, planner_check
from deploy.size_checks import NEEDED_BYTES, compare

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
    assert "DescribeConfigs): broker 1" in check.detail


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

"""The bus benchmark measures what it says; its ratios are for people to judge, not for a test on a shared machine."""

from __future__ import annotations

import asyncio

import pytest

from loadgen.bench.bus import HOP_AIMS, BusBenchSizes, run
from loadgen.bench.cpu_load import Busyness, BusynessWatch
from tests.kafka_broker import Broker

SMALL = BusBenchSizes(
    rounds=1, hops=((1_000, 4), (1_000_000, 2), (10_000_000, 1)), stream_samples=600, warm_up_records=200
)


@pytest.mark.parametrize("bus", ["memory", "kafka"])
def test_the_report_has_every_case(bus: str, request: pytest.FixtureRequest) -> None:
    bootstrap = None
    if bus == "kafka":
        broker: Broker = request.getfixturevalue("kafka")
        bootstrap = broker.bootstrap
    lines: list[str] = []
    report = run(bus, bootstrap, sizes=SMALL, progress=lines.append)  # type: ignore[arg-type]
    hops = [result for result in report["results"] if "p50_s" in result]
    assert {result["size_bytes"]: result["hops"] for result in hops} == dict(SMALL.hops)
    for result in hops:
        assert result["bus"] == bus
        assert 0 < result["p50_s"] <= result["p99_s"]
        assert 0 < result["bare_p50_s"] <= result["bare_p99_s"]
    (stream,) = (result for result in report["results"] if "samples_per_s" in result)
    assert stream["samples_per_s"] > 0
    assert stream["bare_messages_per_s"] > 0
    assert report["bench"] == "bus"
    assert set(report["busyness"]) == {"hops", "streams"}
    assert isinstance(report["judgeable"], bool)
    aimed = [aim["aim"] for aim in report["aims"]]
    assert aimed == ([HOP_AIMS[size] for size, _ in SMALL.hops] + [0.87] if bus == "kafka" else [])
    assert lines


async def test_a_blocked_loop_shows() -> None:
    watch = BusynessWatch()
    async with watch:
        await asyncio.sleep(0.02)
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.1
        while loop.time() < until:  # blocks the event loop
            pass
        await asyncio.sleep(0.02)
    assert watch.seen().loop_lag_p99_s > 0.05
    assert watch.seen().too_busy


def test_what_is_too_busy() -> None:
    assert not Busyness(0.5, 0.0, 0.001).too_busy
    assert Busyness(0.01, 0.0, 0.001).too_busy
    assert Busyness(0.5, 0.0, 0.2).too_busy
    assert not Busyness(None, 0.0, 0.001).too_busy

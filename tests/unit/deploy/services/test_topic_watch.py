"""A topic that is deleted under a service: not ready, told once a minute, and all well again when it is there."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from bus import topics
from bus.memory.bus import MemoryBus
from bus.topics import Partitions
from deploy.services.telemetry.probes import Health
from deploy.services.topic_watch import AGAIN_S, WATCH_S, TopicWatch, used_by
from loadgen.sim.virtual_loop import run_virtual


def test_who_needs_which_topic_follows_from_the_table() -> None:
    assert topics.DECISIONS in used_by("planner")
    assert not [name for name in used_by("planner") if "activations" in name]
    assert topics.activations_topic("e7") in used_by("edge", "e7")
    assert topics.ACTIVATIONS_CLOUD in used_by("cloud")
    assert not [name for name in used_by("device", "d1") if "activations" in name]  # an edge may come later
    assert topics.RESULTS in used_by("device", "d1")


@pytest.mark.parametrize(("topic", "regions"), [(topics.RESULTS, 0), (topics.DECISIONS, 0), (topics.EVENTS, 1)])
def test_a_topic_that_is_gone_is_told_once_a_minute_until_it_is_back(topic: str, regions: int) -> None:
    """`regions`: of the topic that is made in its place; 0: none is."""

    async def main() -> list[str]:
        async with MemoryBus() as bus:
            specs = topics.specs(["e1"], Partitions(regions=2))
            await bus.create_topics(specs)
            watch = TopicWatch(bus, used_by("edge", "e1"), 2)
            with capture_logs() as logs:
                async with watch.watching():
                    await asyncio.sleep(2.5 * WATCH_S)
                    assert not watch.missing
                    bus.broker.delete_topic(topic)
                    if regions:
                        await bus.create_topics(topics.specs([], Partitions(regions=regions)))
                    await asyncio.sleep(WATCH_S)
                    assert list(watch.missing) == [topic]
                    health = Health(True, {}, {}, {}).without(watch.missing)
                    assert not health.ready
                    assert health.detail["missing_topics"] == watch.missing
                    assert health.gauges["missing_topics"] == 1.0
                    await asyncio.sleep(3 * AGAIN_S)
                    if regions:
                        bus.broker.delete_topic(topic)
                    await bus.create_topics(specs)
                    await asyncio.sleep(2 * WATCH_S)
                    assert not watch.missing
            assert all(topic in entry["topics"] for entry in logs if entry["log_level"] == "error")
            assert all("deepar topics" in entry["remedy"] for entry in logs if entry["log_level"] == "error")
            return [entry["log_level"] for entry in logs]

    assert run_virtual(main()) == ["error"] * 4 + ["info"]


def test_a_broker_that_is_away_says_nothing_about_topics() -> None:
    async def main() -> None:
        async with MemoryBus() as bus:
            await bus.create_topics(topics.specs([]))
            watch = TopicWatch(bus, used_by("planner"), 1)
            with capture_logs() as logs:
                async with watch.watching():
                    bus.broker.pause()
                    await asyncio.sleep(60.0)
                    assert not watch.missing
                    bus.broker.resume()
            assert not [entry for entry in logs if entry["log_level"] != "debug"]

    run_virtual(main())

"""`KafkaBus` where things go wrong: outages, refused batches, a stuck consumer, several sites, another event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator

import pytest
import uvloop
from aiokafka import AIOKafkaProducer
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bus.errors import BusError, BusUnavailableError, ConfigError, MessageTooLargeError
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.port import Reader, Record
from bus.topics import TopicSpec, activations_topic
from tests.kafka_broker import Broker, OwnBroker

_numbers = itertools.count(1)

DELIVERY_S = 5.0
"""How long a record is tried. A broker that has just started on a busy machine has taken more than 2 s for its first."""


def name() -> str:
    return f"faults.t{next(_numbers)}"


@pytest.fixture
async def bus(kafka: Broker) -> AsyncIterator[KafkaBus]:
    async with KafkaBus(KafkaConnection(bootstrap_servers=kafka.bootstrap)) as bus:
        yield bus


async def read(reader: Reader, count: int, limit_s: float = 30.0) -> list[Record]:
    records: list[Record] = []
    async with asyncio.timeout(limit_s):
        while len(records) < count:
            records += await reader.fetch(timeout_s=0.5)
    return records


def within(limit_s: float, begun: float) -> None:
    assert asyncio.get_running_loop().time() - begun < limit_s


async def test_an_outage_fails_in_time_and_heals_by_itself(kafka_own: OwnBroker) -> None:
    loop = asyncio.get_running_loop()
    connection = KafkaConnection(bootstrap_servers=kafka_own.bootstrap, delivery_timeout_s=DELIVERY_S)
    leaving = KafkaBus(connection)
    async with KafkaBus(connection) as bus:
        await leaving.__aenter__()
        await bus.create_topics([TopicSpec("outage", 1)])
        reader = await bus.reader([("outage", 0)], start="start")
        member = await bus.join(["outage"], group="g")
        await leaving.join(["outage"], group="other")
        await leaving.send("outage", b"0")
        await bus.send("outage", b"1")
        assert len(await read(reader, 2)) == len(await read(member, 2)) == 2

        await asyncio.to_thread(kafka_own.kill)
        begun = loop.time()
        unacknowledged = [await bus.post("outage", b"lost %d" % number) for number in range(3)]
        for acknowledgement in unacknowledged:
            with pytest.raises(BusUnavailableError):
                await acknowledgement
        within(DELIVERY_S + 4.0, begun)
        for request in (bus.end_offsets("outage"), reader.lag(), member.commit({("outage", 0): 1})):
            begun = loop.time()
            with pytest.raises(BusUnavailableError):
                await request
            within(11.0, begun)
        begun = loop.time()
        assert await reader.fetch(timeout_s=0.3) == []
        within(5.0, begun)
        begun = loop.time()
        await leaving.__aexit__(None, None, None)
        within(15.0, begun)

        await asyncio.to_thread(kafka_own.start)
        while True:  # the first posts may still find no broker
            try:
                await bus.send("outage", b"again")
                break
            except BusUnavailableError:
                assert loop.time() - begun < 60
        waiting = [await bus.post("outage", b"%d" % number) for number in range(100)]
        await asyncio.gather(*waiting)
        # What was reported as failed may have been written; what was acknowledged is there, once, in order.
        for each in (reader, member):
            seen: list[bytes] = []
            async with asyncio.timeout(30):
                while b"99" not in seen:
                    seen += [record.value or b"" for record in await each.fetch(timeout_s=0.5)]
            rest = seen[seen.index(b"again") :]
            assert [value for value in rest if value.isdigit()] == [b"%d" % number for number in range(100)]
            assert set(seen) - {b"lost 0", b"lost 1", b"lost 2"} == set(rest) | {b"0", b"1"} & set(seen)
        await member.commit({("outage", 0): 2})


async def test_a_batch_that_the_broker_refuses_costs_no_other_record(kafka: Broker, bus: KafkaBus) -> None:
    """The limit of a topic may be lower than ours: the broker says so, and the producer must be replaced."""
    topic = name()
    connection = KafkaConnection(bootstrap_servers=kafka.bootstrap)
    admin = AIOKafkaAdminClient(**connection.client_settings(kafka.bootstrap))
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"max.message.bytes": "10000"})])
    await admin.close()
    before = [await bus.send(topic, b"%d" % number) for number in range(3)]
    with pytest.raises(MessageTooLargeError) as refused:
        await bus.send(topic, bytes(50_000))
    assert refused.value.size_bytes > 50_000
    after = [await bus.post(topic, b"%d" % number) for number in range(3, 200)]
    positions = before + [await acknowledgement for acknowledgement in after]
    assert [position.offset for position in positions] == list(range(200))
    records = await read(await bus.reader([(topic, 0)], start="start"), 200)
    assert [record.value for record in records] == [b"%d" % number for number in range(200)]


async def test_a_consumer_that_is_stuck_is_replaced(bus: KafkaBus) -> None:
    topic = name()
    await bus.create_topics([TopicSpec(topic, 2)])
    reader = await bus.reader([(topic, 0), (topic, 1)], start="start")
    await bus.send(topic, b"first", partition=0)
    assert len(await read(reader, 1)) == 1
    # As stuck as after some broker restarts: connected, no error, and nothing is fetched any more.
    assert reader._consumer is not None
    reader._consumer.pause(KafkaPartition(topic, 1))
    await bus.send(topic, b"second", partition=1)
    await bus.send(topic, b"third", partition=0)
    records = await read(reader, 2)
    assert sorted(record.value or b"" for record in records) == [b"second", b"third"]
    assert reader.restarts == 1


async def test_a_member_that_is_stuck_lets_go_and_joins_again(bus: KafkaBus) -> None:
    topic = name()
    await bus.create_topics([TopicSpec(topic, 1)])
    told: list[str] = []

    async def assigned(partitions: object) -> None:
        told.append("assigned")

    async def revoked(partitions: object) -> None:
        told.append("revoked")

    member = await bus.join([topic], group=topic, on_assigned=assigned, on_revoked=revoked)
    await bus.send(topic, b"first")
    assert len(await read(member, 1)) == 1
    await member.commit({(topic, 0): 1})
    assert member._consumer is not None
    member._consumer.pause(KafkaPartition(topic, 0))
    await bus.send(topic, b"second")
    assert [record.value for record in await read(member, 1)] == [b"second"]
    assert told == ["assigned", "revoked", "assigned"]


async def test_a_reader_that_has_nothing_to_read_is_not_stuck(bus: KafkaBus) -> None:
    topic = name()
    await bus.create_topics([TopicSpec(topic, 1)])
    reader = await bus.reader([(topic, 0)], start="start")
    for _ in range(6):
        assert await reader.fetch(timeout_s=1.0) == []
    assert reader.restarts == 0


async def test_topics_may_live_on_several_sites(kafka: Broker) -> None:
    """The same broker under two names stands for two sites: the routes must be followed everywhere."""
    port = kafka.bootstrap.rpartition(":")[2]
    far, here = name(), name()
    connection = KafkaConnection(bootstrap_servers=kafka.bootstrap, routes={far: f"localhost:{port}"})
    async with KafkaBus(connection) as bus:
        await bus.create_topics([TopicSpec(far, 1), TopicSpec(here, 1)])
        for topic in (far, here):
            await bus.send(topic, topic.encode())
            assert await bus.end_offsets(topic) == {0: 1}
            reader = await bus.reader([(topic, 0)], start="start")
            assert [record.value for record in await read(reader, 1)] == [topic.encode()]
        assert sorted(bus._sites) == sorted([kafka.bootstrap, f"localhost:{port}"])
        with pytest.raises(ConfigError, match="several sites"):
            await bus.reader([(far, 0), (here, 0)], start="start")
        with pytest.raises(ConfigError, match="several sites"):
            await bus.join([far, here], group="g")


async def test_a_topic_may_stand_at_every_site_that_has_its_neighbour(kafka: Broker) -> None:
    """The same broker under two names stands for two sites; what is sent beside a neighbour goes by that one's site."""
    port = kafka.bootstrap.rpartition(":")[2]
    results, near, far, farther = name(), name(), name(), name()
    routes = dict.fromkeys((far, farther), f"localhost:{port}")
    async with KafkaBus(KafkaConnection(bootstrap_servers=kafka.bootstrap, routes=routes)) as bus:
        assert bus.beside(results, near) is bus
        site = bus.beside(results, far)
        assert site is not bus
        assert site is bus.beside(results, farther)
        assert site.beside(results, far) is site
        await bus.create_topics([TopicSpec(results, 1, beside=(near, far))])
        assert sorted(bus._sites) == sorted([kafka.bootstrap, f"localhost:{port}"])
        reader = await site.reader([(results, 0)], start="start")
        await site.send(results, b"back")
        assert [record.value for record in await read(reader, 1)] == [b"back"]
        assert list(site._sites) == [f"localhost:{port}"]
    with pytest.raises(BusError, match="closed"):
        await reader.fetch()


async def test_a_site_beside_that_is_not_there_says_so_and_the_rest_goes_on(kafka: Broker) -> None:
    far, here = name(), name()
    async with KafkaBus(KafkaConnection(bootstrap_servers=kafka.bootstrap, routes={far: "127.0.0.1:1"})) as bus:
        with pytest.raises(BusUnavailableError, match=r"127\.0\.0\.1:1"):
            await bus.beside(here, far).send(here, b"x")
        await bus.create_topics([TopicSpec(here, 1)])
        await bus.send(here, b"x")


async def test_a_site_that_is_not_there_says_so_when_it_is_used(kafka: Broker) -> None:
    connection = KafkaConnection(bootstrap_servers=kafka.bootstrap, routes={"faults.far": "127.0.0.1:1"})
    async with KafkaBus(connection) as bus:
        with pytest.raises(BusUnavailableError, match=r"127\.0\.0\.1:1"):
            await bus.send("faults.far", b"x")


async def test_a_foreign_key_that_is_no_text_does_not_stop_a_reader(kafka: Broker, bus: KafkaBus) -> None:
    topic = name()
    await bus.create_topics([TopicSpec(topic, 1)])
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap)
    await producer.start()
    await producer.send_and_wait(topic, b"\xff\xfe", key=b"\xff\xfe")
    await producer.stop()
    await bus.send(topic, b"good", key="k")
    records = await read(await bus.reader([(topic, 0)], start="start"), 2)
    assert [record.value for record in records] == [b"\xff\xfe", b"good"]
    assert records[0].key == "��"


def test_it_runs_on_uvloop_and_leaves_nothing_behind(kafka: Broker) -> None:
    topic = name()

    async def main() -> int:
        async with KafkaBus(KafkaConnection(bootstrap_servers=kafka.bootstrap)) as bus:
            await bus.create_topics([TopicSpec(topic, 1)])
            member = await bus.join([topic], group=topic)
            reader = await bus.reader([(topic, 0)], start="end")
            waiting = asyncio.create_task(reader.fetch(timeout_s=60.0))
            await asyncio.gather(*[await bus.post(topic, b"x") for _ in range(500)])
            assert len(await read(member, 500)) == 500
            assert await waiting
            waiting = asyncio.create_task(reader.fetch(timeout_s=60.0))
            await asyncio.sleep(0)
        await asyncio.wait([waiting])
        others = asyncio.all_tasks() - {asyncio.current_task()}
        return len(others)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == 0


async def test_the_librarys_log_shows_no_payloads(bus: KafkaBus, caplog: pytest.LogCaptureFixture) -> None:
    assert logging.getLogger("aiokafka").getEffectiveLevel() >= logging.INFO
    with caplog.at_level(logging.DEBUG):
        topic = name()
        await bus.create_topics([TopicSpec(topic, 1)])
        await bus.send(topic, b"very-secret-payload")
    assert "very-secret-payload" not in caplog.text


async def test_closing_twice_and_using_what_is_closed(bus: KafkaBus) -> None:
    topic = name()
    await bus.create_topics([TopicSpec(topic, 1)])
    member = await bus.join([topic], group=topic)
    await member.close()
    await member.close()
    await member.commit({(topic, 0): 1})
    with pytest.raises(BusError, match="closed"):
        await member.fetch()
    with pytest.raises(BusError):
        await member.seek((topic, 0), 0)


async def test_a_record_from_a_machine_whose_clock_is_behind_is_as_young_as_it_is(kafka: Broker, bus: KafkaBus) -> None:
    """Kafka deletes by the record's time, within minutes where that is older than the topic's retention."""
    topic = activations_topic("clock-behind")
    await bus.create_topics([TopicSpec(topic, 1, retention_s=3600)])
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap)
    await producer.start()
    await producer.send_and_wait(topic, b"x", partition=0, timestamp_ms=1_000)
    await producer.stop()
    (record,) = await read(await bus.reader([(topic, 0)], start="start"), 1)
    assert record.timestamp_ms > 1_700_000_000_000

"""Kafka only: the broker goes away."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from bus.errors import BusUnavailableError
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.port import Record
from bus.topics import TopicSpec
from tests.kafka_broker import OwnBroker


async def test_a_broker_killed_in_the_middle_of_a_stream_loses_nothing_acknowledged(kafka_own: OwnBroker) -> None:
    """G6: 2,000 records, SIGKILL after 700 of them, the same data started again; no operator touches the bus."""
    topic = "contract.restart"
    connection = KafkaConnection(bootstrap_servers=kafka_own.bootstrap, delivery_timeout_s=120.0)
    acknowledged: dict[int, int] = {}  # offset -> number
    received: list[Record] = []
    in_group: set[int] = set()

    async with KafkaBus(connection) as bus, KafkaBus(connection) as other:
        await bus.create_topics([TopicSpec(topic, 1)])

        async def produce() -> None:
            waiting = []
            for number in range(2000):
                waiting.append((number, await bus.post(topic, b"%d" % number, partition=0)))
                await asyncio.sleep(0.0005)
            for number, acknowledgement in waiting:
                acknowledged[(await acknowledgement).offset] = number

        async def consume() -> None:
            reader = await other.reader([(topic, 0)], start="start")
            while len(received) < 2000:
                received.extend(await reader.fetch(timeout_s=0.5))

        async def consume_in_group() -> None:
            member = await other.join([topic], group="contract-restart")
            while len(in_group) < 2000:
                for record in await member.fetch(timeout_s=0.5):
                    in_group.add(record.offset)
                    with suppress(BusUnavailableError):
                        await member.commit({(topic, 0): record.offset + 1})

        async def break_it() -> float:
            while len(received) < 700:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(kafka_own.kill)
            await asyncio.to_thread(kafka_own.start)
            return asyncio.get_running_loop().time()

        async with asyncio.timeout(150), asyncio.TaskGroup() as group:
            broken = group.create_task(break_it())
            group.create_task(produce())
            reading = group.create_task(consume())
            group.create_task(consume_in_group())
            await reading
            flowing_s = asyncio.get_running_loop().time()
        assert flowing_s > broken.result() - 1  # the stream was still going when the broker came back

    assert len(acknowledged) == 2000
    assert [record.offset for record in received] == list(range(2000))
    assert [int(record.value or b"-1") for record in received] == list(range(2000))
    assert acknowledged == {record.offset: int(record.value or b"-1") for record in received}
    assert in_group == set(range(2000))

"""LeNet benchmark: maximum throughput of device, edge and cloud, compared with bare aiokafka moving the same bytes.

All three stages run in this process with real computation and no rate limit. The *bare* baseline only relays the same
bytes over three topics; each hop has its own aiokafka consumer and producer with the same settings. It runs once with
one record per sample, and once with as many records as the stages sent (framed). Times run from the first record to
the last result.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as KafkaPartition

from bus import topics
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.kafka.readers import FETCH_BYTES
from bus.kafka.sender import BATCH_BYTES
from bus.messages import DatasetInput
from bus.port import Bus
from bus.topics import TopicSpec
from bus.values import Execution, ModelProfile, Role
from loadgen.bench.bus import delete_topics
from loadgen.bench.fixed_placement import TIMEOUT_S, Staged
from stages.litert_runner import LitertRunner, RunnerOptions
from stages.zoo.registry import load_model

CUTS = (2, 4)
"""After the first and the second pooling layer, where LeNet's activations are small."""

RATE_BPS = 1 << 36
"""A rate high enough that no link limits the stages."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """The traffic on one topic: `records` of `record_bytes` each."""

    records: int
    record_bytes: int


async def measure(
    name: str,
    make_bus: Callable[[str], Bus],
    connection: KafkaConnection | None,
    samples: int,
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Samples per second as medians over the rounds, ours and bare in turn; an extra first round is dropped.

    Without a `connection` (on `MemoryBus`) there is no bare baseline, and both `bare_` values are None.
    """
    runner = await asyncio.to_thread(LitertRunner, [load_model("lenet")], RunnerOptions())
    profile = runner.profiles()[0]
    ours: list[float] = []
    framed: list[float] = []
    messages: list[float] = []
    hops: list[Crossing] = []
    try:
        async with AsyncExitStack() as stack:
            stages = await stack.enter_async_context(
                Staged(make_bus, dict.fromkeys(Role, runner), profile, cuts=CUTS, rates_bps=(RATE_BPS, RATE_BPS))
            )
            bus = await stack.enter_async_context(make_bus("looker"))
            for number in range(rounds + 1):
                progress(f"LeNet, {samples:,} digits, round {number} of {rounds}" + ("" if number else " (dropped)"))
                before = await _records(bus, stages.edge)
                took_s = await stages.play(samples, Execution.STREAMING, DatasetInput(name="digits"))
                after = await _records(bus, stages.edge)
                hops = _hops(profile, samples, [b - a for a, b in zip(before, after, strict=True)])
                ours.append(samples / took_s)
                if connection is not None:
                    framed.append(samples / await _relay(connection, hops))
                    messages.append(samples / await _relay(connection, _hops(profile, samples, [samples] * len(hops))))
    finally:
        await runner.close()
    return {
        "bus": name,
        "case": f"LeNet, {samples:,} digits",
        "samples_per_s": median(ours[1:]),
        "bare_samples_per_s": median(messages[1:]) if messages else None,
        "bare_framed_samples_per_s": median(framed[1:]) if framed else None,
        "samples_a_record": [round(samples / hop.records, 1) for hop in hops],
    }


async def _records(bus: Bus, edge: str) -> list[int]:
    """Number of records on each of the three topics."""
    names = (topics.activations_topic(edge), topics.ACTIVATIONS_CLOUD, topics.RESULTS)
    return [sum((await bus.end_offsets(name)).values()) for name in names]


def _hops(profile: ModelProfile, samples: int, records: list[int]) -> list[Crossing]:
    sample_bytes = (profile.cut_bytes[CUTS[0]], profile.cut_bytes[CUTS[1]], profile.cut_bytes[-1])
    return [Crossing(count, samples * size // count) for count, size in zip(records, sample_bytes, strict=True)]


async def _relay(connection: KafkaConnection, hops: list[Crossing]) -> float:
    """Seconds from the first record on the first topic to the last record on the last, relayed by bare clients."""
    run = uuid.uuid4().hex[:12]  # a new name each time: the broker may still be deleting the previous topics
    names = [f"deepar.bench.relay.{run}.{number}" for number in range(len(hops))]
    async with KafkaBus(connection) as bus:
        await bus.create_topics([TopicSpec(name, 1, retention_bytes=1 << 30) for name in names])
    settings = connection.client_settings(connection.bootstrap_servers)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(delete_topics, connection, names)  # runs last
        producers, consumers = [], []
        for name in names:
            producer = AIOKafkaProducer(
                **settings, acks="all", enable_idempotence=True, linger_ms=0, max_batch_size=BATCH_BYTES,
                max_request_size=connection.max_record_bytes,
            )  # fmt: skip
            consumer = AIOKafkaConsumer(**settings, enable_auto_commit=False, max_partition_fetch_bytes=FETCH_BYTES)
            for client in (producer, consumer):
                await client.start()
                stack.push_async_callback(client.stop)
            consumer.assign([KafkaPartition(name, 0)])
            await consumer.seek_to_end(KafkaPartition(name, 0))
            producers.append(producer)
            consumers.append(consumer)

        async def send(number: int, count: int) -> list[Any]:
            value = bytes(hops[number].record_bytes)
            return [await producers[number].send(names[number], value, partition=0) for _ in range(count)]

        async def forward(number: int) -> None:
            """Consume hop `number` and keep the share of sent records of the next hop equal to the share received."""
            seen = sent = 0
            acknowledgements: list[Any] = []
            while seen < hops[number].records:
                for batch in (await consumers[number].getmany(timeout_ms=1000, max_records=500)).values():
                    seen += len(batch)
                if number + 1 < len(hops):
                    due = hops[number + 1].records * min(seen, hops[number].records) // hops[number].records
                    acknowledgements += await send(number + 1, due - sent)
                    sent = due
            await asyncio.gather(*acknowledgements)

        begun = perf_counter()
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            for number in range(len(hops)):
                group.create_task(forward(number))
            acknowledgements = await send(0, hops[0].records)
        took_s = perf_counter() - begun
        await asyncio.gather(*acknowledgements)
        return took_s

"""Bus benchmark (`deepar loadgen bench bus`): overhead of the bus port and the frames over the bare client library.

A *hop* lasts from handing a tensor to the sender until the receiver holds it as an array: framing, sending, fetching,
decoding, reassembly. The *bare* hop moves the same bytes as one record through aiokafka with the same settings
(`linger_ms` 0, `acks` all, idempotent, large batches) until the consumer returns them. Both alternate in shuffled
order, so other load affects them equally; the first round is dropped. On `MemoryBus` the bare hop is an
`asyncio.Queue` that receives a copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from statistics import median
from time import perf_counter  # uvloop's clock counts whole milliseconds
from typing import Any, Literal, Protocol

import numpy as np
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError

from bus.frames import Frame, decode_frame, encode_frame
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.kafka.readers import FETCH_BYTES
from bus.kafka.sender import BATCH_BYTES
from bus.memory.bus import MemoryBus
from bus.port import Bus, Reader
from bus.tensors import Array, Assembler, to_pieces
from bus.topics import TopicSpec
from loadgen.bench.cpu_load import BusynessWatch

Progress = Callable[[str], None]

ROUNDS = 3
HOPS = {1_000: 300, 100_000: 200, 1_000_000: 60, 10_000_000: 16}
"""Record size in bytes -> hops per round, for each of the two ways."""

HOP_AIMS = {1_000: 1.12, 100_000: 1.12, 1_000_000: 1.12, 10_000_000: 0.95}
STREAM_AIM = 0.87
STREAM_SAMPLE_BYTES = 1_000
STREAM_SAMPLES = 20_000
STREAM_FRAME_SAMPLES = 128
"""Samples of 1 kB per frame in the stream."""

CHUNK_BYTES = 512 * 1024
"""Chunk size of a large tensor. A tensor of 1 MB fits one frame and is sent whole."""

WHOLE_BYTES = 1_000_000
WARM_UP_RECORDS = 3_000
"""Records before the first measurement; the broker's just-in-time compiler needs thousands to reach a steady speed."""

_LARGEST_RECORD_BYTES = 16 << 20
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class BusBenchSizes:
    """Amount of work to measure; tests use smaller values."""

    rounds: int = ROUNDS
    hops: tuple[tuple[int, int], ...] = tuple(HOPS.items())  # (size, hops per round)
    stream_samples: int = STREAM_SAMPLES
    warm_up_records: int = WARM_UP_RECORDS


class Way(Protocol):
    """A way to send bytes from this process to itself."""

    async def hop(self, payload: Array) -> None:
        """Send one tensor and return when it has arrived."""

    async def stream(self, payload: Array, count: int) -> None:
        """Send `count` tensors without waiting in between, and return when all have arrived."""


def run(
    bus: Literal["memory", "kafka"] = "kafka",
    bootstrap: str | None = None,
    *,
    connection: KafkaConnection | None = None,
    sizes: BusBenchSizes | None = None,
    seed: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure on uvloop and return the object that docs/json.md describes, with `busyness` added.

    `bootstrap` or `connection` selects the broker; without either, the environment does. The benchmark creates topics of
    its own and deletes them. Raises `BusError` if no broker answers.
    """
    if connection is None and bus == "kafka":
        connection = KafkaConnection.from_env(bootstrap_servers=bootstrap)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(bus, connection, sizes or BusBenchSizes(), seed, progress or (lambda line: None)))


async def measure(
    bus: str, connection: KafkaConnection | None, sizes: BusBenchSizes, seed: int, progress: Progress
) -> dict[str, Any]:
    """`run` on the current event loop."""
    generator = random.Random(seed)
    async with AsyncExitStack() as stack:
        name = f"deepar.bench.{os.getpid()}.{seed}"
        stack.push_async_callback(delete_topics, connection, [f"{name}.bare", f"{name}.framed"])  # runs last
        ours: Way
        bare: Way
        if connection is not None:
            bare = await stack.enter_async_context(_BareKafka(connection, f"{name}.bare"))
            ours = await stack.enter_async_context(_Framed(KafkaBus(connection), f"{name}.framed"))
        else:
            bare = _Queue()
            ours = await stack.enter_async_context(_Framed(MemoryBus(), f"{name}.framed"))
        progress("warming up")
        small = _payload(STREAM_SAMPLE_BYTES)
        for way in (bare, ours):
            await way.stream(small, sizes.warm_up_records)
        hops_watch, streams_watch = BusynessWatch(), BusynessWatch()
        times = await _hops(ours, bare, sizes, generator, hops_watch, progress)
        rates = await _streams(ours, bare, sizes, generator, streams_watch, progress)
    return _report(bus, times, rates, hops_watch, streams_watch)


# --- measuring
# -------------------------------------------------------------------------------------------------------


async def _hops(
    ours: Way, bare: Way, sizes: BusBenchSizes, generator: random.Random, watch: BusynessWatch, progress: Progress
) -> dict[int, tuple[list[float], list[float]]]:
    """Seconds of each hop by size: ours, then bare."""
    times: dict[int, tuple[list[float], list[float]]] = {size: ([], []) for size, _ in sizes.hops}
    for number in range(sizes.rounds + 1):
        progress(f"hops, round {number} of {sizes.rounds}" + ("" if number else " (dropped)"))
        order = list(sizes.hops)
        generator.shuffle(order)
        for size, count in order:
            payload = _payload(size)
            turns = [0, 1] * count
            generator.shuffle(turns)
            async with watch:
                for turn in turns:
                    way = bare if turn else ours
                    begun = perf_counter()
                    await way.hop(payload)
                    if number:
                        times[size][turn].append(perf_counter() - begun)
    return times


async def _streams(
    ours: Way, bare: Way, sizes: BusBenchSizes, generator: random.Random, watch: BusynessWatch, progress: Progress
) -> tuple[list[float], list[float]]:
    """Samples per second of each round: ours, then bare."""
    rates: tuple[list[float], list[float]] = ([], [])
    payload = _payload(STREAM_SAMPLE_BYTES)
    for number in range(sizes.rounds + 1):
        progress(f"streams, round {number} of {sizes.rounds}" + ("" if number else " (dropped)"))
        turns = [0, 1]
        generator.shuffle(turns)
        for turn in turns:
            async with watch:
                begun = perf_counter()
                await (bare if turn else ours).stream(payload, sizes.stream_samples)
                if number:
                    rates[turn].append(sizes.stream_samples / (perf_counter() - begun))
    return rates


def _payload(size_bytes: int) -> Array:
    return np.random.default_rng(size_bytes).random(size_bytes // 4, dtype=np.float32)


# --- our way
# ---------------------------------------------------------------------------------------------------------


class _Framed:
    """Sends tensors in frames over a bus."""

    def __init__(self, bus: Bus, topic: str) -> None:
        self._bus = bus
        self._topic = topic
        self._reader: Reader | None = None

    async def __aenter__(self) -> _Framed:
        await self._bus.__aenter__()
        await self._bus.create_topics([TopicSpec(self._topic, 1, retention_bytes=1 << 30)])
        self._reader = await self._bus.reader([(self._topic, 0)], start="end")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._bus.__aexit__(*exc)

    async def hop(self, payload: Array) -> None:
        receiving = asyncio.ensure_future(self._receive(1))
        sent = await self._send(0, payload)
        await receiving
        for acknowledged in sent:
            await acknowledged

    async def stream(self, payload: Array, count: int) -> None:
        receiving = asyncio.ensure_future(self._receive(count))
        sent: list[Awaitable[Any]] = []
        for begin in range(0, count, STREAM_FRAME_SAMPLES):
            pieces = [
                piece
                for sample in range(begin, min(begin + STREAM_FRAME_SAMPLES, count))
                for piece in to_pieces(sample, [payload], CHUNK_BYTES)
            ]
            frame = Frame("activations", "bench", 1, "device", tuple(pieces))
            sent.append(await self._bus.post(self._topic, encode_frame(frame), partition=0))
        await receiving
        await asyncio.gather(*sent)

    async def _send(self, sample: int, payload: Array) -> list[Awaitable[Any]]:
        chunk_bytes = WHOLE_BYTES if payload.nbytes <= WHOLE_BYTES else CHUNK_BYTES
        return [
            await self._bus.post(
                self._topic, encode_frame(Frame("activations", "bench", 1, "device", (piece,))), partition=0
            )
            for piece in to_pieces(sample, [payload], chunk_bytes)
        ]

    async def _receive(self, count: int) -> None:
        assert self._reader is not None
        assembler = Assembler()
        async with asyncio.timeout(_TIMEOUT_S):
            while count:
                for record in await self._reader.fetch():
                    for piece in decode_frame(record.value).pieces:
                        count -= assembler.add(piece) is not None


# --- the bare ways
# ---------------------------------------------------------------------------------------------------


class _BareKafka:
    """Sends the same bytes through aiokafka alone, one record per tensor."""

    def __init__(self, connection: KafkaConnection, topic: str) -> None:
        self._connection = connection
        self._topic = topic

    async def __aenter__(self) -> _BareKafka:
        await self._connection.check()
        settings = self._connection.client_settings(self._connection.bootstrap_servers)
        admin = AIOKafkaAdminClient(**settings)
        await admin.start()
        configs = {"max.message.bytes": str(_LARGEST_RECORD_BYTES), "retention.bytes": str(1 << 30)}
        await admin.create_topics([NewTopic(self._topic, 1, 1, topic_configs=configs)])
        await admin.close()
        self._producer = AIOKafkaProducer(
            **settings,
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            max_batch_size=BATCH_BYTES,
            max_request_size=_LARGEST_RECORD_BYTES,
        )
        self._consumer = AIOKafkaConsumer(**settings, enable_auto_commit=False, max_partition_fetch_bytes=FETCH_BYTES)
        await self._producer.start()
        await self._consumer.start()
        partition = KafkaPartition(self._topic, 0)
        self._consumer.assign([partition])
        await self._consumer.seek_to_end(partition)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._producer.stop()
        await self._consumer.stop()

    async def hop(self, payload: Array) -> None:
        receiving = asyncio.ensure_future(self._receive(1))
        sent = await self._producer.send(self._topic, payload.tobytes(), partition=0)
        await receiving
        await sent

    async def stream(self, payload: Array, count: int) -> None:
        receiving = asyncio.ensure_future(self._receive(count))
        value = payload.tobytes()
        sent = [await self._producer.send(self._topic, value, partition=0) for _ in range(count)]
        await receiving
        await asyncio.gather(*sent)

    async def _receive(self, count: int) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            while count:
                for batch in (await self._consumer.getmany(timeout_ms=1000, max_records=500)).values():
                    count -= len(batch)


class _Queue:
    """Sends the same bytes through an `asyncio.Queue`, the lowest cost of passing data inside one process."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1024)

    async def hop(self, payload: Array) -> None:
        receiving = asyncio.ensure_future(self._receive(1))
        await self._queue.put(payload.tobytes())
        await receiving

    async def stream(self, payload: Array, count: int) -> None:
        receiving = asyncio.ensure_future(self._receive(count))
        for _ in range(count):
            await self._queue.put(payload.tobytes())
        await receiving

    async def _receive(self, count: int) -> None:
        for _ in range(count):
            await self._queue.get()


async def delete_topics(connection: KafkaConnection | None, topics: list[str]) -> None:
    """Delete topics of a benchmark. Does nothing without a connection, or if the broker no longer answers."""
    if connection is None:
        return
    with contextlib.suppress(KafkaConnectionError):
        admin = AIOKafkaAdminClient(**connection.client_settings(connection.bootstrap_servers))
        await admin.start()
        await admin.delete_topics(topics)
        await admin.close()


# --- reporting
# -------------------------------------------------------------------------------------------------------


def _report(
    bus: str,
    times: dict[int, tuple[list[float], list[float]]],
    rates: tuple[list[float], list[float]],
    hops_watch: BusynessWatch,
    streams_watch: BusynessWatch,
) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    aims: list[dict[str, Any]] = []
    for size, (ours, bare) in times.items():
        results.append(
            {
                "bus": bus,
                "size_bytes": size,
                "p50_s": _percentile(ours, 50),
                "p99_s": _percentile(ours, 99),
                "bare_p50_s": _percentile(bare, 50),
                "bare_p99_s": _percentile(bare, 99),
                "hops": len(ours),
            }
        )
        if bus == "kafka" and size in HOP_AIMS:
            value = _percentile(ours, 50) / _percentile(bare, 50)
            aims.append(_aim(f"hop p50 at {size:,} bytes over bare", value, HOP_AIMS[size], value <= HOP_AIMS[size]))
    rate, bare_rate = median(rates[0]), median(rates[1])
    results.append(
        {
            "bus": bus,
            "size_bytes": STREAM_SAMPLE_BYTES,
            "samples_per_s": rate,
            "bare_messages_per_s": bare_rate,
            "samples_a_frame": STREAM_FRAME_SAMPLES,
        }
    )
    if bus == "kafka":
        value = rate / bare_rate
        aims.append(_aim("framed samples over bare messages, 1 kB", value, STREAM_AIM, value >= STREAM_AIM))
    seen = hops_watch.seen()
    return {
        "bench": "bus",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, uvloop",
        "results": results,
        "aims": aims,
        "busyness": {"hops": seen.as_json(), "streams": streams_watch.seen().as_json()},
        "judgeable": not seen.too_busy,
        "note": "the machine was too busy to judge the hops" if seen.too_busy else "",
    }


def _aim(name: str, value: float, aim: float, passed: bool) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "aim": aim, "pass": passed}


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]

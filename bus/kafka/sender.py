"""Posting to one Kafka cluster: in order, idempotent, and with a new producer after every failure.

aiokafka retries an idempotent batch for ever, which carries records through a broker restart. When a batch fails all
the same, the producer's sequence numbers no longer match the broker's: it must be replaced. The new one begins only
when the old one has settled or was cut off, so records that one task posts to one partition stay in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import IllegalStateError, KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, ProducerClosed
from aiokafka.structs import RecordMetadata

from bus.errors import BusError, BusUnavailableError, MessageTooLargeError
from bus.kafka.connection import KafkaConnection, hang_up
from bus.kafka.errors import translated
from bus.port import Headers, Position, TopicPartition

BATCH_BYTES = 1 << 20
"""Smaller batches would put every chunk of a large tensor in a batch of its own."""

_SETTLE_S = 3.0  # what a failed or closing producer gets to finish its other batches
_RETRY_S = 0.1  # between two tries to start a producer
_LOOK_S = 0.5  # how often the oldest unacknowledged record is looked at


LimitOf = Callable[[str], Awaitable[int | None]]


class KafkaSender:
    """The producer of one cluster, whichever it is at the moment."""

    def __init__(self, connection: KafkaConnection, servers: str, limit_of: LimitOf | None = None) -> None:
        """`limit_of` tells the largest record that a topic takes, in bytes, where that can be known."""
        self._connection = connection
        self._limit_of = limit_of
        self._telling: set[asyncio.Task[None]] = set()  # failures whose limit is being asked for
        self._servers = servers
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._lanes: dict[TopicPartition, asyncio.Lock] = {}  # FIFO: aiokafka's send() reorders concurrent callers
        self._waiting: deque[tuple[float, asyncio.Future[Position]]] = deque()  # deadline, acknowledgement
        self._watch: asyncio.TimerHandle | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._delivered = 0  # records acknowledged, late ones included
        self._closed = False
        self.replaced = 0  # producers that had to go

    def __repr__(self) -> str:
        return f"<KafkaSender to {self._servers}, {len(self._waiting)} unacknowledged, {self.replaced} replaced>"

    async def post(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Headers, size_bytes: int
    ) -> asyncio.Future[Position]:
        """Put a record in line; what is returned resolves with the acknowledgement. Raises `BusError`."""
        lane = self._lanes.get((topic, partition))
        if lane is None:
            lane = self._lanes[topic, partition] = asyncio.Lock()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._connection.delivery_timeout_s
        async with lane:
            while True:
                producer = self._producer or await self._begin(deadline)
                try:
                    sent = await producer.send(topic, value, key, partition, headers=list(headers))
                    break
                except MessageSizeTooLargeError as error:
                    raise self._told(error, topic, size_bytes) from error
                except (KafkaTimeoutError, ProducerClosed, IllegalStateError) as error:
                    # The buffer stayed full while the broker was away, or the producer was replaced under us: in both
                    # cases the record is in no batch yet.
                    if self._closed or loop.time() > deadline:
                        raise BusUnavailableError(f"the broker of {topic} takes no records: {error!r}") from error
                except AssertionError as error:  # aiokafka asserts that the partition is there
                    raise BusError(f"{topic} has no partition {partition} any more") from error
                except KafkaError as error:
                    self._retire(producer)
                    raise self._told(error, topic, size_bytes) from error
        acknowledged: asyncio.Future[Position] = loop.create_future()
        self._waiting.append((deadline, acknowledged))
        if self._watch is None:
            self._watch = loop.call_later(_LOOK_S, self._look)
        sent.add_done_callback(partial(self._settle, producer, acknowledged, topic, size_bytes))
        return acknowledged

    def partitions(self, topic: str) -> int | None:
        """How many partitions a topic has as far as the producer knows, which looks every five seconds; None: unknown."""
        if self._producer is None:
            return None
        there = self._producer.client.cluster._partitions.get(topic)
        return len(there) if there else None

    async def close(self) -> None:
        """Flush, and close in bounded time; what is not acknowledged by then has failed."""
        self._closed = True
        producer, self._producer = self._producer, None
        if self._retiring is not None:
            await asyncio.wait([self._retiring])
        if producer is not None:
            await _finish(producer)
        if self._reviving is not None:
            self._reviving.cancel()
        if self._telling:
            await asyncio.wait(self._telling)
        if self._watch is not None:
            self._watch.cancel()
        self._fail_waiting(BusError("the bus was closed before the record was acknowledged"))

    def _settle(
        self,
        producer: AIOKafkaProducer,
        acknowledged: asyncio.Future[Position],
        topic: str,
        size_bytes: int,
        sent: asyncio.Future[RecordMetadata],
    ) -> None:
        """A record's fate is known."""
        error = None if sent.cancelled() else sent.exception()
        if error is not None:
            self._retire(producer)
        elif not sent.cancelled():
            self._delivered += 1
        if acknowledged.done():
            return
        if isinstance(error, MessageSizeTooLargeError):
            telling = asyncio.get_running_loop().create_task(self._tell_limit(acknowledged, topic, size_bytes))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)
        elif error is not None:
            acknowledged.set_exception(self._told(error, topic, size_bytes))
        elif sent.cancelled():
            acknowledged.set_exception(BusUnavailableError(f"a record for {topic} was not acknowledged"))
        else:
            done = sent.result()
            acknowledged.set_result(Position(done.topic, done.partition, done.offset))

    async def _tell_limit(self, acknowledged: asyncio.Future[Position], topic: str, size_bytes: int) -> None:
        """The broker refused a record for its size; by which limit only the topic's settings tell."""
        limit_bytes = None
        if self._limit_of is not None:
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(_SETTLE_S):
                    limit_bytes = await self._limit_of(topic)
        if not acknowledged.done():
            acknowledged.set_exception(MessageTooLargeError(topic, size_bytes, limit_bytes))

    def _told(self, error: BaseException, topic: str, size_bytes: int) -> BusError:
        return translated(error, topic, size_bytes=size_bytes, limit_bytes=self._connection.max_record_bytes)

    async def _begin(self, deadline: float) -> AIOKafkaProducer:
        """A started producer, the old one gone. Raises `BusUnavailableError`."""
        async with self._starting:
            if self._producer is not None:
                return self._producer
            while True:
                if self._closed:
                    raise BusError("the bus is closed")
                if self._retiring is not None:
                    await asyncio.wait([self._retiring])
                producer = self._made()
                try:
                    async with asyncio.timeout(self._connection.delivery_timeout_s):  # start() hangs on some failures
                        await producer.start()
                except (KafkaError, TimeoutError) as error:
                    await _cut_off(producer)
                    if asyncio.get_running_loop().time() > deadline:
                        raise BusUnavailableError(
                            f"no broker at {self._servers}: {error!r}", remedy="`deepar broker` starts one"
                        ) from error
                    await asyncio.sleep(_RETRY_S)
                except BaseException:
                    await _cut_off(producer)
                    raise
                else:
                    self._producer = producer
                    return producer

    def _made(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(**self._settings())
        # aiokafka fails a whole batch whose partition has no leader (a broker that stops politely leaves it so) once the
        # batch's first record is older than a request's time. Here every record has a deadline of its own, see `_look`.
        # aiokafka has no setting for this.
        producer._message_accumulator._batch_ttl = math.inf
        return producer

    def _settings(self) -> dict[str, Any]:
        return self._connection.client_settings(self._servers) | {
            "acks": "all",
            "enable_idempotence": True,
            "linger_ms": 0,
            "max_batch_size": BATCH_BYTES,
            "max_request_size": self._connection.max_record_bytes,
        }

    def _retire(self, producer: AIOKafkaProducer) -> None:
        if producer is self._producer:
            self._producer = None
            self.replaced += 1
            self._retiring = asyncio.get_running_loop().create_task(_finish(producer))

    def _look(self) -> None:
        """Fail the records whose own time is over; aiokafka would wait for ever. Younger ones still have theirs."""
        loop, waiting = asyncio.get_running_loop(), self._waiting
        self._watch = None
        expired = False
        while waiting and (waiting[0][1].done() or waiting[0][0] <= loop.time()):
            _, acknowledged = waiting.popleft()
            if not acknowledged.done():
                expired = True
                acknowledged.set_exception(self._overdue())
        if waiting:
            self._watch = loop.call_later(_LOOK_S, self._look)
        producer = self._producer
        if not expired or producer is None:
            return
        if not waiting:  # there is nothing to lose
            self._drop(producer)
        elif self._reviving is None or self._reviving.done():
            self._reviving = loop.create_task(self._revive(producer))

    async def _revive(self, producer: AIOKafkaProducer) -> None:
        """Replace a producer that delivers nothing although its broker answers again."""
        try:
            await self._connection.check(self._servers)
        except BusError:
            return  # a new producer would deliver no more than this one
        delivered = self._delivered
        await asyncio.sleep(_SETTLE_S)
        if producer is self._producer and delivered == self._delivered:
            self._drop(producer)

    def _drop(self, producer: AIOKafkaProducer) -> None:
        """End the current producer with everything that it has not delivered."""
        self._fail_waiting(
            BusUnavailableError("the producer delivered nothing and was replaced; it may have been written")
        )
        self._producer = None
        self.replaced += 1
        self._retiring = asyncio.get_running_loop().create_task(_cut_off(producer))

    def _overdue(self) -> BusUnavailableError:
        return BusUnavailableError(
            f"no acknowledgement within {self._connection.delivery_timeout_s:g} s; it may have been written"
        )

    def _fail_waiting(self, error: BusError) -> None:
        waiting, self._waiting = self._waiting, deque()
        for _, acknowledged in waiting:
            if not acknowledged.done():
                acknowledged.set_exception(error)


async def _finish(producer: AIOKafkaProducer) -> None:
    """Let a producer deliver what it can still deliver, then end it, whatever state it is in."""
    stopping = asyncio.ensure_future(producer.stop())
    done, _ = await asyncio.wait([stopping], timeout=_SETTLE_S)
    if not done:
        stopping.cancel()
        await asyncio.wait([stopping])
    if not done or stopping.cancelled() or stopping.exception() is not None:
        await _cut_off(producer)


async def _cut_off(producer: AIOKafkaProducer) -> None:
    """End a producer at once. aiokafka has no call for this; its parts are ended one by one."""
    producer._closed = True  # it would warn that nobody closed it
    sending = producer._sender.sender_task
    if sending is not None and not sending.done():
        sending.cancel()
    await hang_up(producer.client)
    if sending is not None:
        await asyncio.wait([sending], timeout=1.0)
    accumulator = producer._message_accumulator
    # Batches that wait for another try have left this set, and their callbacks look for them there.
    accumulator._pending_batches.update(
        batch for batches in accumulator._batches.values() for batch in batches if batch.retry_count
    )
    accumulator.fail_all(ProducerClosed())
    for batch in (
        *accumulator._pending_batches,
        *(one for batches in accumulator._batches.values() for one in batches),
    ):
        if batch._drain_waiter.done() and not batch._drain_waiter.cancelled():
            batch._drain_waiter.exception()  # who waited for room is gone, and asyncio would complain

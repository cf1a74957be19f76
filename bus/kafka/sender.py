"""Sender of one Kafka cluster: posts records in order, without duplicates, and replaces a producer that failed.

aiokafka retries an idempotent batch without limit, so records survive a broker restart. If a batch fails nevertheless, the
producer's sequence numbers no longer match the broker's, and the sender replaces the producer. The new producer starts only
after the old one has finished or was cut off, so records that one task posts to one partition stay in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

from aiokafka import AIOKafkaProducer
from aiokafka.errors import IllegalStateError, KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, ProducerClosed
from aiokafka.structs import RecordMetadata

from bus.errors import BusError, BusUnavailableError, MessageTooLargeError
from bus.kafka.connection import KafkaConnection, hang_up
from bus.kafka.errors import translated
from bus.port import Headers, Position, TopicPartition

BATCH_BYTES = 1 << 20
"""Batch size limit. Smaller batches would hold only one chunk of a large tensor each."""

_SETTLE_S = 3.0  # time for a failed or closing producer to finish its other batches
_RETRY_S = 0.1  # pause between attempts to start a producer
_EXPIRY_CHECK_S = 0.5  # interval of the check for overdue records


LimitOf = Callable[[str], Awaitable[int | None]]
ProducerFactory = Callable[[KafkaConnection, str], AIOKafkaProducer]


def new_producer(connection: KafkaConnection, servers: str) -> AIOKafkaProducer:
    """A producer that is not started yet."""
    producer = AIOKafkaProducer(
        **connection.client_settings(servers),
        acks="all",
        enable_idempotence=True,
        linger_ms=0,
        max_batch_size=BATCH_BYTES,
        max_request_size=connection.max_record_bytes,
    )
    # While a partition has no leader (after a clean broker shutdown), aiokafka fails a whole batch once its first record is
    # older than the request timeout. `KafkaSender` gives every record its own deadline instead. aiokafka has no setting.
    producer._message_accumulator._batch_ttl = math.inf
    return producer


class KafkaSender:
    """Posts records to one cluster through its current producer."""

    def __init__(
        self,
        connection: KafkaConnection,
        servers: str,
        limit_of: LimitOf | None = None,
        producer_of: ProducerFactory = new_producer,
    ) -> None:
        """`limit_of` returns a topic's record size limit in bytes, None if unknown; `producer_of` makes producers."""
        self._connection = connection
        self._limit_of = limit_of
        self._producer_of = producer_of
        self._limit_requests: set[asyncio.Task[None]] = set()  # running requests for the size limit of a topic
        self._servers = servers
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._lanes: dict[TopicPartition, asyncio.Lock] = {}  # FIFO: aiokafka's send() reorders concurrent callers
        self._waiting: deque[tuple[float, asyncio.Future[Position]]] = deque()  # deadline, acknowledgement
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._delivered = 0  # records acknowledged, late ones included
        self._closed = False
        self.replaced = 0  # number of producers that were replaced

    def __repr__(self) -> str:
        return f"<KafkaSender to {self._servers}, {len(self._waiting)} unacknowledged, {self.replaced} replaced>"

    async def post(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Headers, size_bytes: int
    ) -> asyncio.Future[Position]:
        """Queue a record; the returned future resolves when the broker has acknowledged it. Raises `BusError`."""
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
                    raise self._translated(error, topic, size_bytes) from error
                except (KafkaTimeoutError, ProducerClosed, IllegalStateError) as error:
                    # The send buffer stayed full while the broker was unavailable, or another task replaced the
                    # producer. In both cases the record is not in a batch yet, so it can be sent again.
                    if self._closed or loop.time() > deadline:
                        raise BusUnavailableError(f"the broker of {topic} accepts no records: {error!r}") from error
                except AssertionError as error:  # aiokafka asserts that the partition is there
                    raise BusError(f"{topic} no longer has a partition {partition}") from error
                except KafkaError as error:
                    self._retire(producer)
                    raise self._translated(error, topic, size_bytes) from error
        acknowledged: asyncio.Future[Position] = loop.create_future()
        self._waiting.append((deadline, acknowledged))
        if self._expiry_timer is None:
            self._expiry_timer = loop.call_later(_EXPIRY_CHECK_S, self._expire)
        sent.add_done_callback(partial(self._settle, producer, acknowledged, topic, size_bytes))
        return acknowledged

    async def prepare_topic(self, topic: str) -> None:
        """Start the producer and fetch the topic's metadata. Raises `BusError`."""
        deadline = asyncio.get_running_loop().time() + self._connection.delivery_timeout_s
        producer = self._producer or await self._begin(deadline)
        try:
            await producer.partitions_for(topic)
        except KafkaError as error:
            raise translated(error, topic) from error

    def partitions(self, topic: str) -> int | None:
        """Partition count of a topic from the producer's metadata, refreshed every five seconds; None: unknown."""
        if self._producer is None:
            return None
        there = self._producer.client.cluster._partitions.get(topic)
        return len(there) if there else None

    async def close(self) -> None:
        """Flush and close within a bounded time; records that are still unacknowledged then fail."""
        self._closed = True
        producer, self._producer = self._producer, None
        if self._retiring is not None:
            await asyncio.wait([self._retiring])
        if producer is not None:
            await stop_producer(producer)
        if self._reviving is not None:
            self._reviving.cancel()
        if self._limit_requests:
            await asyncio.wait(self._limit_requests)
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        self._fail_waiting(BusError("the bus was closed before the record was acknowledged"))

    def _settle(
        self,
        producer: AIOKafkaProducer,
        acknowledged: asyncio.Future[Position],
        topic: str,
        size_bytes: int,
        sent: asyncio.Future[RecordMetadata],
    ) -> None:
        """Handle the outcome of a record that was handed to a producer."""
        error = None if sent.cancelled() else sent.exception()
        if error is not None:
            self._retire(producer)
        elif not sent.cancelled():
            self._delivered += 1
        if acknowledged.done():
            return
        if isinstance(error, MessageSizeTooLargeError):
            request = asyncio.get_running_loop().create_task(self._fail_with_limit(acknowledged, topic, size_bytes))
            self._limit_requests.add(request)
            request.add_done_callback(self._limit_requests.discard)
        elif error is not None:
            acknowledged.set_exception(self._translated(error, topic, size_bytes))
        elif sent.cancelled():
            acknowledged.set_exception(BusUnavailableError(f"a record for {topic} was not acknowledged"))
        else:
            done = sent.result()
            acknowledged.set_result(Position(done.topic, done.partition, done.offset))

    async def _fail_with_limit(self, acknowledged: asyncio.Future[Position], topic: str, size_bytes: int) -> None:
        """Fail a record that the broker rejected as too large, with the size limit from the topic's settings."""
        limit_bytes = None
        if self._limit_of is not None:
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(_SETTLE_S):
                    limit_bytes = await self._limit_of(topic)
        if not acknowledged.done():
            acknowledged.set_exception(MessageTooLargeError(topic, size_bytes, limit_bytes))

    def _translated(self, error: BaseException, topic: str, size_bytes: int) -> BusError:
        return translated(error, topic, size_bytes=size_bytes, limit_bytes=self._connection.max_record_bytes)

    async def _begin(self, deadline: float) -> AIOKafkaProducer:
        """Start a producer after the old one has ended, and return it. Raises `BusUnavailableError`."""
        async with self._starting:
            if self._producer is not None:
                return self._producer
            while True:
                if self._closed:
                    raise BusError("the bus is closed")
                if self._retiring is not None:
                    await asyncio.wait([self._retiring])
                producer = self._producer_of(self._connection, self._servers)
                try:
                    async with asyncio.timeout(self._connection.delivery_timeout_s):  # start() may hang
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

    def _retire(self, producer: AIOKafkaProducer) -> None:
        if producer is self._producer:
            self._producer = None
            self.replaced += 1
            self._retiring = asyncio.get_running_loop().create_task(stop_producer(producer))

    def _expire(self) -> None:
        """Fail the records whose deadline has passed (aiokafka would wait without limit); later records keep waiting."""
        loop, waiting = asyncio.get_running_loop(), self._waiting
        self._expiry_timer = None
        expired = False
        while waiting and (waiting[0][1].done() or waiting[0][0] <= loop.time()):
            _, acknowledged = waiting.popleft()
            if not acknowledged.done():
                expired = True
                acknowledged.set_exception(self._overdue())
        if waiting:
            self._expiry_timer = loop.call_later(_EXPIRY_CHECK_S, self._expire)
        producer = self._producer
        if not expired or producer is None:
            return
        if not waiting:  # no other record is lost with the producer
            self._drop(producer)
        elif self._reviving is None or self._reviving.done():
            self._reviving = loop.create_task(self._revive(producer))

    async def _revive(self, producer: AIOKafkaProducer) -> None:
        """Replace a producer that delivers nothing although its broker answers."""
        try:
            await self._connection.check(self._servers)
        except BusError:
            return  # a new producer could not deliver either
        delivered = self._delivered
        await asyncio.sleep(_SETTLE_S)
        if producer is self._producer and delivered == self._delivered:
            self._drop(producer)

    def _drop(self, producer: AIOKafkaProducer) -> None:
        """End the current producer at once and fail all records that it has not delivered."""
        self._fail_waiting(
            BusUnavailableError(
                "the record was not acknowledged before its producer was replaced; it may have been written"
            )
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


async def stop_producer(producer: AIOKafkaProducer) -> None:
    """Stop a producer after it has delivered its records; if that fails or exceeds the timeout, cut it off."""
    stopping = asyncio.ensure_future(producer.stop())
    done, _ = await asyncio.wait([stopping], timeout=_SETTLE_S)
    if not done:
        stopping.cancel()
        await asyncio.wait([stopping])
    if not done or stopping.cancelled() or stopping.exception() is not None:
        await _cut_off(producer)


async def _cut_off(producer: AIOKafkaProducer) -> None:
    """End a producer at once. aiokafka has no call for this, so its parts are ended one by one."""
    producer._closed = True  # prevents the warning about an unclosed producer
    sending = producer._sender.sender_task
    if sending is not None and not sending.done():
        sending.cancel()
    await hang_up(producer.client)
    if sending is not None:
        await asyncio.wait([sending], timeout=1.0)
    accumulator = producer._message_accumulator
    # Batches that wait for a retry are not in this set, but their callbacks remove them from it.
    accumulator._pending_batches.update(
        batch for batches in accumulator._batches.values() for batch in batches if batch.retry_count
    )
    accumulator.fail_all(ProducerClosed())
    for batch in (
        *accumulator._pending_batches,
        *(one for batches in accumulator._batches.values() for one in batches),
    ):
        if batch._drain_waiter.done() and not batch._drain_waiter.cancelled():
            batch._drain_waiter.exception()  # marks the error as retrieved: the waiting sender is gone

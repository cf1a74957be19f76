"""Every record has its own deadline, independent of the records before it. In virtual time, with a scripted producer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import MessageSizeTooLargeError, UnknownTopicOrPartitionError
from aiokafka.structs import RecordMetadata, TopicPartition

from bus.errors import BusUnavailableError, MessageTooLargeError, UnknownTopicError
from bus.kafka.connection import KafkaConnection
from bus.kafka.sender import KafkaSender, LimitOf, new_producer
from bus.port import Position
from loadgen.sim.virtual_loop import run_virtual

DELIVERY_S = 30.0
WHERE = TopicPartition("t", 0)


class ScriptedProducer:
    """Accepts records at once and acknowledges them when the test says so."""

    def __init__(self) -> None:
        self.unsent: list[asyncio.Future[RecordMetadata]] = []
        self.asked: list[str] = []  # topics whose metadata was fetched
        self.client = SimpleNamespace(close=self.start)
        self._sender = SimpleNamespace(sender_task=None)
        self._message_accumulator = SimpleNamespace(
            _batch_ttl=0.0, _pending_batches=set(), _batches={}, fail_all=self.fail
        )

    async def start(self) -> None:
        pass

    stop = start

    async def send(self, *record: object, headers: object) -> asyncio.Future[RecordMetadata]:
        sent: asyncio.Future[RecordMetadata] = asyncio.get_running_loop().create_future()
        self.unsent.append(sent)
        return sent

    async def partitions_for(self, topic: str) -> set[int]:
        if topic == "missing":
            raise UnknownTopicOrPartitionError
        self.asked.append(topic)
        return {0}

    def deliver(self) -> None:
        for offset, sent in enumerate(self.unsent):
            sent.set_result(RecordMetadata("t", 0, WHERE, offset, 0, 0, 0))
        self.unsent.clear()

    def fail(self, error: Exception) -> None:
        for sent in self.unsent:
            sent.set_exception(error)
        self.unsent.clear()


class Broker(KafkaConnection):
    """A connection whose broker answers the handshake or does not."""

    answers: bool

    async def check(self, servers: str | None = None) -> None:
        if not self.answers:
            raise BusUnavailableError("no broker")


def sender(made: list[ScriptedProducer], *, answers: bool = False, limit_of: LimitOf | None = None) -> KafkaSender:
    """A sender that adds the producers it makes to `made`."""

    def producer_of(connection: KafkaConnection, servers: str) -> Any:
        made.append(ScriptedProducer())
        return made[-1]

    broker = Broker(bootstrap_servers="b:1", delivery_timeout_s=DELIVERY_S, answers=answers)
    return KafkaSender(broker, "b:1", limit_of, producer_of)


async def post(one: KafkaSender) -> asyncio.Future[Position]:
    return await one.post("t", 0, None, b"x", (), 1)


def play(main: Any) -> None:
    run_virtual(main, horizon_s=1_000)


def test_an_overdue_record_does_not_take_younger_ones_with_it() -> None:
    made: list[ScriptedProducer] = []

    async def main() -> None:
        one = sender(made)
        posted = []
        for _ in range(6):
            posted.append(await post(one))
            await asyncio.sleep(8)
        # 48 s of outage: the first three are overdue, the others have waited for at most 24 s
        assert [record.done() for record in posted] == [True] * 3 + [False] * 3
        made[0].deliver()
        await asyncio.sleep(1)
        for record in posted[:3]:
            with pytest.raises(BusUnavailableError, match="within 30 s"):
                record.result()
        assert [record.result().offset for record in posted[3:]] == [3, 4, 5]
        assert len(made) == 1
        await one.close()

    play(main())


def test_a_producer_whose_records_are_all_overdue_is_replaced() -> None:
    """The records that it still holds are not written after their senders got an error."""
    made: list[ScriptedProducer] = []

    async def main() -> None:
        one = sender(made)
        first = await post(one)
        await asyncio.sleep(DELIVERY_S + 5)
        assert isinstance(first.exception(), BusUnavailableError)
        assert not made[0].unsent
        second = await post(one)
        made[1].deliver()
        assert (await second).offset == 0
        await one.close()

    play(main())


def test_a_prepared_topic_has_a_producer_with_its_metadata() -> None:
    made: list[ScriptedProducer] = []

    async def main() -> None:
        one = sender(made)
        await one.prepare_topic("t")
        assert [producer.asked for producer in made] == [["t"]]
        with pytest.raises(UnknownTopicError, match="missing"):
            await one.prepare_topic("missing")
        await post(one)
        assert len(made) == 1
        await one.close()

    play(main())


@pytest.mark.parametrize("delivers", [True, False])
def test_a_producer_that_is_stuck_while_its_broker_answers_is_replaced(delivers: bool) -> None:
    """A producer that has just reconnected to its broker is kept."""
    made: list[ScriptedProducer] = []

    async def main() -> None:
        one = sender(made, answers=True)
        posted = []
        for _ in range(5):
            posted.append(await post(one))
            await asyncio.sleep(6)
        await asyncio.sleep(2)  # the first is overdue by now, and the broker answers
        assert len(made) == 1
        if delivers:
            made[0].deliver()
        await asyncio.sleep(5)
        assert one.replaced == (not delivers)
        assert isinstance(posted[0].exception(), BusUnavailableError)
        if delivers:
            assert [record.result().offset for record in posted[1:]] == [1, 2, 3, 4]
        else:
            assert {type(record.exception()) for record in posted} == {BusUnavailableError}
        await one.close()

    play(main())


async def test_aiokafka_gives_no_batch_up_by_its_own_clock() -> None:
    """Records for a partition without a leader wait until their own deadline, as if the broker were unavailable."""
    producer = new_producer(KafkaConnection(bootstrap_servers="127.0.0.1:1"), "127.0.0.1:1")
    producer._closed = True  # it was never started; aiokafka would warn
    producer._txn_manager.set_pid_and_epoch(7, 0)  # as after its start
    records = producer._message_accumulator
    acknowledged: asyncio.Future[object] = await records.add_message(WHERE, b"key", b"value", 1.0)
    records._batches[WHERE][0]._ctime -= 3600.0
    _, leaderless = records.drain_by_nodes(ignore_nodes=[])
    assert leaderless
    assert not acknowledged.done()


@pytest.mark.parametrize(
    ("size_bytes", "limit_bytes", "said"),
    [
        (130_121, 100_000, "a record of 130,121 bytes is over the limit of 100,000 of topic t"),
        (10_121, 100_000, "a batch of records, one of 10,121 bytes, is over the limit of 100,000 of topic t"),
        (130_121, None, "a record of 130,121 bytes is over the limit (max.message.bytes) of topic t"),
    ],
)
def test_what_the_broker_refuses_is_told_with_the_limit_that_it_has(
    size_bytes: int, limit_bytes: int | None, said: str
) -> None:
    made: list[ScriptedProducer] = []

    async def limit_of(topic: str) -> int | None:
        if limit_bytes is None:
            raise BusUnavailableError("away")
        return limit_bytes

    async def main() -> str:
        one = sender(made, limit_of=limit_of)
        acknowledged = await one.post("t", 0, None, b"x", (), size_bytes)
        made[0].fail(MessageSizeTooLargeError())
        with pytest.raises(MessageTooLargeError) as refused:
            await acknowledged
        await one.close()
        return str(refused.value)

    assert run_virtual(main()) == said

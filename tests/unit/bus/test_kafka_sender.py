"""A record whose partition has no leader waits for one, as long as for a broker that is away."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import NotLeaderForPartitionError

from bus.kafka_connection import KafkaConnection
from bus.kafka_sender import KafkaSender

WHERE = TopicPartition("t", 0)


@pytest.mark.parametrize(("waited_s", "given_up"), [(6.0, False), (29.0, False), (31.0, True)])
async def test_a_partition_without_a_leader_is_waited_for(waited_s: float, given_up: bool) -> None:
    connection = KafkaConnection(bootstrap_servers="127.0.0.1:1", delivery_timeout_s=30.0)
    producer = KafkaSender(connection, "127.0.0.1:1")._made()
    producer._closed = True  # it was never started; aiokafka would warn
    producer._txn_manager.set_pid_and_epoch(7, 0)  # as after its start
    records = producer._message_accumulator
    acknowledged: asyncio.Future[object] = await records.add_message(WHERE, b"key", b"value", 1.0)
    records._batches[WHERE][0]._ctime -= waited_s
    _, leaderless = records.drain_by_nodes(ignore_nodes=[])
    assert leaderless
    assert acknowledged.done() is given_up
    if given_up:
        assert isinstance(acknowledged.exception(), NotLeaderForPartitionError)

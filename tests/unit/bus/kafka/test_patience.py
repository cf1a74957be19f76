"""Readers and members whose brokers answer late, in virtual time: one slow attempt is not the end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.errors import KafkaConnectionError, KafkaTimeoutError, NotCoordinatorForGroupError

from bus.errors import BusUnavailableError
from bus.kafka.connection import FAILOVER_S, REQUEST_S, KafkaConnection
from bus.kafka.members import COMMIT_S, KafkaMember
from bus.kafka.readers import end_offsets, started
from loadgen.sim.virtual_loop import run_virtual

PARTITION = KafkaPartition("t", 0)


class LateConsumer:
    """A consumer whose cluster answers a request only from `ready_s` on, or to one that waits for `answer_s`."""

    def __init__(self, *, brokers: int = 3, ready_s: float = 0.0, answer_s: float = 0.0) -> None:
        cluster = SimpleNamespace(brokers=lambda: range(brokers), _partitions={})
        self._client = SimpleNamespace(cluster=cluster, hosts=["a"], close=self._close)
        self._coordinator: Any = SimpleNamespace(request_rejoin=self._rejoin)
        self._fetcher = None
        self._ready_s, self._answer_s = ready_s, answer_s
        self.rejoins = self.tries = 0

    def pause(self, *partitions: KafkaPartition) -> None:
        pass

    async def position(self, partition: KafkaPartition) -> int:
        await asyncio.get_running_loop().create_future()
        raise AssertionError("unreachable")

    async def commit(self, offsets: Mapping[KafkaPartition, int]) -> None:
        self.tries += 1
        await asyncio.sleep(self._answer_s)
        if asyncio.get_running_loop().time() < self._ready_s:
            raise NotCoordinatorForGroupError

    async def end_offsets(self, partitions: list[KafkaPartition]) -> dict[KafkaPartition, int]:
        if asyncio.get_running_loop().time() < self._ready_s:  # no leader: aiokafka asks for its request timeout
            await asyncio.sleep(5.0)
            raise KafkaTimeoutError
        return dict.fromkeys(partitions, 7)

    async def _close(self) -> None:
        pass

    def _rejoin(self) -> None:
        self.rejoins += 1


def member_of(consumer: LateConsumer) -> KafkaMember:
    member = KafkaMember(KafkaConnection(), "a:9092", "g", ("t",), None, None)
    member._consumer = consumer
    member._held = frozenset([("t", 0)])
    return member


def test_end_offsets_wait_for_a_new_leader_beyond_one_attempt_of_the_library() -> None:
    async def main() -> None:
        assert await end_offsets(LateConsumer(ready_s=22.0), [("t", 0)], FAILOVER_S) == {("t", 0): 7}
        assert asyncio.get_running_loop().time() < 27.0
        with pytest.raises((KafkaTimeoutError, TimeoutError)):
            await end_offsets(LateConsumer(ready_s=1e9), [("t", 0)], FAILOVER_S)

    run_virtual(main())


@pytest.mark.parametrize("late", [LateConsumer(ready_s=7.0), LateConsumer(answer_s=5.0)])
def test_a_commit_waits_until_another_broker_coordinates_the_group(late: LateConsumer) -> None:
    async def main() -> None:
        await member_of(late).commit({("t", 0): 5})
        assert asyncio.get_running_loop().time() <= COMMIT_S

    run_virtual(main())


def test_a_commit_without_a_coordinator_fails_in_seconds() -> None:
    async def main() -> None:
        with pytest.raises(BusUnavailableError, match="within 9 s"):
            await member_of(LateConsumer(ready_s=1e9)).commit({("t", 0): 5})
        assert asyncio.get_running_loop().time() <= COMMIT_S + 1.0

    run_virtual(main())


def test_a_member_that_cannot_find_its_positions_asks_for_another_assignment() -> None:
    """A coordinator that has just taken over may keep a member that was silent for longer than its session."""

    async def main() -> None:
        consumer: Any = LateConsumer()
        await member_of(consumer).assigned(consumer, [PARTITION])
        assert consumer.rejoins == 1

    run_virtual(main())


@pytest.mark.parametrize(("attempt_s", "fails"), [(0.0, 5), (6.0, 2)])
def test_a_consumer_is_started_again_if_no_broker_answered(attempt_s: float, fails: int) -> None:
    """`fails` attempts of `attempt_s` each: refused at once, or too slow for the library."""
    tries: list[LateConsumer] = []

    def make() -> LateConsumer:
        tries.append(LateConsumer())
        tries[-1]._coordinator = None
        return tries[-1]

    async def begin(consumer: LateConsumer) -> None:
        await asyncio.sleep(attempt_s)
        if len(tries) <= fails:
            raise KafkaConnectionError

    async def never(consumer: LateConsumer) -> None:
        await asyncio.sleep(attempt_s)
        raise KafkaConnectionError

    async def main() -> None:
        assert await started(make, begin) is tries[fails]
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(KafkaConnectionError):
            await started(make, never)
        assert asyncio.get_running_loop().time() - began_s <= max(REQUEST_S + 1.0, 3 * attempt_s + 2.0)

    run_virtual(main())

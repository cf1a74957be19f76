"""Requests to a cluster whose brokers are slow, dead or disagree, in virtual time: each broker is a fake connection."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    InvalidPartitionsError,
    InvalidReplicationFactorError,
    KafkaConnectionError,
    KafkaError,
    NotControllerError,
)
from aiokafka.protocol.admin import CreateTopicsRequest
from aiokafka.protocol.metadata import MetadataRequest

from bus.errors import BusError, BusUnavailableError
from bus.kafka.brokers import TRY_S, Brokers
from bus.kafka.connection import FAILOVER_S, REQUEST_S, KafkaConnection, patience_s
from loadgen.sim.virtual_loop import run_virtual

FOREVER = math.inf


class FakeBroker:
    """A broker whose controller answers after `slow_s`, by time; it serves the requests of a connection in order."""

    def __init__(self, name: str, slow_s: float | Callable[[float], float] = 0.0) -> None:
        self.name = name
        self.slow_s = slow_s if callable(slow_s) else lambda now_s: slow_s
        self.refuses = False
        self.error: Exception | None = None  # raised instead of an answer
        self.listed: list[str] | None = None  # what it advertises; None: all
        self.received = 0  # requests for the controller
        self.open = 0  # connections


class FakeConnection:
    def __init__(self, broker: FakeBroker, cluster: FakeCluster) -> None:
        self._broker, self._cluster = broker, cluster
        self._turn = asyncio.Lock()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        broker.open += 1

    def connected(self) -> bool:
        return not self._closed.done()

    def close(self) -> asyncio.Future[None]:
        if not self._closed.done():
            self._broker.open -= 1
            self._closed.set_result(None)
        return self._closed

    async def send(self, request: object) -> object:
        async with self._turn:
            if isinstance(request, MetadataRequest):
                return self._cluster.metadata(self._broker)
            assert isinstance(request, CreateTopicsRequest)
            self._broker.received += 1
            wait_s = self._broker.slow_s(asyncio.get_running_loop().time())
            async with asyncio.timeout(TRY_S):  # as aiokafka's connection does
                await (asyncio.sleep(wait_s) if wait_s < FOREVER else asyncio.get_running_loop().create_future())
            if self._broker.error is not None:
                raise self._broker.error
            return self._broker.name


class FakeCluster:
    def __init__(self, *brokers: FakeBroker) -> None:
        self.brokers = {f"{broker.name}:9092": broker for broker in brokers}

    def metadata(self, asked: FakeBroker) -> object:
        names = [broker.name for broker in self.brokers.values()] if asked.listed is None else asked.listed
        return SimpleNamespace(brokers=[(number, name, 9092, None) for number, name in enumerate(names)])

    async def connect(self, address: str) -> Any:
        if self.brokers[address].refuses:
            raise ConnectionRefusedError(111, "refused")
        return FakeConnection(self.brokers[address], self)

    def client(self, servers: str = "a:9092") -> Brokers:
        return Brokers(KafkaConnection(bootstrap_servers=servers), servers, self.connect)


def create(admin: AIOKafkaAdminClient) -> Awaitable[str]:
    answer: Awaitable[str] = admin.create_topics([NewTopic("t", 1, 3)])
    return answer


async def timed(asking: Coroutine[Any, Any, str]) -> tuple[str, float]:
    """The answer, or the text of the error, and the time that it took."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    try:
        said = await asking
    except BusError as error:
        said = str(error)
    return said, loop.time() - began_s


@pytest.mark.parametrize("slow_s", [2.0, 6.4, 13.0, 19.0])
def test_an_answer_that_takes_long_at_every_broker_is_awaited_and_asked_of_each_once(slow_s: float) -> None:
    """As measured while a dead broker was replaced on a busy machine: each broker needs seconds for each request."""
    cluster = FakeCluster(*(FakeBroker(name, slow_s) for name in "abc"))

    async def main() -> None:
        brokers = cluster.client()
        assert await timed(brokers.ask(create, "its topics")) == ("a", slow_s)
        assert max(broker.received for broker in cluster.brokers.values()) == 1
        await brokers.close()
        assert [broker.open for broker in cluster.brokers.values()] == [0, 0, 0]

    run_virtual(main())


def test_a_broker_that_is_stuck_costs_no_more_than_the_time_until_another_is_asked() -> None:
    """A broker that still tries to reach the dead controller does not answer, another one does."""
    stuck, slow = FakeBroker("a", FOREVER), FakeBroker("b", 3.0)
    cluster = FakeCluster(stuck, slow)

    async def main() -> None:
        brokers = cluster.client()
        said, took_s = await timed(brokers.ask(create, "its topics"))
        assert said == "b"
        assert took_s < 5.0
        assert stuck.open == 0, "the next request on this connection would wait for the abandoned one"
        slow.slow_s = lambda now_s: 0.0
        assert await timed(brokers.ask(create, "its topics")) == ("b", 0.0)
        assert stuck.received == 1
        await brokers.close()

    run_virtual(main())


def test_a_cluster_that_answers_nothing_for_half_a_minute_is_waited_for() -> None:
    """An election that must be repeated, with requests before it that are never answered."""
    cluster = FakeCluster(*(FakeBroker(name, lambda now_s: FOREVER if now_s < 30.0 else 0.5) for name in "abc"))

    async def main() -> None:
        said, took_s = await timed(cluster.client().ask(create, "its topics"))
        assert f"{said}:9092" in cluster.brokers
        assert 30.0 < took_s < FAILOVER_S

    run_virtual(main())


def test_brokers_that_refuse_are_passed_over_at_once() -> None:
    dead, other, alive = FakeBroker("a"), FakeBroker("b"), FakeBroker("c")
    cluster = FakeCluster(dead, other, alive)

    async def main() -> None:
        brokers = cluster.client()
        await brokers.ask(create, "its topics")
        await brokers.close()
        brokers = cluster.client("a:9092,b:9092,c:9092")
        dead.refuses = other.refuses = True
        said, took_s = await timed(brokers.ask(create, "its topics"))
        assert said == "c"
        assert took_s < 1.0

    run_virtual(main())


def test_a_slow_broker_is_waited_for_although_the_others_refuse() -> None:
    dead, other, slow = FakeBroker("a"), FakeBroker("b"), FakeBroker("c", 15.0)
    dead.refuses = other.refuses = True
    cluster = FakeCluster(dead, other, slow)

    async def main() -> None:
        said, took_s = await timed(cluster.client("a:9092,b:9092,c:9092").ask(create, "its topics"))
        assert said == "c"
        assert took_s < 16.0
        assert slow.received == 1

    run_virtual(main())


def test_a_dead_cluster_is_reported_in_seconds_with_the_cause() -> None:
    cluster = FakeCluster(FakeBroker("a"), FakeBroker("b"))
    for broker in cluster.brokers.values():
        broker.refuses = True

    async def main() -> None:
        said, took_s = await timed(cluster.client("a:9092,b:9092").ask(create, "its topics"))
        assert "a:9092,b:9092 did not answer in time about its topics" in said
        assert "refused" in said
        assert took_s <= REQUEST_S + 1.0

    run_virtual(main())


def test_a_cluster_without_a_majority_is_reported_after_a_minute() -> None:
    cluster = FakeCluster(*(FakeBroker(name, FOREVER) for name in "abc"))

    async def main() -> None:
        brokers = cluster.client()
        with pytest.raises(BusUnavailableError, match="its topics"):
            await brokers.ask(create, "its topics")
        assert asyncio.get_running_loop().time() <= FAILOVER_S + 1.0
        assert [broker.open for broker in cluster.brokers.values()] == [0, 0, 0]

    run_virtual(main())


@pytest.mark.parametrize("error", [NotControllerError(), InvalidReplicationFactorError()])
def test_an_error_that_passes_is_retried_and_another_one_is_not(error: KafkaError) -> None:
    old, controller = FakeBroker("a"), FakeBroker("b")
    old.error = error
    cluster = FakeCluster(old, controller)

    async def main() -> None:
        brokers = cluster.client()
        assert (await timed(brokers.ask(create, "its topics")))[0] == "b"
        controller.error = InvalidPartitionsError()
        said, took_s = await timed(brokers.ask(create, "its topics"))
        assert "InvalidPartitions" in said
        assert took_s < 1.0
        controller.error = KafkaConnectionError()
        old.error = None
        assert (await timed(brokers.ask(create, "its topics")))[0] == "a"

    run_virtual(main())


def test_brokers_that_are_not_listed_for_a_while_are_still_asked() -> None:
    """On a busy machine a live broker misses its heartbeats, and the cluster lists one broker."""
    first, second = FakeBroker("a"), FakeBroker("b")
    cluster = FakeCluster(first, second)

    async def main() -> None:
        brokers = cluster.client()
        assert not brokers.are_several
        await brokers.ask(create, "its topics")
        first.listed = second.listed = ["a"]
        first.refuses, first.slow_s = True, lambda now_s: FOREVER
        said, took_s = await timed(brokers.ask(create, "its topics"))
        assert said == "b"
        assert took_s < REQUEST_S
        assert brokers.are_several

    run_virtual(main())


def test_one_broker_can_be_asked_alone() -> None:
    first, second = FakeBroker("a", 3.0), FakeBroker("b", 5.0)
    cluster = FakeCluster(first, second)

    async def main() -> None:
        brokers = cluster.client()
        assert await timed(brokers.ask(create, "its limits", at="b:9092")) == ("b", 5.0)
        second.refuses = True
        await brokers.close()
        said, took_s = await timed(cluster.client().ask(create, "its limits", at="b:9092"))
        assert "b:9092 did not answer in time about its limits" in said
        assert took_s <= REQUEST_S + 1.0
        assert first.received == 0

    run_virtual(main())


@pytest.mark.parametrize(
    ("listed", "hosts", "replicas", "several"),
    [(1, 1, 0, False), (1, 1, 1, False), (3, 1, 0, True), (1, 3, 1, True), (1, 1, 3, True)],
)
def test_patience_is_that_for_a_cluster_also_while_it_lists_one_broker(
    listed: int, hosts: int, replicas: int, several: bool
) -> None:
    partitions = {"t": {0: SimpleNamespace(replicas=list(range(replicas)))}} if replicas else {}
    cluster = SimpleNamespace(brokers=lambda: range(listed), _partitions=partitions)
    client: Any = SimpleNamespace(cluster=cluster, hosts=range(hosts))
    assert patience_s(client) == (FAILOVER_S if several else REQUEST_S)

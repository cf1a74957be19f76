"""The contract of the bus port: every test that asks for `place` runs on `MemoryBus` and on `KafkaBus`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.memory.bus import MemoryBroker, MemoryBus
from tests.contracts.place import AnyBus, Place


@pytest.fixture(params=["memory", "kafka"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    if request.param == "memory":
        broker = MemoryBroker(session_timeout_s=0.2)
        connect: Callable[[], AnyBus] = lambda: MemoryBus(broker)  # noqa: E731
    else:
        connection = KafkaConnection(bootstrap_servers=request.getfixturevalue("kafka").bootstrap)
        connect = lambda: KafkaBus(connection)  # noqa: E731
    async with Place(connect) as place:
        yield place

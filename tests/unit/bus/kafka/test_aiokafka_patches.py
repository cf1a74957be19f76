"""aiokafka treats a closed connection as broken on every event loop, and limits its metadata requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import aiokafka.conn
import pytest
import uvloop
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.admin import ApiVersionRequest

import bus.kafka.bus  # noqa: F401  # applies the patches
from bus.kafka import aiokafka_patches
from bus.kafka.aiokafka_patches import BrokerConnection, rate_limited
from loadgen.sim.virtual_loop import run_virtual

BARE = BrokerConnection.__mro__[1]
"""aiokafka's original class."""


async def written_when_closed(kind: type[Any], send: str) -> None:
    """Write on a connection that has just closed, before aiokafka has noticed."""

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    connection = kind(host, port, client_id="test")
    try:
        connection._reader, connection._writer = await asyncio.open_connection(host, port)
        connection._read_task = asyncio.create_task(asyncio.sleep(60.0))
        connection._writer.transport.abort()
        await connection._writer.wait_closed()
        if send == "send":
            await connection.send(ApiVersionRequest())
        else:
            await connection._send_sasl_token(b"token")
    finally:
        connection.close()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("send", ["send", "_send_sasl_token"])
@pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_it_is_told_as_a_broken_connection(loop_factory: Callable[[], asyncio.AbstractEventLoop], send: str) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner, pytest.raises(KafkaConnectionError):
        runner.run(written_when_closed(BrokerConnection, send))


def test_aiokafka_alone_breaks_on_uvloop() -> None:
    """When this test fails, `BrokerConnection` is no longer needed."""
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        pytest.raises(RuntimeError, match="the handler is closed"),
    ):
        runner.run(written_when_closed(BARE, "send"))


def test_the_patches_are_applied() -> None:
    assert aiokafka.conn.AIOKafkaConnection is BrokerConnection
    assert AIOKafkaClient._metadata_update is aiokafka_patches.update_metadata


def test_a_client_asks_for_the_cluster_once_in_its_backoff() -> None:
    """A consumer whose partition has no leader would otherwise repeat the request at once."""
    asked_s: list[float] = []

    async def refused(client: AIOKafkaClient, cluster: object, topics: object) -> bool:
        asked_s.append(asyncio.get_running_loop().time())
        return False

    async def run() -> None:
        client = AIOKafkaClient(retry_backoff_ms=50)
        for _ in range(5):
            assert not await update(client, client.cluster, None)

    update = rate_limited(refused)
    run_virtual(run())
    assert [later - sooner for sooner, later in pairwise(asked_s)] == pytest.approx([0.05] * 4)

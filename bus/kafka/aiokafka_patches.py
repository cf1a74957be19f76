"""Patches of aiokafka: detection of connections closed under uvloop, and a rate limit for metadata requests.

*Closed connections.* A broker that is killed may close a connection just before aiokafka writes a request. asyncio's
transports ignore such a write. uvloop's transports raise RuntimeError, which aiokafka does not expect: its heartbeat, fetch
and send tasks end, and a commit fails with that error (aiokafka issue 1038, open in 0.14). `BrokerConnection` reports such a
write as a broken connection, which aiokafka retries.

*Metadata requests.* While a partition has no leader, a consumer requests the cluster's metadata again after each answer or
refused connection: 3,000 requests per second were measured after a broker had shut down cleanly. `update_metadata` sends at
most one request per `retry_backoff_ms`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import aiokafka.client
import aiokafka.conn
from aiokafka.client import AIOKafkaClient
from aiokafka.cluster import ClusterMetadata
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.protocol.metadata import MetadataRequest

UpdateMetadata = Callable[[AIOKafkaClient, ClusterMetadata, Iterable[str] | None], Awaitable[bool]]


class BrokerConnection(AIOKafkaConnection):  # type: ignore[misc]
    """A connection to one broker that detects a closed transport before each write."""

    def send(self, request: Any, expect_response: bool = True) -> Any:
        """Send a request. Raises `KafkaConnectionError` if the connection is closed."""
        self._drop_closed()
        return super().send(request, expect_response)

    def _send_sasl_token(self, payload: Any, expect_response: bool = True) -> Any:
        self._drop_closed()
        return super()._send_sasl_token(payload, expect_response)

    def _drop_closed(self) -> None:
        if self._writer is not None and self._writer.transport.is_closing():
            self.close(reason=CloseReason.CONNECTION_BROKEN)


def rate_limited(update: UpdateMetadata) -> UpdateMetadata:
    """`update`, called at most once per client in the client's retry backoff."""

    async def update_later(client: AIOKafkaClient, cluster: ClusterMetadata, topics: Iterable[str] | None) -> bool:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(getattr(client, "_next_update_s", 0.0) - loop.time())
        try:
            return bool(await update(client, cluster, topics))
        finally:
            client._next_update_s = loop.time() + client._retry_backoff

    return update_later


update_metadata = rate_limited(AIOKafkaClient._metadata_update)


def apply() -> None:
    """Patch aiokafka for this process. aiokafka has no setting for either change, nor for topic creation by requests."""
    aiokafka.conn.AIOKafkaConnection = BrokerConnection
    AIOKafkaClient._metadata_update = update_metadata
    aiokafka.client.MetadataRequest = partial(MetadataRequest, allow_auto_topic_creation=False)

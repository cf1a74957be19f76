"""aiokafka's connections, made to notice that uvloop has closed them; and its questions, made to wait for an answer.

A broker that is killed closes a connection while a request is about to be written. asyncio's transports swallow that write;
uvloop's raise RuntimeError, which aiokafka takes for a bug: its heartbeat, fetch and sending tasks end, and a commit breaks
whoever asked for it (aiokafka issue 1038, open in 0.14). With this class such a write is a broken connection like any other,
and tried again.

While a partition has no leader, a consumer asks for the cluster's metadata again as soon as it has the last answer, or as its
connection is refused: three thousand times a second with a broker that has gone politely. Here a client asks at most once in
its `retry_backoff_ms`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any

import aiokafka.client
import aiokafka.conn
from aiokafka.client import AIOKafkaClient
from aiokafka.cluster import ClusterMetadata
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.protocol.metadata import MetadataRequest


class Wire(AIOKafkaConnection):  # type: ignore[misc]
    """A connection to one broker."""

    def send(self, request: Any, expect_response: bool = True) -> Any:
        """Raises KafkaConnectionError where the connection is closed."""
        self._drop_closed()
        return super().send(request, expect_response)

    def _send_sasl_token(self, payload: Any, expect_response: bool = True) -> Any:
        self._drop_closed()
        return super()._send_sasl_token(payload, expect_response)

    def _drop_closed(self) -> None:
        if self._writer is not None and self._writer.transport.is_closing():
            self.close(reason=CloseReason.CONNECTION_BROKEN)


_ask = AIOKafkaClient._metadata_update


async def ask_patiently(client: AIOKafkaClient, cluster: ClusterMetadata, topics: Iterable[str] | None) -> bool:
    """What `AIOKafkaClient._metadata_update` does, at most once in the client's backoff."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(getattr(client, "_may_ask_s", 0.0) - loop.time())
    try:
        return bool(await _ask(client, cluster, topics))
    finally:
        client._may_ask_s = loop.time() + client._retry_backoff


def use() -> None:
    """From here on aiokafka connects by this class, and asks in this way; it has no other place to say so."""
    aiokafka.conn.AIOKafkaConnection = Wire
    AIOKafkaClient._metadata_update = ask_patiently
    aiokafka.client.MetadataRequest = partial(MetadataRequest, allow_auto_topic_creation=False)

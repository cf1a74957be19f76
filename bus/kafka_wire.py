"""aiokafka's connections, made to notice that uvloop has closed them.

A broker that is killed closes a connection while a request is about to be written. asyncio's transports swallow that write;
uvloop's raise RuntimeError, which aiokafka takes for a bug: its heartbeat, fetch and sending tasks end, and a commit breaks
whoever asked for it (aiokafka issue 1038, open in 0.14). With this class such a write is a broken connection like any other,
and tried again.
"""

from __future__ import annotations

from typing import Any

import aiokafka.conn
from aiokafka.conn import AIOKafkaConnection, CloseReason


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


def use() -> None:
    """From here on aiokafka connects by this class; it has no other place to say so."""
    aiokafka.conn.AIOKafkaConnection = Wire

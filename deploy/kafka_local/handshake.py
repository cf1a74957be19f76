"""Readiness check of a broker by two raw Kafka protocol requests, without a Kafka library.

A broker opens its port before it can serve, so an open port proves nothing. The check sends the requests `ApiVersions`
version 0 and `Metadata` version 1, which every broker since 0.10 answers, and needs a reply that names at least one broker.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass

_METADATA, _API_VERSIONS = 3, 18
# Requests that only Apache Kafka's own KRaft broker offers: DescribeQuorum and ConsumerGroupHeartbeat.
_KRAFT_ONLY = frozenset({55, 68})
_REPLY_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class BrokerReply:
    """The answer of a broker."""

    node_id: int  # of the first broker in the reply
    advertised: str  # host:port that the broker gives to its clients
    addresses: tuple[str, ...]  # host:port of every broker of the cluster
    is_kraft: bool  # supports requests that only Apache Kafka in KRaft mode supports

    @property
    def brokers(self) -> int:
        """Number of brokers in the cluster."""
        return len(self.addresses)


class NotReadyError(OSError):
    """The listener answers, but is not a Kafka broker or does not serve requests yet."""


def ask(bootstrap: str, timeout_s: float = 2.0) -> BrokerReply:
    """Perform the handshake with the first address in `bootstrap` ("host:port[,host:port]").

    Raises OSError (refused, timed out, closed) or NotReadyError. Plain text only: a TLS port raises an error.
    """
    host, _, port = bootstrap.split(",")[0].strip().rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as connection:
        connection.settimeout(timeout_s)
        versions = _Reply(_exchange(connection, _API_VERSIONS, 0, b""))
        if versions.number("h") != 0:
            raise NotReadyError(f"{bootstrap} refuses ApiVersions")
        offered = set()
        for _ in range(versions.number("i")):
            offered.add(versions.number("h"))
            versions.number("i")  # its minimum and maximum version
        no_topics = struct.pack(">i", 0)  # requests the brokers only
        metadata = _Reply(_exchange(connection, _METADATA, 1, no_topics))
        brokers: list[tuple[int, str]] = []
        for _ in range(metadata.number("i")):
            node_id, name, its_port = metadata.number("i"), metadata.text(), metadata.number("i")
            metadata.text()  # its rack
            brokers.append((node_id, f"{name}:{its_port}"))
    if not brokers:
        raise NotReadyError(f"{bootstrap} speaks Kafka, but no broker is registered yet")
    addresses = tuple(address for _, address in brokers)
    return BrokerReply(brokers[0][0], addresses[0], addresses, offered >= _KRAFT_ONLY)


def _exchange(connection: socket.socket, key: int, version: int, body: bytes) -> bytes:
    """Send one request and return the body of its reply, which follows the length and the correlation id."""
    client = b"deepar-probe"
    request = struct.pack(">hhih", key, version, key, len(client)) + client + body
    connection.sendall(struct.pack(">i", len(request)) + request)
    (size,) = struct.unpack(">i", _read(connection, 4))
    if not 4 <= size <= _REPLY_LIMIT_BYTES:
        raise NotReadyError(f"a reply of {size} bytes is not a Kafka reply")
    reply = _read(connection, size)
    if struct.unpack(">i", reply[:4]) != (key,):
        raise NotReadyError("the reply has a wrong correlation id")
    return reply[4:]


def _read(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    deadline = time.monotonic() + (connection.gettimeout() or 2.0)
    while len(parts) < size:
        if time.monotonic() > deadline:
            raise TimeoutError("the reply did not come in time")
        part = connection.recv(size - len(parts))
        if not part:
            raise NotReadyError("the connection was closed in the middle of a reply")
        parts += part
    return bytes(parts)


class _Reply:
    """Parser of the big-endian fields of a reply; a truncated reply raises NotReadyError."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, form: str) -> int:
        try:
            (value,) = struct.unpack_from(">" + form, self._data, self._at)
        except struct.error as error:
            raise NotReadyError("a reply ends too early") from error
        self._at += struct.calcsize(form)
        return int(value)

    def text(self) -> str:
        size = self.number("h")
        if size < 0:
            return ""
        value = self._data[self._at : self._at + size]
        self._at += size
        return value.decode("utf-8", "replace")

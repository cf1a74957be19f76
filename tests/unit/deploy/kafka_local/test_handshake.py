"""The handshake against peers that are not a broker, or not one yet."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from deploy.kafka_local.handshake import NotReadyError, ask


@contextmanager
def _peer(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Listens, gives the first connection to `answer` in a thread, and closes it after."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def _reply(correlation: int, body: bytes) -> bytes:
    return struct.pack(">ii", 4 + len(body), correlation) + body


def _versions(*keys: int) -> bytes:
    body = struct.pack(">hi", 0, len(keys)) + b"".join(struct.pack(">hhh", key, 0, 9) for key in keys)
    return _reply(18, body)


def _brokers(*names: bytes) -> bytes:
    body = struct.pack(">i", len(names))
    for node, name in enumerate(names):
        body += struct.pack(">ih", node, len(name)) + name + struct.pack(">ih", 9092, -1)
    return _reply(3, body + struct.pack(">ii", 0, 0))


def _script(*replies: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        for reply in replies:
            connection.recv(4096)
            connection.sendall(reply)

    return answer


def test_a_kraft_broker_is_recognised() -> None:
    with _peer(_script(_versions(0, 1, 55, 68), _brokers(b"one", b"two"))) as address:
        reply = ask(address)
    assert (reply.node_id, reply.advertised, reply.brokers, reply.is_kraft) == (0, "one:9092", 2, True)


def test_another_kafka_compatible_broker_is_not_taken_for_apache() -> None:
    with _peer(_script(_versions(0, 1, 3), _brokers(b"one"))) as address:
        assert not ask(address).is_kraft


def test_a_broker_that_is_not_registered_yet_is_not_ready() -> None:
    with (
        _peer(_script(_versions(55, 68), _brokers())) as address,
        pytest.raises(NotReadyError, match="registered"),
    ):
        ask(address)


@pytest.mark.parametrize(
    "reply",
    [
        b"",  # closes at once
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x15\x03\x03\x00\x02\x02\x50",  # a TLS alert
        _reply(7, b"\x00" * 8),  # an answer to another question
        _reply(18, b"\x00\x00\x00\x00\x00\x09\x00"),  # nine versions promised, none given
        _reply(18, b"\x00\x23"),  # UNSUPPORTED_VERSION
        struct.pack(">i", 1 << 30),  # a gigabyte promised
    ],
)
def test_anything_else_is_not_ready(reply: bytes) -> None:
    with _peer(_script(reply)) as address, pytest.raises(NotReadyError):
        ask(address)


def test_nobody_listening_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConnectionRefusedError):
        ask(address)


def test_a_silent_peer_times_out() -> None:
    heard = threading.Event()

    def say_nothing(_: socket.socket) -> None:
        heard.wait(5)

    with _peer(say_nothing) as address:
        with pytest.raises(TimeoutError):
            ask(address, timeout_s=0.2)
        heard.set()

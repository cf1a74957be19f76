"""`deepar healthcheck` against whatever may listen on a port: one line and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import pytest
import typer

from bus.errors import ConfigError
from deploy.commands.healthcheck import NoProbeError, healthcheck
from deploy.kafka_local.ports import free_port

TLS_ALERT = bytes.fromhex("15030300020246")
KAFKA_REPLY = b"\x00\x00\x00\x0a" + bytes(10)
DER = bytes(range(256))


@contextlib.contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """A server that answers every connection with these bytes and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(4096)
                        connection.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/readyz"
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def http(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status.encode(), len(body)) + body


def test_a_probe_that_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(http("200 OK", b'{"ready": true}')) as url:
        healthcheck(url)
    assert json.loads(capsys.readouterr().out) == {"ready": True}


def test_a_probe_that_is_not_ready_is_shown_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(http("503 Service Unavailable", b'{"ready": false}')) as url, pytest.raises(typer.Exit) as left:
        healthcheck(url)
    assert left.value.exit_code == 1
    assert json.loads(capsys.readouterr().out) == {"ready": False}


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (http("404 Not Found", b"404: Not Found"), "404, '404: Not Found'"),
        (http("404 Not Found", b""), "404, nothing"),
        (http("200 OK", b"<html>another program</html>"), "200, '<html>"),
        (http("200 OK", b"[1, 2]"), "200, "),
        (http("500 Oh", b"\xff\xfe\x00"), "500, "),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer as an HTTP server"),
        (TLS_ALERT, "does not answer as an HTTP server"),
        (KAFKA_REPLY, "does not answer as an HTTP server"),
        (DER, "does not answer as an HTTP server"),
        (b"", "does not answer as an HTTP server"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "200, '{'"),
    ],
)
def test_what_is_no_probe_is_named_in_one_line(reply: bytes, told: str) -> None:
    with answering(reply) as url, pytest.raises(NoProbeError) as raised:
        healthcheck(url, timeout=5.0)
    text = str(raised.value)
    assert told in text
    assert text.startswith(url)
    assert "\n" not in text
    assert raised.value.remedy


def test_a_tls_client_at_a_plain_port_and_a_port_where_nothing_listens() -> None:
    with answering(http("400 Bad Request", b"plain")) as url, pytest.raises(NoProbeError):
        healthcheck(url.replace("http:", "https:"), timeout=5.0)
    with pytest.raises(NoProbeError, match="refused"):
        healthcheck(f"http://127.0.0.1:{free_port()}/readyz", timeout=5.0)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:80", "http://127.0.0.1:port/", "http://a b/"])
def test_what_is_no_url_is_a_usage_error(url: str) -> None:
    with pytest.raises(ConfigError):
        healthcheck(url, timeout=1.0)

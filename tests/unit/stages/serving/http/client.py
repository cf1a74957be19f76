"""A REST server on a fake inference, and a client that sends what the tests write, well-formed or not."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.serving.http.rest import RestServer
from stages.serving.http.server import serving_http
from stages.serving.limits import Admission, ServingLimits
from stages.serving.security import Guard, Listening
from stages.serving.values import StreamingInference


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON, without NaN and Infinity."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        return json.loads(self.body, parse_constant=refuse)


class Client:
    """Requests to one port, each on a connection of its own."""

    def __init__(self, port: int, admission: Admission) -> None:
        self.port = port
        self.admission = admission

    async def send(self, raw: bytes, *, half_close: bool = False) -> Answer | None:
        """Send bytes and read one answer; None if the server closes the connection without one.

        With `half_close`, say that no more bytes follow.
        """
        async with asyncio.timeout(20.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                with contextlib.suppress(ConnectionError):
                    writer.write(raw)
                    await writer.drain()
                    if half_close:
                        writer.write_eof()
                return await read_answer(reader, head_only=raw.startswith(b"HEAD "))
            finally:
                writer.close()

    async def ask(
        self, method: str, path: str, body: bytes | dict[str, Any] = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """A well-formed request."""
        answer = await self.send(request_bytes(method, path, body, headers))
        assert answer is not None
        return answer


def request_bytes(
    method: str, path: str, body: bytes | dict[str, Any] = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of a request; `headers` replace the defaults."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = {"Host": "127.0.0.1", "Content-Length": str(len(payload)), **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in all_headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload


async def read_answer(reader: asyncio.StreamReader, *, head_only: bool = False) -> Answer | None:
    """The next answer; None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 100"):
            head = await reader.readuntil(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b"" if head_only else await reader.readexactly(int(headers.get("content-length", "0")))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return Answer(int(status.split()[1]), headers, body)


@contextlib.asynccontextmanager
async def rest_server(
    inference: StreamingInference,
    *,
    limits: ServingLimits | None = None,
    tokens: tuple[str, ...] = (),
    certificate: Path | None = None,
    key: Path | None = None,
) -> AsyncIterator[Client]:
    """A server on a free port of the loopback."""
    limits = limits or ServingLimits()
    listening = Listening(host="127.0.0.1", port=0, tokens=tokens, certificate=certificate, key=key)
    admission = Admission(limits)
    server = RestServer(inference, Guard(listening), admission, version="1.2.3")
    async with serving_http(server.handle, listening, limits) as port:
        yield Client(port, admission)

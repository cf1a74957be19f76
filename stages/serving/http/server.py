"""The HTTP server of the endpoint: listens, limits connections, and ends with the requests under way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from bus.errors import ConfigError
from stages.serving.http.rest import RestServer
from stages.serving.limits import Admission, ServingLimits
from stages.serving.security import Guard, Listening
from stages.serving.values import StreamingInference

READ_BYTES = 1 << 20
"""How much of a body is buffered per connection before it is asked for: less makes large bodies slow."""

LINGER_S = 2.0
"""How long the rest of a refused body is read, so that its sender sees the refusal."""

CLOSING_S = 3.0
"""How long answers under way may take when the endpoint stops."""

_silent = logging.getLogger("deepar.serving.http")  # aiohttp would log the lines of malformed requests
_silent.addHandler(logging.NullHandler())
_silent.propagate = False


@contextlib.asynccontextmanager
async def rest_endpoint(
    inference: StreamingInference, listening: Listening, admission: Admission, version: str
) -> AsyncIterator[int]:
    """Serve `inference` over HTTP while the block runs; yields the port. `version` is that of DeePar.

    Raises `ConfigError` if the address is unsafe or cannot be used, or the certificate is wrong.
    """
    server = RestServer(inference, Guard(listening), admission, version=version)
    async with serving_http(server.handle, listening, admission.limits) as port:
        yield port


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serving_http(handle: Handler, listening: Listening, limits: ServingLimits) -> AsyncIterator[int]:
    """Serve while the block runs; yields the port. Raises `ConfigError` where the address cannot be used."""
    listening.require_safe()
    tls = listening.tls()
    loop = asyncio.get_running_loop()
    connections = Connections(handle, limits)
    try:
        listener = await loop.create_server(
            connections.opened,
            listening.host,
            listening.port,
            ssl=tls,
            backlog=1_024,
            ssl_handshake_timeout=limits.head_s if tls else None,
        )
    except OSError as error:
        raise ConfigError(
            f"--serve {listening.host}:{listening.port}: cannot listen: {os.strerror(error.errno or 0)}",
            remedy="choose another port or address",
        ) from None
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await connections.close()


class Connections:
    """Makes the protocol of each connection; refuses more than the limit, and drops those that send no request."""

    def __init__(self, handle: Handler, limits: ServingLimits) -> None:
        self._limits = limits
        self._handle = handle
        self._silent: dict[asyncio.Protocol, asyncio.TimerHandle] = {}  # connections without a request so far
        self._server = web.Server(
            self._count,
            handler_cancellation=True,
            access_log=None,
            logger=_silent,
            auto_decompress=False,  # bounded by `stages.serving.http.compression`
            read_bufsize=READ_BYTES,
            lingering_time=LINGER_S,
            keepalive_timeout=75.0,
        )

    def opened(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        if len(self._server.connections) >= self._limits.connections:
            return _Refused()
        protocol = self._server()
        loop = asyncio.get_running_loop()
        self._silent[protocol] = loop.call_later(self._limits.head_s, self._drop, protocol)
        return protocol

    async def close(self) -> None:
        """Close idle connections at once, the others when their answer is sent."""
        for timer in self._silent.values():
            timer.cancel()
        self._silent.clear()
        self._server.pre_shutdown()
        await self._server.shutdown(CLOSING_S)

    async def _count(self, request: web.BaseRequest) -> web.StreamResponse:
        if (timer := self._silent.pop(request.protocol, None)) is not None:
            timer.cancel()
        return await self._handle(request)

    def _drop(self, protocol: RequestHandler) -> None:
        self._silent.pop(protocol, None)
        protocol.force_close()
        if protocol.transport is not None:
            protocol.transport.abort()


class _Refused(asyncio.Protocol):
    """A connection over the limit: closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()

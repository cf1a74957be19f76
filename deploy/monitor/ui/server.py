"""Web server for the page and for a stream of changes in a region.

Updates are coalesced: every browser receives the changes since its last message, at most five times a second. A slow browser
gets fewer and larger messages, never a queue. The page loads nothing from elsewhere and runs only its own script. A request
must name a known address of this server, so that no other site can read it through a browser (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final

from aiohttp import web

from bus.errors import ConfigError
from bus.text.json_text import json_text
from deploy.monitor.region_report import report
from deploy.monitor.region_view import RegionView
from deploy.monitor.ui.page_message import page_message

FOLDER: Final = Path(__file__).parent
FILES: Final = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
UPDATE_S: Final = 0.2
KEEP_ALIVE_S: Final = 10.0
MAX_STREAMS: Final = 32
"""Maximum number of connected pages."""

LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})


def application(view: RegionView, *, names: Iterable[str] = ()) -> web.Application:
    """The server's routes. `names`: further host names that a request may use besides the names of this machine."""
    allowed = LOCAL_NAMES | {name.lower() for name in names}
    streams: set[asyncio.Task[None]] = set()

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if host_name(request.host) not in allowed:
            raise web.HTTPMisdirectedRequest(
                text="unknown host: use the address that deepar ui prints\n", headers=HEADERS
            )
        return await handler(request)

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)

    async def static(request: web.Request) -> web.Response:
        name, content_type = FILES[request.path]
        return web.Response(
            body=(FOLDER / name).read_bytes(), content_type=content_type, charset="utf-8", headers=HEADERS
        )

    async def state(request: web.Request) -> web.Response:
        return web.json_response(report(view), dumps=json_text)

    async def events(request: web.Request) -> web.StreamResponse:
        if len(streams) >= MAX_STREAMS:
            raise web.HTTPServiceUnavailable(text="too many pages are open: close one and reload\n")
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        streams.add(task)
        try:
            await stream(view, response)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the page was closed, or this server is being stopped
        finally:
            streams.discard(task)
        return response

    async def close_streams(app: web.Application) -> None:
        for task in streams:
            task.cancel()

    app = web.Application(middlewares=[guard])
    app.on_response_prepare.append(add_headers)
    app.on_shutdown.append(close_streams)
    app.add_routes([web.get(path, static) for path in FILES])
    app.add_routes([web.get("/state.json", state), web.get("/events", events)])
    return app


async def stream(view: RegionView, response: web.StreamResponse) -> None:
    """Send the whole state, then the changes, until the connection closes."""
    clock = asyncio.get_running_loop().time
    version, last_line, sent_s, fresh = 0, 0, clock(), True
    while True:
        if fresh or view.version != version:
            message = page_message(view, since=version, lines_since=last_line)
            message["fresh"] = fresh
            version, last_line, fresh = message["version"], message["last_line"], False
            await response.write(b"data: " + json_text(message, compact=True).encode() + b"\n\n")
            sent_s = clock()
        elif clock() - sent_s > KEEP_ALIVE_S:
            await response.write(b": still here\n\n")
            sent_s = clock()
        await asyncio.sleep(UPDATE_S)


def host_name(host: str) -> str:
    """The name in a `Host` header, without the port."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() and not name.endswith(":") else host.lower()


@contextlib.asynccontextmanager
async def serve(view: RegionView, *, host: str, port: int) -> AsyncIterator[str]:
    """Serve while the block runs; yields the page's address. `port` 0 takes a free one. Raises `ConfigError`."""
    runner = web.AppRunner(application(view, names=[host]), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}", remedy="name another --port"
            ) from None
        bound = runner.addresses[0][1]
        yield f"http://{host}:{bound}/"
    finally:
        await runner.cleanup()

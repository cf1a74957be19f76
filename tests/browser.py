"""A real headless Chromium for tests, spoken to by its own debugging protocol: no driver and no package.

Where no Chromium is installed, tests that ask for one are skipped and say so; DEEPAR_TEST_BROWSER=required makes that a
failure.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
)  # fmt: skip
START_S = 60.0


def find_browser() -> str:
    """The path of the program. If it is missing, the test fails or is skipped."""
    for name in PROGRAMS:
        if (found := shutil.which(name)) is not None:
            return found
    message = "no Chromium is installed (apt-get install chromium)"
    if os.environ.get("DEEPAR_TEST_BROWSER") == "required":
        pytest.fail(f"DEEPAR_TEST_BROWSER=required, but {message}", pytrace=False)
    pytest.skip(message)


class Page:
    """One tab. What the page complains about (exceptions, blocked content, failed requests) gathers in `complaints`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def listen(self) -> None:
        async for message in self._socket:
            content = message.json()
            if (reply := self._replies.pop(content.get("id", 0), None)) is not None:
                reply.set_result(content)
            elif content.get("method") == "Runtime.exceptionThrown":
                details = content["params"]["exceptionDetails"]
                self.complaints.append(str(details.get("exception", {}).get("description") or details["text"]))
            elif content.get("method") == "Log.entryAdded" and content["params"]["entry"]["level"] == "error":
                self.complaints.append(content["params"]["entry"]["text"])

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._replies[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(30.0):
            content = await self._replies[number]
        assert "error" not in content, (method, content["error"])
        return dict(content["result"])

    async def open(self, address: str) -> None:
        await self.command("Page.navigate", url=address)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, by way of JSON."""
        found = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, *, within_s: float = 20.0) -> Any:
        """Wait for an expression to become true."""
        try:
            async with asyncio.timeout(within_s):
                while not (value := await self.evaluate(expression)):
                    await asyncio.sleep(0.05)
                return value
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"never true: {expression}; {self.complaints}; the page says:\n{text}") from None

    async def picture(self) -> bytes:
        """What the tab shows, as PNG."""
        shot = await self.command("Page.captureScreenshot", format="png")
        return base64.b64decode(shot["data"])


@contextlib.asynccontextmanager
async def open_page(folder: Path, *, width: int = 1400, height: int = 980, dark: bool = False) -> AsyncIterator[Page]:
    """A blank tab in a browser of its own, which keeps its files in `folder` and ends with the block."""
    program = find_browser()
    process = await asyncio.create_subprocess_exec(
        program, *FLAGS, f"--user-data-dir={folder}", "about:blank",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        port = await _port(folder / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as reply:
                tab = next(entry for entry in await reply.json() if entry["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                for domain in ("Page", "Runtime", "Log"):
                    await page.command(f"{domain}.enable")
                await page.command(
                    "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
                )
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                await page.command("Emulation.setEmulatedMedia", features=[scheme])
                try:
                    yield page
                finally:
                    with contextlib.suppress(Exception):
                        await page.command("Browser.close")
                    listening.cancel()
    finally:
        try:
            async with asyncio.timeout(10.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _port(file: Path, process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(START_S):
        while process.returncode is None:
            with contextlib.suppress(FileNotFoundError):
                if lines := (await asyncio.to_thread(file.read_text)).splitlines():
                    return int(lines[0])
            await asyncio.sleep(0.05)
    raise AssertionError(f"the browser ended with {process.returncode}")

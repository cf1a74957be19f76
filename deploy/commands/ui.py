"""`deepar ui`: a region on a page in the browser."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.console import Console

from bus.port import Bus
from deploy.console_output.options import Bootstrap, Region
from deploy.monitor.region_feed import follow, play_again
from deploy.monitor.region_view import RegionView
from deploy.services import wiring
from deploy.services.process import run_on_uvloop, until_stopped

PORT = 8765


def ui(
    bootstrap_servers: Bootstrap = None,
    region: Region = 0,
    port: Annotated[int, typer.Option(min=0, max=65535, envvar="DEEPAR_UI_PORT", help="0 takes a free one.")] = PORT,
    host: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_UI_HOST", help="Address to listen on. Whoever reaches it sees everything: there is no login."
        ),
    ] = "127.0.0.1",
    replay: Annotated[
        bool, typer.Option("--replay", help="Play what stands on the topics again from its beginning.")
    ] = False,
    speed: Annotated[float, typer.Option(min=0.01, help="How much faster than it was, with --replay.")] = 1.0,
) -> None:
    """Serve a page that shows a region: nodes, links, the timeline of every task, decisions as they come.

    Example: `deepar ui --port 8765 --replay --speed 5`
    """
    view = RegionView(region)
    run_on_uvloop(_serve(wiring.kafka_bus(bootstrap_servers), view, host, port, speed if replay else None))


async def _serve(bus: Bus, view: RegionView, host: str, port: int, speed: float | None) -> None:
    from deploy.monitor.ui import serve  # not at the top: `ui --help` needs no web server

    async def feed() -> None:
        if speed is None:
            await follow(bus, view)
        else:
            await play_again(bus, view, speed=speed)
            await asyncio.Event().wait()  # the page stays

    async with bus, serve(view, host=host, port=port) as address:
        Console(emoji=False, stderr=True, highlight=False).print(f"[bold]{address}[/]  (Ctrl-C stops it)")
        await until_stopped(feed(), service="ui", region=view.region)

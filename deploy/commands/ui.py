"""`deepar ui`: a web page that shows a region."""

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
    port: Annotated[
        int, typer.Option(min=0, max=65535, envvar="DEEPAR_UI_PORT", help="Port to listen on; 0 takes a free one.")
    ] = PORT,
    host: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_UI_HOST",
            help="Address to listen on. There is no login: anyone who can reach it sees everything.",
        ),
    ] = "127.0.0.1",
    replay: Annotated[
        bool, typer.Option("--replay", help="Replay the records on the topics from the beginning.")
    ] = False,
    speed: Annotated[float, typer.Option(min=0.01, help="Speed of --replay relative to real time.")] = 1.0,
) -> None:
    """Serve a page that shows a region: nodes, links, the timeline of every task, decisions as they come.

    Example: `deepar ui --port 8765 --replay --speed 5`
    """
    view = RegionView(region)
    run_on_uvloop(_serve(wiring.kafka_bus(bootstrap_servers), view, host, port, speed if replay else None))


async def _serve(bus: Bus, view: RegionView, host: str, port: int, speed: float | None) -> None:
    from deploy.monitor.ui import serve  # imported here: `ui --help` needs no web server

    async def feed() -> None:
        if speed is None:
            await follow(bus, view)
        else:
            await play_again(bus, view, speed=speed)
            await asyncio.Event().wait()  # keep serving the page

    async with bus, serve(view, host=host, port=port) as address:
        Console(emoji=False, stderr=True, highlight=False).print(f"[bold]{address}[/]  (Ctrl-C stops it)")
        await until_stopped(feed(), service="ui", region=view.region)

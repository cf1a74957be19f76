"""`deepar top`: a terminal screen that shows a region, live or replayed."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from bus.port import Bus
from bus.text.json_text import json_text
from deploy.console_output.options import Bootstrap, Region
from deploy.monitor.region_feed import follow, play_again
from deploy.monitor.region_report import report
from deploy.monitor.region_view import RegionView
from deploy.monitor.top import screen
from deploy.services import wiring
from deploy.services.process import run_on_uvloop

REFRESH_S = 0.25


def top(
    bootstrap_servers: Bootstrap = None,
    region: Region = 0,
    replay: Annotated[
        bool, typer.Option("--replay", help="Replay the records on the topics from the beginning, then stop.")
    ] = False,
    speed: Annotated[float, typer.Option(min=0.01, help="Speed of --replay relative to real time.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one screen and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the screen's content as one JSON object and stop.")
    ] = False,
) -> None:
    """Watch a region: nodes with slots and links in use, tasks, delays, and the reasons why tasks wait.

    Ctrl-C quits. If the output is not a terminal, one screen is printed.

    Example: `deepar top --replay --speed 5`
    """
    view = RegionView(region)
    bus = wiring.kafka_bus(bootstrap_servers)
    if as_json or once or not sys.stdout.isatty():
        run_on_uvloop(_read_once(bus, view))
        if as_json:
            print(json_text(report(view)))
        else:
            console = Console(emoji=False, highlight=False)
            console.print(screen(view, columns=console.width))
        return
    run_on_uvloop(_show(bus, view, speed if replay else None))


async def _read_once(bus: Bus, view: RegionView) -> None:
    async with bus:
        await follow(bus, view, until_end=True)


async def _show(bus: Bus, view: RegionView, speed: float | None) -> None:
    console = Console(emoji=False, highlight=False)
    async with bus:
        feed = follow(bus, view) if speed is None else play_again(bus, view, speed=speed)
        reading = asyncio.create_task(feed)
        rate = Rate()
        try:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    await asyncio.wait({reading}, timeout=REFRESH_S)
                    per_s = rate(view.records, asyncio.get_running_loop().time())
                    live.update(screen(view, rows=console.height, columns=console.width, per_s=per_s), refresh=True)
                    if reading.done():
                        reading.result()
                        break
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
    # the alternate screen is gone; leave the last state on the terminal
    console.print(screen(view, rows=console.height, columns=console.width))


class Rate:
    """Records a second over the last few refreshes."""

    def __init__(self, span_s: float = 2.0) -> None:
        self._span_s = span_s
        self._seen: list[tuple[float, int]] = []

    def __call__(self, records: int, now_s: float) -> float:
        """The rate up to `now_s`, when `records` had been read."""
        self._seen = [(at_s, n) for at_s, n in self._seen if now_s - at_s <= self._span_s] + [(now_s, records)]
        first_s, first = self._seen[0]
        return (records - first) / (now_s - first_s) if now_s > first_s else 0.0

"""`deepar tail`: follow a control topic, as a table on a terminal and as JSON Lines elsewhere."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.markup import escape

from bus import messages, topics
from bus.decisions import DecisionLog, Dropped
from bus.errors import ConfigError, ProtocolError
from bus.messages import NodeHeartbeat, PlannerHeartbeat
from bus.port import Bus, Record, TopicPartition
from bus.region_tasks import RegionTasks
from bus.text.json_text import json_text
from deploy.console_output.options import Bootstrap
from deploy.monitor.decision_lines import LEGEND, lines_of
from deploy.services import wiring
from deploy.services.process import run_on_uvloop

tail_app = typer.Typer(no_args_is_help=True, help="Follow a control topic: decisions, tasks, events or nodes.")

Offset = Annotated[
    str,
    typer.Option("--offset", "-o", help="First offset: start, end, or a number; -N starts N records before the end."),
]
Count = Annotated[int | None, typer.Option("--count", "-n", min=1, help="Stop after N records.")]
AtEnd = Annotated[bool, typer.Option("--exit", "-e", help="Stop at the end instead of waiting for more.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON Lines even on a terminal.")]
Region = Annotated[int | None, typer.Option("--region", min=0, help="Show only this region.")]
Heartbeats = Annotated[bool, typer.Option("--heartbeats", help="Show heartbeats in the table too.")]


def _command(topic: str, what: str) -> Callable[..., None]:
    def tail(
        offset: Offset = "start",
        count: Count = None,
        at_end: AtEnd = False,
        as_json: AsJson = False,
        region: Region = None,
        heartbeats: Heartbeats = False,
        bootstrap_servers: Bootstrap = None,
    ) -> None:
        if sys.stdout.isatty() and not as_json:
            show: Shown = Table(topic, heartbeats=heartbeats)
        else:
            show = JsonLines()
        run_on_uvloop(_tail(wiring.kafka_bus(bootstrap_servers), topic, offset, count, at_end, region, show))

    tail.__doc__ = (
        f"Follow {what}\n\nPrints a table on a terminal; prints the records as JSON Lines when piped or with --json.\n\n"
        f"Example, the last 20 records: `deepar tail {topic.removeprefix('deepar.')} --offset -20 --exit`"
    )
    return tail


for _name, _topic, _what in (
    ("decisions", topics.DECISIONS, "the planner's decisions: placements, grants, and waiting tasks."),
    ("tasks", topics.TASKS, "submitted tasks."),
    ("events", topics.EVENTS, "reports of the stages: completions, failures, heartbeats."),
    ("nodes", topics.NODES, "announcements of nodes."),
):
    tail_app.command(_name)(_command(_topic, _what))


async def _tail(
    bus: Bus,
    topic: str,
    offset: str,
    count: int | None,
    at_end: bool,
    region: int | None,
    show: Shown,
) -> None:
    async with bus:
        ends = await bus.end_offsets(topic)
        if region is not None and region not in ends:
            raise ConfigError(f"region {region} does not exist: {topic} has {len(ends)} region(s), counted from 0")
        wanted = {
            (topic, p): await _begin(bus, (topic, p), offset, end, show)
            for p, end in ends.items()
            if region in (None, p)
        }
        reader = await bus.reader(list(wanted), start=wanted)
        shown = 0
        try:
            while True:
                for record in await reader.fetch(timeout_s=0.5):
                    if not show.shows(record):
                        continue
                    show(record)
                    shown += 1
                    if shown == count:
                        return
                if at_end and await reader.lag() == 0:
                    return
        finally:
            await reader.close()


LARGEST_OFFSET = 2**63 - 1


async def _begin(bus: Bus, where: TopicPartition, offset: str, end: int, show: Shown) -> int:
    match offset:
        case "start" | "beginning":
            return 0
        case "end":
            return end
    try:
        number = int(offset)
    except ValueError:
        raise ConfigError(f"--offset {offset}: must be start, end or a number") from None
    if abs(number) > LARGEST_OFFSET:
        raise ConfigError(f"--offset {offset}: must not exceed {LARGEST_OFFSET:,}")
    return number if number >= 0 else await _back(bus, where, -number, end, show)


async def _back(bus: Bus, where: TopicPartition, number: int, end: int, show: Shown) -> int:
    """The offset from which `number` shown records remain before the end; hidden heartbeats are not counted."""
    back = number
    while True:
        begin = max(0, end - back)
        reader = await bus.reader([where], start={where: begin})
        shown: deque[int] = deque(maxlen=number)
        try:
            while reader.position(where) < end and await reader.lag():
                shown += [record.offset for record in await reader.fetch(timeout_s=0.5) if show.shows(record)]
        finally:
            await reader.close()
        if len(shown) == number or begin == 0:
            return shown[0] if shown else begin
        back *= 4


class Shown(Protocol):
    """A printer of records."""

    def shows(self, record: Record) -> bool:
        """Whether the printer shows this record."""

    def __call__(self, record: Record) -> None: ...


class JsonLines:
    """Prints every record unchanged as one line of JSON."""

    def shows(self, record: Record) -> bool:
        """Always true: every record is printed."""
        return True

    def __call__(self, record: Record) -> None:
        json_line(record)


def json_line(record: Record) -> None:
    """Print a record unchanged as one line of JSON."""
    try:
        value: Any = json.loads(record.value) if record.value is not None else None
    except ValueError:
        value = (record.value or b"").decode("utf-8", "replace")
    line = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": _iso(record.timestamp_ms),
        "key": record.key,
        "value": value,
    }
    sys.stdout.write(json_text(line, compact=True) + "\n")
    sys.stdout.flush()


def _iso(timestamp_ms: int) -> str:
    from datetime import UTC, datetime

    moment = datetime.fromtimestamp(timestamp_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Table:
    """Prints records as rows of a growing table."""

    def __init__(self, topic: str, *, heartbeats: bool, console: Console | None = None) -> None:
        self._topic = topic
        self._heartbeats = heartbeats
        self._console = console or Console(emoji=False, highlight=False)
        self._regions: dict[int, RegionTasks] = {}  # by region
        self._logs: dict[int, DecisionLog] = {}  # by region
        self._widths = [16, 14]  # of columns "who" and "what"; they grow with the content
        if topic == topics.DECISIONS:
            self._console.print(f"[dim]{LEGEND}[/]", soft_wrap=True)
        self._console.print(f"[bold]{'time':<12} {'offset':>7}  {'who':<16} {'what':<14} details[/]")

    def shows(self, record: Record) -> bool:
        """True except for hidden heartbeats."""
        if self._heartbeats:
            return True
        try:
            return not isinstance(messages.decode(self._topic, record.value), NodeHeartbeat | PlannerHeartbeat)
        except ProtocolError:
            return True

    def __call__(self, record: Record) -> None:
        time_of_day = _iso(record.timestamp_ms)[11:23]
        where = f"{time_of_day:<12} {record.offset:>7}"
        try:
            message = messages.decode(self._topic, record.value)
        except ProtocolError as error:
            self._console.print(f"[red]{where}  {'?':<16} {'unreadable':<14} {escape(str(error))}[/]")
            return
        if isinstance(message, NodeHeartbeat | PlannerHeartbeat) and not self._heartbeats:
            return
        if self._topic == topics.DECISIONS:
            message = self._logs.setdefault(record.partition, DecisionLog(joins=True)).accept(message)
            if isinstance(message, Dropped):
                why = escape(f"{message.reason}: {message.detail}")
                self._console.print(f"[dim]{where}  {'planner':<16} {'ignored':<14} {why}[/]", soft_wrap=True)
                return
        for style, who, what, details in lines_of(message, self._regions.setdefault(record.partition, RegionTasks())):
            self._widths = [max(width, len(cell)) for width, cell in zip(self._widths, (who, what), strict=True)]
            columns = " ".join(f"{cell:<{width}}" for width, cell in zip(self._widths, (who, what), strict=True))
            text = f"{where}  {escape(f'{columns} {details}')}"
            self._console.print(f"[{style}]{text}[/]" if style else text, soft_wrap=True)

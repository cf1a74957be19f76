"""`deepar doctor`: look at this machine and the system around it, and say what to do about what is wrong."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.errors import DeeparError, ProtocolError, UnknownTopicError
from bus.kafka import KafkaBus, KafkaConnection
from bus.messages import NodeAnnounced
from bus.port import Bus
from bus.units import format_seconds
from deploy import nodes
from deploy.commands_services import Bootstrap
from deploy.process import EXIT_FAILED, run_on_uvloop
from stages.cache import cache_dir
from stages.litert import SegmentRunner
from stages.zoo import digits, load_model

NEEDED_DISK_BYTES = 2 << 30
SKEW_S = 2.0
_ACTIVATIONS = topics.ACTIVATIONS_EDGE.removesuffix(topics.EDGE_PLACEHOLDER)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    bootstrap_servers: Bootstrap = None,
) -> None:
    """Check this machine, the broker, the topics, the planners and the nodes; exit 1 if something is wrong."""
    checks = run_on_uvloop(examine(nodes.kafka_bus(bootstrap_servers)))
    if as_json:
        sys.stdout.write(json.dumps({"checks": [asdict(check) for check in checks]}) + "\n")
    else:
        console = Console(highlight=False)
        for check in checks:
            mark = "[green]ok  [/]" if check.ok else "[bold red]BAD [/]"
            console.print(f"{mark} {check.name:<10} {escape(check.detail)}", soft_wrap=True)
            if not check.ok and check.remedy:
                console.print(f"                [cyan]{escape(check.remedy)}[/]", soft_wrap=True)
    if not all(check.ok for check in checks):
        raise typer.Exit(EXIT_FAILED)


async def examine(bus: KafkaBus) -> list[Check]:
    """Every check; those of the system need the broker and are left out where none answers."""
    checks = [_python(), await asyncio.to_thread(_kernel), _disk()]
    try:
        async with bus:
            checks.append(Check("broker", True, f"{bus!r} answers"))
            checks += await _sites(bus)
            for look in (_topics, _planners, _nodes):
                checks += await _look(look, bus)
    except DeeparError as error:
        checks.append(Check("broker", False, str(error), error.remedy or ""))
    return checks


async def _sites(bus: KafkaBus) -> list[Check]:
    """Whether the broker of every other site answers, and has what this process would read or write there."""
    checks = []
    connection = bus.connection
    for servers in connection.sites[1:]:
        held = sorted(prefix for prefix, there in connection.routes.items() if there == servers)
        try:
            await connection.check(servers)
            missing = [topic for topic in _kept_at(connection, held) if not await _has(bus, *topic)]
        except DeeparError as error:
            detail = f"{error}; it holds {', '.join(held)}"
            checks.append(Check("site", False, detail, error.remedy or "deepar broker, on a machine of that site"))
            continue
        detail = f"{servers} answers and holds {', '.join(held)}"
        if missing:
            detail = f"{servers} answers, but has no {', '.join(topic for topic, _ in missing)}"
        checks.append(Check("site", not missing, detail, "start the edge, or: deepar topics create --edge NAME"))
    return checks


def _kept_at(connection: KafkaConnection, held: list[str]) -> list[tuple[str, str]]:
    """The topics of one site that can be told from its routes, each with the topic that it stands beside."""
    names = {topic.name for topic in topics.TABLE}
    kept = []
    for name in held:
        is_edge = name not in names and name.startswith(_ACTIVATIONS)
        if is_edge or name in names:
            kept.append((name, name))
        if is_edge and connection.servers_of(topics.RESULTS, beside=name) == connection.servers_of(name):
            kept.append((topics.RESULTS, name))
    return list(dict.fromkeys(kept))


async def _has(bus: KafkaBus, topic: str, neighbour: str) -> bool:
    try:
        await bus.beside(topic, neighbour).partitions(topic)
    except UnknownTopicError:
        return False
    return True


async def _look(look: Callable[[Bus], Awaitable[list[Check]]], bus: Bus) -> list[Check]:
    try:
        return await look(bus)
    except UnknownTopicError as error:
        return [Check("topics", False, str(error), "deepar topics create")]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info >= (3, 11), f"Python {version}", "DeePar needs Python 3.11 or newer")


def _kernel() -> Check:
    """Run LeNet on one digit: the runtime is there, and its kernels work."""
    try:
        images, labels = digits()
        model = load_model("lenet")
        before_s = time.perf_counter()
        answer = int(SegmentRunner(model.source).run([images[:1]])[0].argmax())
        took = format_seconds(time.perf_counter() - before_s)
    except DeeparError as error:
        return Check("litert", False, str(error), error.remedy or "make setup")
    return Check("litert", answer == int(labels[0]), f"LeNet reads a {answer}, which is a {labels[0]}, in {took}")


def _disk() -> Check:
    folder = cache_dir()
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free for models and segments in {folder}"
    return Check("disk", free > NEEDED_DISK_BYTES, detail, "make room, or set DEEPAR_CACHE_DIR to another folder")


async def _topics(bus: Bus) -> list[Check]:
    missing = []
    for spec in topics.specs():
        try:
            await bus.partitions(spec.name)
        except UnknownTopicError:
            missing.append(spec.name)
    if missing:
        return [Check("topics", False, f"missing: {', '.join(missing)}", "deepar topics create")]
    return [Check("topics", True, "all there")]


async def _planners(bus: Bus) -> list[Check]:
    """Whether somebody leads each region."""
    checks = []
    for region in range(await bus.partitions(topics.DECISIONS)):
        log = DecisionLog()
        newest_ms = 0
        reader = await bus.reader([(topics.DECISIONS, region)], start="start")
        try:
            while await reader.lag():
                for record in await reader.fetch(timeout_s=0.5):
                    log.read(record)
                    newest_ms = record.timestamp_ms
        finally:
            await reader.close()
        name = f"region {region}"
        if log.epoch == 0:
            checks.append(Check("planner", False, f"{name}: no planner was ever there", "start one: deepar planner"))
            continue
        silent_s = max(0.0, time.time() - newest_ms / 1000)
        leads = not log.left and silent_s <= 2 * log.lease_s
        detail = (
            f"{name}: {log.planner or 'a planner'} leads epoch {log.epoch}, last heard {format_seconds(silent_s)} ago"
        )
        if log.left:
            detail = f"{name}: the planner has left"
        checks.append(
            Check("planner", leads, detail, "start one: deepar planner (it takes over a stale epoch by itself)")
        )
    return checks


async def _nodes(bus: Bus) -> list[Check]:
    """Who has announced itself, and whether its clock agrees with the broker's records."""
    roles: dict[str, str] = {}
    skewed = []
    for region in range(await bus.partitions(topics.NODES)):
        reader = await bus.reader([(topics.NODES, region)], start="start")
        try:
            while await reader.lag():
                for record in await reader.fetch(timeout_s=0.5):
                    try:
                        message = messages.decode(topics.NODES, record.value)
                    except ProtocolError:
                        continue
                    if isinstance(message, NodeAnnounced):
                        roles[message.node] = message.role.value
                        ahead_s = record.timestamp_ms / 1000 - datetime.now(UTC).timestamp()
                        if ahead_s > SKEW_S:
                            skewed.append(f"{message.node} ({format_seconds(ahead_s)} ahead)")
                    else:
                        roles.pop(message.node, None)
        finally:
            await reader.close()
    counted = ", ".join(f"{list(roles.values()).count(role)} {role}(s)" for role in ("device", "edge", "cloud"))
    checks = [Check("nodes", bool(roles), counted, "start some: deepar stage device|edge|cloud")]
    if skewed:
        detail = f"clocks disagree: {', '.join(skewed)}; decisions do not mind, but times in tables will"
        checks.append(Check("clocks", False, detail, "set them by NTP"))
    return checks

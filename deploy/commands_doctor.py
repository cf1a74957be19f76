"""`deepar doctor`: look at this machine and the system around it, and say what to do about what is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.errors import ConfigError, DeeparError, ProtocolError, UnknownTopicError
from bus.identity import Key, load_key, load_master
from bus.kafka import KafkaBus
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
    checks = [_python(), await asyncio.to_thread(_kernel), _disk(), *identity_checks(os.environ)]
    try:
        async with bus:
            checks.append(Check("broker", True, f"{bus!r} answers"))
            for look in (_topics, _planners, _nodes):
                checks += await _look(look, bus)
    except DeeparError as error:
        checks.append(Check("broker", False, str(error), error.remedy or ""))
    return checks


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


def identity_checks(environment: Mapping[str, str]) -> list[Check]:
    """Of the key or master that the environment names: that it is one, of whom, and that nobody else can read it."""
    checks = []
    for variable, load in (("DEEPAR_IDENTITY_KEY_FILE", load_key), ("DEEPAR_IDENTITY_MASTER_FILE", load_master)):
        if not (name := environment.get(variable)):
            continue
        file = Path(name)
        try:
            found = load(file)
        except ConfigError as error:
            checks.append(Check("identity", False, f"{variable}: {error}", error.remedy or f"see {variable}"))
            continue
        said = f"{file}: of master {found.fingerprint}"
        node = environment.get("DEEPAR_NODE")
        if isinstance(found, Key):
            said = f"{file}: the key of {found.speaker}, of master {found.fingerprint}"
            if node and node != found.speaker.name:
                remedy = f"deepar identity key {node} --role {found.speaker.role}"
                checks.append(Check("identity", False, f"{said}, and DEEPAR_NODE is {node}", remedy))
                continue
        open_to_others = bool(file.stat().st_mode & 0o077)
        said += ", and others on this machine may read it" if open_to_others else ""
        checks.append(Check("identity", not open_to_others, said, f"chmod 600 {file}"))
    return checks


def _own_key() -> Key | None:
    """The key that the environment names; whether it is one has been looked at already."""
    try:
        return load_key(Path(os.environ["DEEPAR_IDENTITY_KEY_FILE"]))
    except (KeyError, ConfigError):
        return None


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
        if log.identity is not None:
            detail += f"; it demands proofs of identity, by keys of master {log.identity}"
            if (key := _own_key()) is not None and key.fingerprint != log.identity:
                said = f"{name} demands keys of master {log.identity}, and ours is of {key.fingerprint}"
                checks.append(Check("identity", False, said, "deepar identity key, with the region's master"))
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

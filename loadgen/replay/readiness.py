"""Readiness of a region: whether a planner leads it, and which nodes have announced themselves or joined."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from bus import messages, snapshots, topics
from bus.decisions import DecisionLog, Dropped
from bus.errors import BusError, BusUnavailableError, ConfigError, ProtocolError
from bus.messages import Decision, NodeAnnounced, NodeJoined, NodeLeft, NodeLost
from bus.port import Bus, Reader
from bus.values import Role

FETCH_S = 0.25
"""Maximum wait of one fetch; also bounds how long a cancelled reader keeps running."""


async def decisions_from_now(bus: Bus, region: int) -> tuple[DecisionLog, Reader]:
    """A decision log that knows the current epoch, and a reader positioned at the end of a region's decisions.

    The log is built from the records after the region's last snapshot, so the whole history need not be read.
    """
    latest, reader = await snapshots.open_decisions(bus, region)
    log = DecisionLog() if latest is None else snapshots.log_behind(latest)
    try:
        while await reader.lag():
            for record in await reader.fetch(timeout_s=FETCH_S):
                log.read(record)
    except BusError:
        await reader.close()
        raise
    return log, reader


def require_unled(log: DecisionLog, region: int) -> None:
    """Check that a benchmark may lead the region. Raises `ConfigError` if a planner leads it or did not step down."""
    if log.epoch and not log.left:
        raise ConfigError(
            f"planner {log.planner} leads region {region} on this broker, and the benchmark would depose it",
            remedy="start a separate broker: deepar broker --port 9192 --data /tmp/deepar-bench",
        )


async def await_planner(bus: Bus, region: int, *, timeout_s: float) -> DecisionLog:
    """Wait for a record of the current epoch, which proves that a planner is alive.

    Raises `BusUnavailableError` with a remedy if none arrives within `timeout_s`.
    """
    log, reader = await decisions_from_now(bus, region)
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                for record in await reader.fetch(timeout_s=FETCH_S):
                    if not isinstance(log.read(record), Dropped):
                        return log
    except TimeoutError:
        raise BusUnavailableError(
            f"no planner wrote a decision for region {region} within {timeout_s:g} s",
            remedy="start one: deepar planner",
        ) from None
    finally:
        await reader.close()


async def await_nodes(bus: Bus, region: int, names: Iterable[str], *, timeout_s: float) -> None:
    """Wait until all these nodes have joined. Raises `BusUnavailableError` naming the missing ones."""
    wanted = set(names)
    missing = set(wanted)
    log = DecisionLog(joins=True)
    reader = await bus.reader([(topics.DECISIONS, region)], start="start")
    try:
        async with asyncio.timeout(timeout_s):
            while missing:
                for record in await reader.fetch(timeout_s=FETCH_S):
                    message = log.read(record)
                    for change in message.changes if isinstance(message, Decision) else ():
                        if isinstance(change, NodeJoined):
                            missing.discard(change.node.node)
                        elif isinstance(change, NodeLost):
                            missing |= {change.node} & wanted
    except TimeoutError:
        some = ", ".join(sorted(missing)[:10])
        raise BusUnavailableError(f"{len(missing)} nodes have not joined in {timeout_s:g} s: {some}") from None
    finally:
        await reader.close()


async def find_nodes(bus: Bus, region: int, roles: Iterable[Role] = (Role.DEVICE,)) -> list[NodeAnnounced]:
    """Announced nodes of a region that have not left and are not draining, sorted by name. Leases are not checked."""
    wanted = set(roles)
    reader = await bus.reader([(topics.NODES, region)], start="start")
    nodes: dict[str, NodeAnnounced] = {}
    try:
        while await reader.lag():
            for record in await reader.fetch(timeout_s=FETCH_S):
                if not record.value:
                    continue
                with suppress(ProtocolError):
                    message = messages.decode(topics.NODES, record.value)
                    if isinstance(message, NodeAnnounced):
                        nodes[message.node] = message
                    elif isinstance(message, NodeLeft):
                        nodes.pop(message.node, None)
    finally:
        await reader.close()
    return [nodes[name] for name in sorted(nodes) if nodes[name].role in wanted and not nodes[name].draining]

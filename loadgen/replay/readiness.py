"""Who is there: whether a planner leads a region, which nodes have joined it, and which have announced themselves."""

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
"""How long a fetch waits for news; bounds how late a cancelled follower notices."""


async def open_decisions(bus: Bus, region: int) -> tuple[DecisionLog, Reader]:
    """A reader at the end of a region's decisions and the log that knows which of the next records count.

    Reading goes on behind the region's last snapshot, so that it does not take a year's history to find the
    open epoch.
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
    """For benchmarks that take a region over. Raises `ConfigError` where a planner leads it, or did and has not left."""
    if log.epoch and not log.left:
        raise ConfigError(
            f"{log.planner} leads region {region} of this broker, and a benchmark would take its place",
            remedy="start a broker for it: deepar broker --port 9192 --data /tmp/deepar-bench",
        )


async def await_planner(bus: Bus, region: int, *, timeout_s: float) -> DecisionLog:
    """Wait until a record of the open epoch arrives: a planner is alive.

    Raises `BusUnavailableError` with what to start when none speaks within `timeout_s`.
    """
    log, reader = await open_decisions(bus, region)
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                for record in await reader.fetch(timeout_s=FETCH_S):
                    if not isinstance(log.read(record), Dropped):
                        return log
    except TimeoutError:
        raise BusUnavailableError(
            f"no planner has spoken for region {region} within {timeout_s:g} s",
            remedy="start one: deepar planner",
        ) from None
    finally:
        await reader.close()


async def await_nodes(bus: Bus, region: int, names: Iterable[str], *, timeout_s: float) -> None:
    """Wait until the planner has taken all of these nodes in. Raises `BusUnavailableError` naming who is missing."""
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
    """The nodes of a region that have announced themselves and neither left nor drain, by name. Leases are not checked."""
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

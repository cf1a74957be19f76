"""Shell completion of models, policies, nodes and tasks.

Nodes and tasks are read from the broker. A shell waits for the answer, so it comes within `LIMIT_S` or not at all, and
nothing is ever printed beside it: the user is in the middle of a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import typer

from bus import messages, topics
from bus.errors import DeeparError, ProtocolError
from bus.port import Bus
from bus.values import Role

LIMIT_S = 1.5
MOST_TASKS = 200
"""Tasks that are offered: the newest."""


def models(incomplete: str) -> list[str]:
    """Models that DeePar brings, and model files; the last of a list a,b."""
    from stages.zoo.networks import NETWORKS

    before, last = _split(incomplete)
    names = [*NETWORKS, *(() if before else _files(last, ".tflite"))]
    return [before + name for name in names if name.startswith(last)]


def policies(incomplete: str) -> list[str]:
    """Policies; the last of a list a,b."""
    from planner.search.policies import policy_names

    before, last = _split(incomplete)
    return [before + name for name in policy_names() if name.startswith(last)]


def edges(context: typer.Context, incomplete: str) -> list[str]:
    """Edges that have announced themselves."""
    return _nodes(context, incomplete, (Role.EDGE,))


def devices(context: typer.Context, incomplete: str) -> list[str]:
    """Devices that have announced themselves; the last of a list a,b."""
    return _nodes(context, incomplete, (Role.DEVICE,))


def tasks(context: typer.Context, incomplete: str) -> list[str]:
    """The newest tasks of the region, newest first."""

    async def read(bus: Bus, region: int) -> list[str]:
        end = (await bus.end_offsets(topics.TASKS))[region]
        where = (topics.TASKS, region)
        reader = await bus.reader([where], start={where: max(0, end - MOST_TASKS)})
        found: dict[str, None] = {}
        while await reader.lag():
            for record in await reader.fetch(timeout_s=0.25):
                with contextlib.suppress(ProtocolError):
                    message = messages.decode(topics.TASKS, record.value or b"")
                    found[message.task_id if isinstance(message, messages.TaskSubmitted) else ""] = None
        await reader.close()
        return [name for name in reversed(found) if name]

    return [name for name in _from_broker(context, read) if name.startswith(incomplete)]


def _nodes(context: typer.Context, incomplete: str, roles: Iterable[Role]) -> list[str]:
    from loadgen.replay.readiness import find_nodes

    async def read(bus: Bus, region: int) -> list[str]:
        return [node.node for node in await find_nodes(bus, region, roles)]

    before, last = _split(incomplete)
    return [before + name for name in _from_broker(context, read) if name.startswith(last)]


def _from_broker(context: typer.Context, read: Callable[[Bus, int], Awaitable[list[str]]]) -> list[str]:
    from deploy.services.wiring import kafka_bus

    given: dict[str, Any] = context.params
    try:
        region = int(given.get("region") or os.environ.get("DEEPAR_REGION") or 0)
        with _silent():
            bus = kafka_bus(given.get("bootstrap_servers"))

            async def ask() -> list[str]:
                async with bus:
                    return await read(bus, region)

            return asyncio.run(ask())
    except (DeeparError, OSError, ValueError, LookupError, TimeoutError):
        return []


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence stderr and enforce a time limit while completing."""

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(0)

    logging.disable(logging.CRITICAL)
    error = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.dup2(error, 2)
        os.close(error)
        logging.disable(logging.NOTSET)


def _split(text: str) -> tuple[str, str]:
    """What stands before the last name of a list a,b, comma included, and that name."""
    before, comma, last = text.rpartition(",")
    return before + comma, last


def _files(start: str, suffix: str) -> list[str]:
    """Files that end in `suffix`, and folders, whose path begins with `start`."""
    folder = os.path.dirname(start)
    found = []
    with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if path.startswith(start) and not (entry.name.startswith(".") and not os.path.basename(start)):
                found += [path + "/"] if entry.is_dir() else [path] if entry.name.endswith(suffix) else []
    return sorted(found)

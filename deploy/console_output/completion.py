"""Shell completion of models, policies, nodes and tasks.

Nodes and tasks are read from the broker. The shell waits for the answer, so reading ends after `LIMIT_S`, with no names if
the broker has not answered. Nothing else is printed, because it would appear in the line that the user is typing.
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
"""Maximum number of tasks that are read, newest first."""


def models(incomplete: str) -> list[str]:
    """Models of the zoo and model files; completes the last entry of a list a,b."""
    from stages.zoo.networks import NETWORKS

    before, last = _split(incomplete)
    names = [*NETWORKS, *(() if before else _files(last, ".tflite"))]
    return [before + name for name in names if name.startswith(last)]


def policies(incomplete: str) -> list[str]:
    """Policies; completes the last entry of a list a,b."""
    from planner.search.policies import policy_names

    before, last = _split(incomplete)
    return [before + name for name in policy_names() if name.startswith(last)]


class RegionNames:
    """Names of nodes and tasks in the region that the command line names. `connect` opens a bus for bootstrap servers."""

    def __init__(self, connect: Callable[[str | None], Bus]) -> None:
        self._connect = connect

    def edges(self, context: typer.Context, incomplete: str) -> list[str]:
        """Announced edges; completes the last entry of a list a,b."""
        return self._nodes(context, incomplete, (Role.EDGE,))

    def devices(self, context: typer.Context, incomplete: str) -> list[str]:
        """Announced devices; completes the last entry of a list a,b."""
        return self._nodes(context, incomplete, (Role.DEVICE,))

    def tasks(self, context: typer.Context, incomplete: str) -> list[str]:
        """The newest tasks of the region, newest first."""
        return [name for name in self._read(context, _newest_tasks) if name.startswith(incomplete)]

    def _nodes(self, context: typer.Context, incomplete: str, roles: Iterable[Role]) -> list[str]:
        from loadgen.replay.readiness import find_nodes

        async def read(bus: Bus, region: int) -> list[str]:
            return [node.node for node in await find_nodes(bus, region, roles)]

        before, last = _split(incomplete)
        return [before + name for name in self._read(context, read) if name.startswith(last)]

    def _read(self, context: typer.Context, read: Callable[[Bus, int], Awaitable[list[str]]]) -> list[str]:
        """The names that `read` finds; none if the broker or the region cannot be read."""
        given: dict[str, Any] = context.params
        try:
            region = int(given.get("region") or os.environ.get("DEEPAR_REGION") or 0)
            with _silent():
                bus = self._connect(given.get("bootstrap_servers"))

                async def ask() -> list[str]:
                    async with bus:
                        return await read(bus, region)

                return asyncio.run(ask())
        except (DeeparError, OSError, ValueError, LookupError, TimeoutError):
            return []


async def _newest_tasks(bus: Bus, region: int) -> list[str]:
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


def _kafka(bootstrap_servers: str | None) -> Bus:
    from deploy.services.wiring import kafka_bus  # imported here: completing a model needs no Kafka client

    return kafka_bus(bootstrap_servers)


_names = RegionNames(_kafka)
edges, devices, tasks = _names.edges, _names.devices, _names.tasks


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
    """Split a list a,b into the text up to and including the last comma, and the last entry."""
    before, comma, last = text.rpartition(",")
    return before + comma, last


def _files(start: str, suffix: str) -> list[str]:
    """Folders, and files that end in `suffix`, whose paths begin with `start`."""
    folder = os.path.dirname(start)
    found = []
    with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if path.startswith(start) and not (entry.name.startswith(".") and not os.path.basename(start)):
                found += [path + "/"] if entry.is_dir() else [path] if entry.name.endswith(suffix) else []
    return sorted(found)

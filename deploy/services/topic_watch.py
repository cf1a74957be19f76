"""Watch on the topics that a service uses. A deleted topic makes the service not ready and is logged with a remedy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

import structlog

from bus import topics
from bus.errors import BusError
from bus.port import Bus
from bus.values import Role

WATCH_S = 5.0
"""Interval between checks."""
AGAIN_S = 60.0
"""Interval between repeated log entries while topics are missing."""

log = structlog.get_logger("deepar")


def used_by(role: str, name: str = "") -> tuple[str, ...]:
    """The topics that a service of this role needs; an edge needs only its own activations topic."""
    used = [row.name for row in topics.TABLE if role in row.readers or role in row.writers]
    if role == Role.EDGE.value:
        return tuple(topics.activations_topic(name) if topic == topics.ACTIVATIONS_EDGE else topic for topic in used)
    return tuple(topic for topic in used if topic != topics.ACTIVATIONS_EDGE)


class TopicWatch:
    """Checks periodically that all topics exist and have a partition for each region; `missing` lists the faults."""

    def __init__(self, bus: Bus, names: Iterable[str], regions: int) -> None:
        """`regions` is the number of partitions that the control topics must have."""
        self.missing: dict[str, str] = {}  # topic -> what is wrong
        self._bus = bus
        self._names = tuple(names)
        self._regions = regions
        self._told_s = float("-inf")

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[TopicWatch]:
        """Watch while the block runs."""
        task = asyncio.create_task(self.run(), name="topics")
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self.check()
            except BusError as error:
                log.debug("topics not checked", error=str(error))  # the broker is unavailable; its users log that

    async def check(self) -> None:
        """Check once. Raises `BusError`."""
        there = {found.name: found.partitions for found in await self._bus.found_topics(self._names)}
        missing = {}
        for name in self._names:
            if name not in there:
                missing[name] = "deleted"
            elif name in topics.CONTROL_TOPICS and there[name] < self._regions:
                missing[name] = f"has {there[name]} partitions, needs {self._regions}"
        self._tell(missing)
        self.missing = missing

    def _tell(self, missing: dict[str, str]) -> None:
        now_s = asyncio.get_running_loop().time()
        if missing and (missing != self.missing or now_s - self._told_s >= AGAIN_S):
            self._told_s = now_s
            said = "; ".join(f"{name}: {what}" for name, what in missing.items())
            remedy = f"deepar topics create --regions {self._regions}, or restore them; details: deepar doctor"
            if any(there != "deleted" for there in missing.values()):
                remedy = "deepar topics repair; details: deepar doctor"
            log.error("not ready: topics are missing", topics=said, remedy=remedy)
        elif self.missing and not missing:
            log.info("missing topics restored")


__all__ = ["TopicWatch", "used_by"]

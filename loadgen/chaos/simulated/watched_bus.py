"""Bus connection that reports a process's sends and commits to the monitor."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from bus import topics
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.port import Position, RecordValue, TopicPartition
from loadgen.chaos.simulated.monitor import SimulatedMonitor


class WatchedBus(MemoryBus):
    """A process's connection that reports to the monitor; `fine` adds an await before and after every call."""

    def __init__(self, broker: MemoryBroker, name: str, watch: SimulatedMonitor, *, fine: bool) -> None:
        super().__init__(broker, name)
        self._watch = watch
        self._fine = fine
        watch.born(name)

    async def post(self, topic: str, value: RecordValue | None, **more: Any) -> Any:
        self._watch.sends(self.client_id, topic, value)
        if self._fine:
            await asyncio.sleep(0)
        acknowledgement = await super().post(topic, value, **more)
        if self._fine:
            if isinstance(acknowledgement, asyncio.Future):
                acknowledgement.add_done_callback(_seen)  # the sender may die before it awaits this
            await asyncio.sleep(0)
        return acknowledgement

    async def send(self, topic: str, value: RecordValue | None, **more: Any) -> Position:
        sent_s = asyncio.get_running_loop().time()
        position = await super().send(topic, value, **more)
        if topic in (topics.EVENTS, topics.NODES):
            self._watch.heard(self.client_id, sent_s)
        return position

    async def join(self, topics: Iterable[str], **more: Any) -> Any:
        return _WatchedMember(await super().join(topics, **more), self.client_id, self._watch)


def _seen(future: asyncio.Future[Position]) -> None:
    if not future.cancelled():
        future.exception()


class _WatchedMember:
    """A consumer group member whose commits the monitor checks."""

    def __init__(self, inner: Any, name: str, watch: SimulatedMonitor) -> None:
        self._inner, self._name, self._watch = inner, name, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        self._watch.commits(self._name, offsets)
        await self._inner.commit(offsets)

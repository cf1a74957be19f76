"""Consumer groups of a `MemoryBroker`: who holds which partition, and how far the group is.

The protocol is Kafka's eager one, which aiokafka speaks: at every change all members let go (`on_revoked`), then the
partitions are dealt out anew, then each is told (`on_assigned`) and reads on from what was committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Protocol

from bus.port import TopicPartition

REBALANCE_TIMEOUT_S = 10.0
"""A member that has not let go after this long loses its partitions all the same, and joins again when it is back."""


class GroupMember(Protocol):
    """What a group asks of its members."""

    topics: tuple[str, ...]
    dead: bool  # its process is gone and its session has not run out yet

    def assignment(self) -> frozenset[TopicPartition]:
        """What it holds."""

    async def let_go(self) -> None:
        """Tell it that its partitions are no longer its own; returns when it has settled that."""

    async def take(self, partitions: list[TopicPartition]) -> None:
        """Tell it what it holds from now on."""

    def forget(self) -> None:
        """What it held belongs to others now, whatever it believes."""


class Group:
    """One consumer group."""

    def __init__(self, name: str, count: Callable[[str], int], running: Callable[[], Awaitable[None]]) -> None:
        self.name = name
        self.topics: dict[str, None] = {}  # every topic that a member has read
        self.committed: dict[TopicPartition, int] = {}
        self.members: list[GroupMember] = []  # in the order of joining
        self.generation = 0
        self._count = count  # partitions of a topic
        self._running = running  # returns when the broker runs
        self._late: list[GroupMember] = []  # still letting go after the timeout
        self._changed = asyncio.Event()
        self._wanted = False
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<group {self.name}, generation {self.generation}, {len(self.members)} members>"

    def add(self, member: GroupMember) -> None:
        """A member joins."""
        self.topics.update(dict.fromkeys(member.topics))
        self.members.append(member)
        self.rebalance()

    def remove(self, member: GroupMember) -> None:
        """A member has left, or its session has run out."""
        if member in self.members:
            self.members.remove(member)
            member.forget()
            self.rebalance()

    def rebalance(self) -> None:
        """Deal the partitions out anew, as soon as may be."""
        self._wanted = True
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._balance(), name=f"group {self.name}")

    async def dissolve(self) -> None:
        """The last member has left: nothing is to be dealt out. What was committed stays."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _balance(self) -> None:
        while self._wanted:
            self._wanted = False
            await self._running()
            await self._each(
                [(member, member.let_go()) for member in self.members if not member.dead and member.assignment()]
            )
            while any(member.dead for member in self.members):  # the dead keep what they held until their session ends
                self._changed.clear()
                await self._changed.wait()
            self._wanted = False  # whoever came meanwhile is dealt in
            self.generation += 1
            members = [member for member in self.members if member not in self._late]
            await self._each([(member, member.take(share)) for member, share in self._deal(members)])

    def _deal(self, members: list[GroupMember]) -> list[tuple[GroupMember, list[TopicPartition]]]:
        """Partitions in order, dealt in turn among the members that read their topic (Kafka's round robin)."""
        shares: list[tuple[GroupMember, list[TopicPartition]]] = [(member, []) for member in members]
        turn = 0
        for topic in sorted({topic for member in members for topic in member.topics}):
            for partition in range(self._count(topic)):
                for step in range(len(shares)):
                    member, share = shares[(turn + step) % len(shares)]
                    if topic in member.topics:
                        share.append((topic, partition))
                        turn += step + 1
                        break
        return shares

    async def _each(self, calls: Iterable[tuple[GroupMember, Awaitable[None]]]) -> None:
        """Run the members' callbacks side by side; leave behind who takes too long."""
        tasks = [(member, asyncio.ensure_future(call)) for member, call in calls]
        if not tasks:
            return
        await asyncio.wait([task for _, task in tasks], timeout=REBALANCE_TIMEOUT_S)
        for member, task in tasks:
            if not task.done():
                self._late.append(member)
                member.forget()
                task.add_done_callback(partial(self._back, member))
            else:
                task.result()  # callbacks' own errors are kept by the member; anything here is a bug of ours

    def _back(self, member: GroupMember, _task: asyncio.Future[None]) -> None:
        self._late.remove(member)
        if member in self.members:
            self.rebalance()

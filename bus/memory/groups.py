"""Consumer groups of a `MemoryBroker`: partition assignment and committed offsets.

They follow Kafka's eager protocol, as aiokafka does: on every change all members release their partitions (`on_revoked`),
the group reassigns them, and each member (`on_assigned`) resumes from the committed offsets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Protocol

from bus.port import TopicPartition

REBALANCE_TIMEOUT_S = 10.0
"""How long a member may take to release its partitions; later it loses them and rejoins when it is done."""


class GroupMember(Protocol):
    """A member as its group sees it."""

    topics: tuple[str, ...]
    dead: bool  # its process was killed and its session has not expired yet

    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions that it holds."""

    async def revoke(self) -> None:
        """Run its `on_revoked` and take its partitions away."""

    async def assign(self, partitions: list[TopicPartition]) -> None:
        """Give it these partitions and run its `on_assigned`."""

    def forget(self) -> None:
        """Take its partitions away without a callback."""


class Group:
    """One consumer group."""

    def __init__(self, name: str, count: Callable[[str], int], running: Callable[[], Awaitable[None]]) -> None:
        self.name = name
        self.topics: dict[str, None] = {}  # every topic that a member has read
        self.committed: dict[TopicPartition, int] = {}
        self.members: list[GroupMember] = []  # in the order of joining
        self.generation = 0
        self._count = count  # partitions of a topic
        self._running = running  # waits until the broker runs
        self._late: list[GroupMember] = []  # members that exceeded the rebalance timeout
        self._changed = asyncio.Event()
        self._wanted = False  # whether a further rebalance is due
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<group {self.name}, generation {self.generation}, {len(self.members)} members>"

    def add(self, member: GroupMember) -> None:
        """Add a member and rebalance."""
        self.topics.update(dict.fromkeys(member.topics))
        self.members.append(member)
        self.rebalance()

    def remove(self, member: GroupMember) -> None:
        """Remove a member that left or whose session expired, and rebalance."""
        if member in self.members:
            self.members.remove(member)
            member.forget()
            self.rebalance()

    def rebalance(self) -> None:
        """Schedule a rebalance."""
        self._wanted = True
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._balance(), name=f"group {self.name}")

    async def dissolve(self) -> None:
        """Cancel a pending rebalance after the last member left. Committed offsets stay."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _balance(self) -> None:
        while self._wanted:
            self._wanted = False
            await self._running()
            await self._each(
                [(member, member.revoke()) for member in self.members if not member.dead and member.assignment()]
            )
            while any(member.dead for member in self.members):  # killed members keep theirs until the session expires
                self._changed.clear()
                await self._changed.wait()
            self._wanted = False  # members that joined meanwhile are included
            self.generation += 1
            members = [member for member in self.members if member not in self._late]
            await self._each([(member, member.assign(share)) for member, share in self._deal(members)])

    def _deal(self, members: list[GroupMember]) -> list[tuple[GroupMember, list[TopicPartition]]]:
        """Assign partitions in order to the members that read their topic (Kafka's round robin)."""
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
        """Run the members' callbacks concurrently; members that exceed the timeout lose their partitions."""
        tasks = [(member, asyncio.ensure_future(call)) for member, call in calls]
        if not tasks:
            return
        await asyncio.wait([task for _, task in tasks], timeout=REBALANCE_TIMEOUT_S)
        for member, task in tasks:
            if not task.done():
                self._late.append(member)
                member.forget()
                task.add_done_callback(partial(self._rejoin, member))
            else:
                task.result()  # members keep their callbacks' errors; any other error is a bug

    def _rejoin(self, member: GroupMember, _task: asyncio.Future[None]) -> None:
        """A late member has finished its callback."""
        self._late.remove(member)
        if member in self.members:
            self.rebalance()

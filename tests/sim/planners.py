"""A region for tests of planners, in virtual time. Planners can be killed or frozen at any step; devices are simulated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.errors import BusError
from bus.identity.keys import Master, Speaker
from bus.identity.signed_bus import signed
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import Decision, NodeAnnounced, Start, TaskCompleted, TaskSubmitted
from bus.port import Bus, FoundTopic, Member, Position, Reader, Record, RecordValue, TopicPartition
from bus.topics import TopicSpec
from bus.values import Parts, Role
from deploy.services.wiring import make_work
from planner.core.core import PlannerCore
from planner.service.region_context import PlannerSettings
from planner.service.service import PlannerService
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner
from tests.decision_story import Story, read_story
from tests.sim.world import profile, task

_Answer = TypeVar("_Answer")

FOREVER_S = 1e6
"""Lease of nodes in tests that are not about leases."""


Condition = Callable[[str, bytes | None], bool]
"""Whether a planner is killed at a record of this topic with this value."""

Alteration = Callable[[str, bytes | None, str | None], tuple[bytes | None, str | None]]
"""A planted fault: maps (topic, value, key) of a record to the value and key that are written instead."""

TOWNSPEOPLE = (
    ("c1", Role.CLOUD),
    ("e1", Role.EDGE),
    ("e2", Role.EDGE),
    ("d1", Role.DEVICE),
    ("d2", Role.DEVICE),
    ("d3", Role.DEVICE),
)


class FragileBus:
    """A planner's bus connection that counts a step before and after each call, and can kill or freeze the planner there."""

    def __init__(self, broker: MemoryBroker, name: str, *, fuse: int | None = None) -> None:
        self.inner = MemoryBus(broker, name)
        self.name = self.inner.name
        self.fuse = fuse  # the step at which the planner is killed; None: never
        self.steps = 0
        self.died = asyncio.Event()
        self._runs = asyncio.Event()
        self._runs.set()
        self.sees = asyncio.Event()  # cleared: reads of decisions block, writes go on
        self.sees.set()
        self.dies_before: Condition = lambda topic, value: False  # kills the planner instead of writing such a record
        self.dies_after: Condition = lambda topic, value: False  # kills the planner after such a record was written
        self.alter: Alteration = lambda topic, value, key: (value, key)  # changes a record before it is written

    async def step(self) -> None:
        self.steps += 1
        if self.steps == self.fuse and not self.died.is_set():
            self.kill()
        if self.died.is_set():
            await asyncio.get_running_loop().create_future()  # a killed planner takes no further step
        await self._runs.wait()

    def kill(self) -> None:
        self.died.set()
        self.inner.kill()

    def freeze(self) -> None:
        self._runs.clear()

    def thaw(self) -> None:
        self._runs.set()

    async def around(self, call: Callable[[], Awaitable[_Answer]]) -> _Answer:
        await self.step()
        result = await call()
        await self.step()
        return result

    async def __aenter__(self) -> FragileBus:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self.died.is_set():
            await self.inner.__aexit__(*exc)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        return await self.around(lambda: self.inner.end_offsets(topic))

    async def partitions(self, topic: str) -> int:
        return await self.inner.partitions(topic)

    async def prepare_topic(self, topic: str) -> None:
        await self.inner.prepare_topic(topic)

    async def found_topics(self, names: Iterable[str] | None = None) -> list[FoundTopic]:
        return await self.inner.found_topics(names)

    async def post(self, topic: str, value: RecordValue | None, **more: Any) -> Awaitable[Position]:
        return await self._write(self.inner.post, topic, value, **more)

    async def send(self, topic: str, value: RecordValue | None, **more: Any) -> Position:
        return await self._write(self.inner.send, topic, value, **more)

    async def _write(
        self,
        write: Callable[..., Awaitable[_Answer]],
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        **more: Any,
    ) -> _Answer:
        data = None if value is None else bytes(value)
        if self.dies_before(topic, data):
            self.kill()
        data, key = self.alter(topic, data, key)
        answer = await self.around(lambda: write(topic, data, key=key, **more))
        if self.dies_after(topic, data):
            self.kill()
        return answer

    async def reader(self, partitions: Iterable[TopicPartition], *, start: Any) -> Reader:
        wanted = list(partitions)
        blinds = any(topic == topics.DECISIONS for topic, _ in wanted)
        return FragileReader(self, await self.around(lambda: self.inner.reader(wanted, start=start)), blinds)

    async def join(self, topics: Iterable[str], **more: Any) -> Member:
        return await self.inner.join(topics, **more)

    async def create_topics(self, specs: Iterable[TopicSpec]) -> None:
        await self.inner.create_topics(specs)

    def beside(self, topic: str, neighbour: str) -> Bus:
        return self


class FragileReader:
    """A reader of a `FragileBus`."""

    def __init__(self, bus: FragileBus, inner: Reader, blinds: bool) -> None:
        self._bus, self._inner, self._blinds = bus, inner, blinds

    async def fetch(self, *, max_records: int = 500, timeout_s: float = 1.0) -> list[Record]:
        records = await self._bus.around(lambda: self._inner.fetch(max_records=max_records, timeout_s=timeout_s))
        if self._blinds:
            await self._bus.sees.wait()
        return records

    def position(self, partition: tuple[str, int]) -> int:
        return self._inner.position(partition)

    async def seek(self, partition: tuple[str, int], offset: int) -> None:
        await self._inner.seek(partition, offset)

    async def lag(self) -> int:
        return await self._bus.around(self._inner.lag)

    async def close(self) -> None:
        await self._inner.close()


class CountingCore(PlannerCore):
    """A core that lists the sequence numbers of the decisions it folds."""

    def __init__(self, folded: list[int], *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._folded = folded

    def fold(self, decision: Decision) -> None:
        self._folded.append(decision.seq)
        super().fold(decision)


@dataclass
class Process:
    """A planner with its own bus connection and asyncio task, like a process."""

    bus: FragileBus
    service: PlannerService
    task: asyncio.Task[None] = field(init=False)

    async def run(self) -> None:
        async with self.bus:
            await self.service.run()

    async def kill(self) -> None:
        """Simulate SIGKILL."""
        self.bus.kill()
        await self.stop()

    async def stop(self) -> None:
        """Simulate SIGTERM. Raises the planner's error if it failed."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


@dataclass
class Town:
    """A region and its planners; `start` adds a planner."""

    broker: MemoryBroker
    bus: MemoryBus  # of all other participants
    region: int = 0
    processes: list[Process] = field(default_factory=list)
    nodes: dict[str, Node] = field(default_factory=dict)  # by name, if the stages are real
    shown: list[tuple[str, int]] = field(default_factory=list)  # (task, sample) of each result, if the stages are real
    master: Master | None = None  # master secret; None: the region requires no proofs of identity
    make_core: Callable[[], PlannerCore] | None = None  # None: a core with the defaults
    alter: Alteration | None = None  # planted fault of all planners that are started later

    def core(self) -> PlannerCore:
        return PlannerCore(self.region) if self.make_core is None else self.make_core()

    def start(self, name: str = "p", *, fuse: int | None = None, lease_s: float = 1.0, **more: Any) -> Process:
        bus = FragileBus(self.broker, name, fuse=fuse)
        if self.alter is not None:
            bus.alter = self.alter
        more.setdefault("master", self.master)
        others = {key: more.pop(key) for key in ("master", "wall_clock", "components") if key in more}
        settings = PlannerSettings(name=name, region=self.region, lease_s=lease_s, **more)
        service = PlannerService(bus, self.core, settings, **others)
        process = Process(bus, service)
        process.task = asyncio.get_running_loop().create_task(process.run(), name=name)
        self.processes.append(process)
        return process

    async def story(self, log: DecisionLog | None = None) -> Story:
        return await read_story(self.bus, self.core, region=self.region, log=log)

    def bus_of(self, speaker: str) -> Bus:
        """The bus as this speaker, e.g. `device:d1`, uses it: signed if the region requires proofs."""
        return self.bus if self.master is None else signed(self.bus, self.master.key(Speaker.parse(speaker)))

    async def tell(self, topic: str, message: messages.Message, key: str, speaker: str = "loadgen:town") -> None:
        bus = self.bus_of(speaker)
        while True:
            try:
                await bus.send(topic, messages.encode(message), key=key, partition=self.region)
            except BusError:
                await asyncio.sleep(0.1)
            else:
                return

    async def announce(self, lease_s: float = FOREVER_S) -> None:
        """Announce the simulated nodes: two edges, one cloud, three devices."""
        for name, role in TOWNSPEOPLE:
            more: dict[str, Any] = {}
            if role is Role.EDGE:
                more = {"slots": 1, "link1_capacity_bps": 100_000_000, "link2_capacity_bps": 20_000_000}
            await self.tell(
                topics.NODES,
                NodeAnnounced(
                    node=name,
                    role=role,
                    region=self.region,
                    incarnation=f"{name}-1",
                    lease_s=lease_s,
                    models=(profile(role),),
                    **more,
                ),
                name,
                f"{role.value}:{name}",
            )

    async def submit(self, numbers: Iterable[int], gap_s: float = 0.05) -> list[TaskSubmitted]:
        tasks = [task(number, f"d{number % 3 + 1}") for number in numbers]
        for one in tasks:
            await self.tell(topics.TASKS, one, one.task_id)
            await asyncio.sleep(gap_s)
        return tasks

    async def play(self, *, service_s: float = 0.1) -> None:
        """Simulate all devices until cancelled: report each started attempt as completed after `service_s` seconds."""
        log = DecisionLog()
        reader = await self.bus.reader([(topics.DECISIONS, self.region)], start="start")
        started: set[tuple[str, int]] = set()
        async with asyncio.TaskGroup() as group:
            while True:
                for record in await reader.fetch():
                    message = log.read(record)
                    for change in message.changes if isinstance(message, Decision) else ():
                        if isinstance(change, Start) and (change.task_id, change.attempt) not in started:
                            started.add((change.task_id, change.attempt))
                            group.create_task(self._finish(change, service_s))

    async def stages(self) -> None:
        """Run real stages for the same nodes until cancelled; `shown` collects the results of the devices."""
        async with asyncio.TaskGroup() as group:
            for name, role in TOWNSPEOPLE:
                more: dict[str, Any] = {}
                if role is Role.EDGE:
                    more = {"slots": 1, "link1_capacity_bps": 100_000_000, "link2_capacity_bps": 20_000_000}
                settings = NodeSettings(name=name, role=role, region=self.region, lease_s=60.0, **more)
                bus = self.bus_of(f"{role.value}:{name}")
                node = self.nodes[name] = Node(bus, settings, ModelledRunner([profile(role)]))
                work = make_work(node, lambda task, sample, outputs: self.shown.append((task.task_id, sample)))
                group.create_task(node.run(work), name=name)

    async def _finish(self, start: Start, service_s: float) -> None:
        await asyncio.sleep(service_s)
        done = TaskCompleted(
            task_id=start.task_id, attempt=start.attempt, node=start.device, measured=Parts(), delay_s=service_s
        )
        await self.tell(topics.EVENTS, done, start.task_id, f"device:{start.device}")

    async def until_ended(self, count: int, timeout_s: float = 600.0) -> Story:
        """Wait until `count` tasks have ended according to the decision topic."""
        async with asyncio.timeout(timeout_s):
            while len((story := await self.story()).ends) < count:
                await asyncio.sleep(1.0)
                for process in self.processes:
                    if process.task.done() and not process.bus.died.is_set() and not process.task.cancelled():
                        process.task.result()  # raises the error of a planner that failed
        return story


@contextlib.asynccontextmanager
async def town(
    broker: MemoryBroker | None = None, *, real: bool = False, played: bool = True, master: Master | None = None
) -> AsyncIterator[Town]:
    """A region for planners. Its nodes are announced and, if `played`, its devices simulated; if `real`, real stages with
    modelled runners run instead.
    """
    made = broker or MemoryBroker()
    async with MemoryBus(made, "town") as bus:
        await bus.create_topics(topics.specs(["e1", "e2"]))
        place = Town(made, bus, master=master)
        if not real:
            await place.announce()
        playing = asyncio.create_task(
            place.stages() if real else place.play() if played else asyncio.sleep(FOREVER_S), name="stages"
        )
        try:
            yield place
        finally:
            playing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await playing
            for process in place.processes:
                process.bus.thaw()
                process.bus.sees.set()
                await process.stop()


__all__ = ["FOREVER_S", "CountingCore", "FragileBus", "Process", "Story", "Town", "town"]

"""Fixed placement for benchmarks: a device, an edge and a cloud, with a director in place of the planner.

The stages are the real shells on a real bus. The director leads region 0 during the benchmark: it replays the region's
decisions into its own core, opens an epoch, and applies each decision before it writes it. At the end it removes its
nodes and steps down, so that a planner can take over. It rejects a region that already has a leader.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Self

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.errors import ConfigError
from bus.messages import (
    Admitted,
    Change,
    Decision,
    Ended,
    EpochOpened,
    InputSource,
    NodeJoined,
    NodeLost,
    Placed,
    PlannerHeartbeat,
    PlannerLeft,
    SeedInput,
    Start,
    TaskCompleted,
    TaskFailed,
    TaskState,
    TaskSubmitted,
)
from bus.port import Bus
from bus.topics import Partitions
from bus.values import Execution, Kind, ModelProfile, Objective, Parts, Placement, Role
from loadgen.replay.readiness import require_unled
from planner.core.core import PlannerCore
from stages.devices.device import Device
from stages.hops.hop import hop_of
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import Runner

TIMEOUT_S = 120.0
LEASE_S = 30.0


class Staged:
    """The three stages and their director; they run inside `async with`.

    `runners` has one runner per role, and `profile` describes the model that all of them run. Tasks are cut after layers
    `cuts[0]` and `cuts[1]` and are granted `rates_bps` on link 1 and link 2.
    """

    _made = 0

    def __init__(
        self,
        make_bus: Callable[[str], Bus],
        runners: Mapping[Role, Runner],
        profile: ModelProfile,
        *,
        cuts: tuple[int, int],
        rates_bps: tuple[int, int],
    ) -> None:
        Staged._made += 1
        self._mark = f"bench-{os.getpid()}-{Staged._made}"
        self.device, self.edge, self.cloud = (f"{self._mark}-{letter}" for letter in "dec")
        self._make_bus = make_bus
        self._runners = runners
        self._profile = profile
        self._cuts = cuts
        self._rates_bps = rates_bps
        self._tasks = 0
        self._core = PlannerCore(0)
        self._begun_s = 0.0
        self._inputs: dict[str, int] = {}
        self._nodes: list[Node] = []
        self._stack = AsyncExitStack()
        self._serving: list[asyncio.Task[None]] = []
        self._speaking: list[asyncio.Task[None]] = []
        self._epoch = 0  # 0 until the director opens its epoch

    async def __aenter__(self) -> Self:
        """Start all. Raises `ConfigError` if region 0 has a planner, and the error of a stage that fails to start."""
        try:
            await self._open()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in (*self._serving, *self._speaking):
            task.cancel()
        await asyncio.gather(*self._serving, *self._speaking, return_exceptions=True)
        try:
            if self._epoch:
                await self._leave()
        finally:
            await self._stack.aclose()

    async def _open(self) -> None:
        self._bus = await self._stack.enter_async_context(self._make_bus("director"))
        await self._bus.create_topics(topics.specs([self.edge], Partitions()))
        await self._lead()
        self._speaking.append(asyncio.create_task(self._show_life(), name="director: heartbeats"))
        for name, role in ((self.device, Role.DEVICE), (self.edge, Role.EDGE), (self.cloud, Role.CLOUD)):
            bus = await self._stack.enter_async_context(self._make_bus(name))
            rates = self._rates_bps if role is Role.EDGE else (0, 0)
            settings = NodeSettings(
                name=name,
                role=role,
                slots=int(role is Role.EDGE),
                link1_capacity_bps=rates[0],
                link2_capacity_bps=rates[1],
            )
            node = Node(bus, settings, self._runners[role])
            work = Device(node) if role is Role.DEVICE else hop_of(node)
            self._serving.append(asyncio.create_task(node.run(work), name=name))
            self._nodes.append(node)
        async with asyncio.timeout(TIMEOUT_S):
            while not all(node.status.ready for node in self._nodes):
                for task in self._serving:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.02)
        await self._decide(*(NodeJoined(node=node.announcement()) for node in self._nodes))

    async def _lead(self) -> None:
        """Replay the region's decisions and open an epoch. Raises `ConfigError` if a planner leads."""
        log = DecisionLog()
        reader = await self._bus.reader([(topics.DECISIONS, 0)], start="start")
        try:
            while await reader.lag():
                for record in await reader.fetch(timeout_s=0.2):
                    message = log.read(record)
                    if isinstance(message, Decision):
                        self._core.fold(message)
                        self._inputs = message.inputs
        finally:
            await reader.close()
        require_unled(log, 0)
        if (await self._bus.end_offsets(topics.TASKS))[0] > self._inputs.get(topics.TASKS, 0):
            raise ConfigError("tasks wait in region 0 of this broker for a planner", remedy="start it: deepar planner")
        self._seq, self._begun_s = log.seq, max(0.0, self._core.now_s)
        self._epoch = log.epoch + 1
        opened = EpochOpened(region=0, epoch=self._epoch, nonce=self._mark, planner="bench", lease_s=LEASE_S)
        await self._write(opened)

    async def _show_life(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 5)
            await self._write(PlannerHeartbeat(region=0, epoch=self._epoch, nonce=self._mark))

    async def _leave(self) -> None:
        """End running tasks and remove the nodes with published decisions, so the next planner finds an empty region."""
        for node in self._nodes:
            await node.leave()
        ended = [self._ended(task.placed, TaskState.FAILED) for task in self._core.tasks.values() if task.placed]
        gone = [
            NodeLost(node=node.settings.name, incarnation=node.incarnation, cause="left")
            for node in self._nodes
            if node.settings.name in self._core.nodes
        ]
        if ended or gone:
            await self._decide(*ended, *gone)
        await self._write(PlannerLeft(region=0, epoch=self._epoch, nonce=self._mark))

    async def play(self, samples: int, execution: Execution, source: InputSource | None = None) -> float:
        """Run one task and return the seconds from its start to its last result, on the device's clock.

        Raises RuntimeError with the stage's message if the task fails, and TimeoutError if it does not end.
        """
        self._tasks += 1
        task = TaskSubmitted(
            task_id=f"{self.device}-{self._tasks}",
            device=self.device,
            model=self._profile.model,
            samples=samples,
            input=source or SeedInput(seed=self._tasks),
        )
        events = await self._bus.reader([(topics.EVENTS, 0)], start="end")
        try:
            placed = self._placed(task, execution)
            start = Start(task_id=task.task_id, attempt=1, device=self.device, at_s=placed.start_s)
            await self._decide(Admitted(task=task), placed, start)
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    for record in await events.fetch():
                        event = messages.decode(topics.EVENTS, record.value)
                        if isinstance(event, TaskFailed) and event.task_id == task.task_id:
                            raise RuntimeError(f"{event.node}: {event.cause}: {event.detail}")
                        if isinstance(event, TaskCompleted) and event.task_id == task.task_id:
                            await self._decide(self._ended(placed))
                            return event.delay_s
        finally:
            await events.close()

    def _placed(self, task: TaskSubmitted, execution: Execution) -> Placed:
        names = ("input", *self._profile.layer_names)
        cut1, cut2 = self._cuts
        placement = Placement(
            kind=Kind.DEVICE_EDGE_CLOUD,
            edge=self.edge,
            cut1=cut1,
            cut2=cut2,
            cut1_name=names[cut1],
            cut2_name=names[cut2],
            link1_bps=self._rates_bps[0],
            link2_bps=self._rates_bps[1],
        )
        return Placed(
            task_id=task.task_id,
            attempt=1,
            device=self.device,
            model=task.model,
            sha256=self._profile.sha256,
            samples=task.samples,
            policy="bench",
            objective=Objective.PIPELINED,
            execution=execution,
            placement=placement,
            start_s=self._core.now_s,
            wait_s=0.0,
            delay_s=0.0,
            parts=Parts(),
        )

    def _ended(self, placed: Placed, state: TaskState = TaskState.COMPLETED) -> Ended:
        return Ended(
            task_id=placed.task_id,
            attempt=1,
            state=state,
            cause="" if state is TaskState.COMPLETED else "cancelled",
            edge=self.edge,
            released_slots=1,
            released_link1_bps=placed.placement.link1_bps,
            released_link2_bps=placed.placement.link2_bps,
        )

    async def _decide(self, *changes: Change) -> None:
        self._seq += 1
        now_s = self._begun_s
        for change in changes:
            self._core.apply(change, now_s)
        self._core.settled(now_s)
        await self._write(
            Decision(
                region=0,
                epoch=self._epoch,
                nonce=self._mark,
                seq=self._seq,
                now_s=now_s,
                inputs=self._inputs,
                changes=changes,
                ledger_hash=self._core.state_hash,
            )
        )

    async def _write(self, message: messages.Message) -> None:
        await self._bus.send(topics.DECISIONS, messages.encode(message), key="0", partition=0)

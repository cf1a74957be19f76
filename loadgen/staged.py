"""A device, an edge and a cloud with a director in the planner's place: streams whose placement is fixed, for benchmarks.

The stages are the real shells on a real bus. The director opens an epoch of its own in region 0 and writes decisions there,
so on Kafka the broker must be its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Self

from bus import messages, topics
from bus.messages import (
    Admitted,
    Change,
    Decision,
    Ended,
    EpochOpened,
    InputSource,
    Placed,
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
from loadgen.replay import open_decisions
from stages.device import Device, ResultSink
from stages.hop import Hop
from stages.node import Node, NodeSettings
from stages.runner import Runner

TIMEOUT_S = 120.0


class Staged:
    """The three stages and their director, from `async with` on.

    `runners` has one for each role, `profile` is the model's that they all run; tasks are cut after layers `cuts[0]` and
    `cuts[1]` and granted `rates_bps` on link 1 and link 2. `on_result` sees every result at the device.
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
        on_result: ResultSink | None = None,
    ) -> None:
        Staged._made += 1
        self._mark = f"bench-{os.getpid()}-{Staged._made}"
        self.device, self.edge, self.cloud = (f"{self._mark}-{letter}" for letter in "dec")
        self._make_bus = make_bus
        self._runners = runners
        self._profile = profile
        self._cuts = cuts
        self._rates_bps = rates_bps
        self._on_result = on_result
        self._tasks = 0
        self._stack = AsyncExitStack()
        self._serving: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._bus = await self._stack.enter_async_context(self._make_bus("director"))
        await self._bus.create_topics(topics.specs([self.edge], Partitions()))
        log, reader = await open_decisions(self._bus, 0)
        await reader.close()
        self._epoch, self._seq = log.epoch + 1, log.seq
        opened = EpochOpened(region=0, epoch=self._epoch, nonce=self._mark, planner="bench", lease_s=3600.0)
        await self._bus.send(topics.DECISIONS, messages.encode(opened), key="0", partition=0)
        nodes = []
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
            work = Device(node, self._on_result) if role is Role.DEVICE else Hop(node)
            self._serving.append(asyncio.create_task(node.run(work), name=name))
            nodes.append(node)
        async with asyncio.timeout(TIMEOUT_S):
            while not all(node.status.ready for node in nodes):
                await asyncio.sleep(0.02)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._stack.aclose()

    async def play(self, samples: int, execution: Execution, source: InputSource | None = None) -> float:
        """Run one task; seconds from its start to its last result, the device's clock.

        Raises RuntimeError with what a stage says when the task fails, TimeoutError when nothing ends it.
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
            start = Start(task_id=task.task_id, attempt=1, device=self.device, at_s=0.0)
            await self._decide(Admitted(task=task), self._placed(task, execution), start)
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    for record in await events.fetch():
                        event = messages.decode(topics.EVENTS, record.value)
                        if isinstance(event, TaskFailed) and event.task_id == task.task_id:
                            raise RuntimeError(f"{event.node}: {event.cause}: {event.detail}")
                        if isinstance(event, TaskCompleted) and event.task_id == task.task_id:
                            await self._decide(Ended(task_id=task.task_id, attempt=1, state=TaskState.COMPLETED))
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
            start_s=0.0,
            wait_s=0.0,
            delay_s=0.0,
            parts=Parts(),
        )

    async def _decide(self, *changes: Change) -> None:
        self._seq += 1
        decision = Decision(
            region=0,
            epoch=self._epoch,
            nonce=self._mark,
            seq=self._seq,
            now_s=0.0,
            inputs={},
            changes=changes,
            ledger_hash="bench",
        )
        await self._bus.send(topics.DECISIONS, messages.encode(decision), key="0", partition=0)

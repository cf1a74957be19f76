"""Simulated region: planners and stages as virtual-time processes that can be killed, restarted and inspected."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bus import topics
from bus.decisions import DecisionLog
from bus.errors import BusError
from bus.memory.bus import MemoryBus
from bus.messages import Change, Decision
from bus.values import BatchSpeed, CodecProfile, ModelProfile, Role
from loadgen.sim.process import Process
from loadgen.sim.programs import REAL, Programs
from planner.service.service import PlannerService, Standing
from stages.devices.attempt import ResultSink
from stages.devices.device import Device
from stages.hops.hop import Hop
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import Runner

MODEL = "toy"
"""The model that all tasks of a simulated region run."""


def toy_profile(
    platform: str,
    layer_s: Iterable[float],
    cut_bytes: tuple[int, ...],
    codecs: tuple[CodecProfile, ...] | None = None,
    batch: tuple[BatchSpeed, ...] | None = None,
) -> ModelProfile:
    """Profile of the three-layer toy model on a platform: time per layer, bytes at each of the four cuts, codecs, batches."""
    return ModelProfile(
        model=MODEL,
        sha256="0" * 64,
        platform=platform,
        layer_names=("conv", "pool", "dense"),
        layer_s=tuple(layer_s),
        cut_bytes=cut_bytes,
        codecs=codecs,
        batch=batch,
    )


@dataclass(slots=True, kw_only=True)
class VirtualStage:
    """A node: its settings and its current shell. After a kill it keeps the dead shell for inspection."""

    settings: NodeSettings
    make_runner: Callable[[], Runner]
    on_result: ResultSink | None = None  # device only: receives each result
    kept: Callable[[str], Iterable[int]] = (
        lambda task_id: ()
    )  # device only: samples of a task that were already delivered
    application: Callable[[Device], Coroutine[Any, Any, None]] | None = None  # device only: runs in its process
    drain_s: float | None = None  # maximum wait for work in flight on SIGTERM
    programs: Programs = REAL
    node: Node | None = None
    work: Device | Hop | None = None
    _dead: Counter[str] = field(default_factory=Counter)  # counters of earlier processes

    async def serve(self, bus: MemoryBus) -> None:
        """Run a new process of the node."""
        if self.node is not None:
            self._dead.update(self.node.status.counters)
        node = self.node = self.programs.node(bus, self.settings, self.make_runner())
        if self.settings.role is Role.DEVICE:
            self.work = self.programs.device(node, self.on_result, kept=self.kept)
        else:
            self.work = self.programs.hop(node)
        async with asyncio.TaskGroup() as group:
            if self.application is not None and isinstance(self.work, Device):
                group.create_task(self.application(self.work), name=f"{self.settings.name}: application")
            await node.run(self.work)

    async def leave(self) -> None:
        """Drain and leave the region, as on SIGTERM."""
        if self.work is None or self.node is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.drain_s):
                await self.node.drain()
                await self.work.drain()
        await self.node.leave()

    @property
    def joined(self) -> bool:
        """Whether its latest process has joined the region."""
        return self.node is not None and self.node.status.joined

    def counted(self) -> Counter[str]:
        """Counters summed over all its processes, including dead ones."""
        return self._dead + Counter(self.node.status.counters if self.node is not None else ())


class VirtualRegion:
    """The processes of a region, in the order in which they were added."""

    def __init__(self, connect: Callable[[str], MemoryBus]) -> None:
        self.processes: dict[str, Process] = {}
        self.planners: dict[str, PlannerService] = {}  # latest instance started under each name
        self.stages: dict[str, VirtualStage] = {}
        self._connect = connect

    def add_planner(self, name: str, make: Callable[[MemoryBus], PlannerService]) -> None:
        """Add a planner; `make` builds a new service at every start of its process."""

        async def serve(bus: MemoryBus) -> None:
            service = self.planners[name] = make(bus)
            await service.run()

        self.processes[name] = Process(name, partial(self._connect, name), serve)

    def add_stage(self, stage: VirtualStage) -> None:
        """Add a device, an edge or a cloud worker."""
        name = stage.settings.name
        self.stages[name] = stage
        self.processes[name] = Process(name, partial(self._connect, name), stage.serve, leave=stage.leave)

    def leader(self) -> PlannerService | None:
        """The running planner with the highest epoch, which leads; None if no planner leads."""
        leading = [
            service
            for name, service in self.planners.items()
            if service.standing is Standing.LEADING and not self.processes[name].dead
        ]
        return max(leading, key=lambda service: service.context.decision_log.epoch, default=None)

    def works(self) -> list[Device | Hop]:
        """The work objects of the running stages."""
        return [
            stage.work
            for name, stage in self.stages.items()
            if stage.work is not None and not self.processes[name].dead
        ]

    async def end(self) -> None:
        """Kill all processes and wait until their tasks have ended."""
        for process in self.processes.values():
            process.crash()
        await asyncio.sleep(0.1)


async def decided(bus: MemoryBus) -> AsyncIterator[Change]:
    """Endless stream of the valid changes of a region, from its first decision on."""
    log = DecisionLog()
    reader = await bus.reader([(topics.DECISIONS, 0)], start="start")
    while True:
        try:
            records = await reader.fetch()
        except BusError:
            continue
        for record in records:
            message = log.read(record)
            if isinstance(message, Decision):
                for change in message.changes:
                    yield change

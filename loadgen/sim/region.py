"""A region in virtual time whose planners and stages are processes that can be killed, started and asked what they hold."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from bus import topics
from bus.decisions import DecisionLog
from bus.errors import BusError
from bus.memory.bus import MemoryBus
from bus.messages import Change, Decision
from bus.values import ModelProfile, Role
from loadgen.sim.process import Process
from planner.service.service import PlannerService, Standing
from stages.device import Device, ResultSink
from stages.hop import Hop
from stages.node import Node, NodeSettings
from stages.runner import Runner

MODEL = "toy"
"""What every task of such a region runs."""


def toy_profile(platform: str, layer_s: Iterable[float], cut_bytes: tuple[int, ...]) -> ModelProfile:
    """How fast a platform runs the toy's three layers, and what crosses its four positions."""
    return ModelProfile(
        model=MODEL,
        sha256="0" * 64,
        platform=platform,
        layer_names=("conv", "pool", "dense"),
        layer_s=tuple(layer_s),
        cut_bytes=cut_bytes,
    )


@dataclass(slots=True, kw_only=True)
class Stage:
    """A node by its settings, and what runs of it at the moment; after a kill that is what died."""

    settings: NodeSettings
    make_runner: Callable[[], Runner]
    on_result: ResultSink | None = None  # of a device
    kept: Callable[[str], Iterable[int]] = lambda task_id: ()  # of a device: samples of a task that were shown already
    drain_s: float | None = None  # a polite stop waits at most so long for what is under way
    node: Node | None = None
    work: Device | Hop | None = None
    _dead: Counter[str] = field(default_factory=Counter)  # what earlier processes counted

    async def serve(self, bus: MemoryBus) -> None:
        """Run a fresh process of it."""
        if self.node is not None:
            self._dead.update(self.node.status.counters)
        node = self.node = Node(bus, self.settings, self.make_runner())
        if self.settings.role is Role.DEVICE:
            self.work = Device(node, self.on_result, kept=self.kept)
        else:
            self.work = Hop(node)
        await node.run(self.work)

    async def leave(self) -> None:
        """What it does on SIGTERM."""
        if self.work is None or self.node is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.drain_s):
                await self.node.drain()
                await self.work.drain()
        await self.node.leave()

    @property
    def joined(self) -> bool:
        """Whether its last process was part of the region."""
        return self.node is not None and self.node.status.joined

    def counted(self) -> Counter[str]:
        """What its processes counted, the dead ones too."""
        return self._dead + Counter(self.node.status.counters if self.node is not None else ())


class VirtualRegion:
    """Its processes, in the order in which they were added."""

    def __init__(self, connect: Callable[[str], MemoryBus]) -> None:
        self.processes: dict[str, Process] = {}
        self.planners: dict[str, PlannerService] = {}  # the last that was started under each name
        self.stages: dict[str, Stage] = {}
        self._connect = connect

    def add_planner(self, name: str, make: Callable[[MemoryBus], PlannerService]) -> None:
        """A planner, made anew whenever its process starts."""

        async def serve(bus: MemoryBus) -> None:
            service = self.planners[name] = make(bus)
            await service.run()

        self.processes[name] = Process(name, partial(self._connect, name), serve)

    def add_stage(self, stage: Stage) -> None:
        """A device, an edge or a cloud worker."""
        name = stage.settings.name
        self.stages[name] = stage
        self.processes[name] = Process(name, partial(self._connect, name), stage.serve, leave=stage.leave)

    def leader(self) -> PlannerService | None:
        """Who leads: of the living, the one with the highest epoch."""
        leading = [
            service
            for name, service in self.planners.items()
            if service.standing is Standing.LEADING and not self.processes[name].dead
        ]
        return max(leading, key=lambda service: service.decision_log.epoch, default=None)

    def works(self) -> list[Device | Hop]:
        """What the living stages do."""
        return [
            stage.work
            for name, stage in self.stages.items()
            if stage.work is not None and not self.processes[name].dead
        ]

    async def end(self) -> None:
        """Kill everybody, and let their tasks end."""
        for process in self.processes.values():
            process.crash()
        await asyncio.sleep(0.1)


async def decided(bus: MemoryBus) -> AsyncIterator[Change]:
    """Every change that counts, from the region's first decision on; for ever."""
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

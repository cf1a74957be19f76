"""`deepar simulate soak`: a day of arrivals and churn in virtual time, and whether anything grows.

The real planner service and the real stages on `MemoryBus`, with modelled machines. Tasks arrive all day; now and then a
node or a planner is killed or leaves, or a visitor joins for a while. Memory, open files and tasks in memory are looked at in
regular intervals. After a warm-up, in which caches of a fixed size fill, the second half of the rest must not be above the
first.

The broker of the soak keeps a fixed number of bytes of every topic, as a broker's retention would, so that what is measured
is the services' memory. A second, short run has a cloud that is many times slower than it says.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.errors import BusError
from bus.frames import Plan
from bus.memory import MemoryBroker, MemoryBus
from bus.messages import Decision, Ended, SeedInput, TaskSubmitted
from bus.topics import Partitions
from bus.values import Execution, ModelProfile, Objective, Role
from loadgen.chaos_process import Process, quiet, task_factory
from loadgen.virtual_loop import run_virtual
from planner.core import PlannerCore
from planner.service import PlannerService, Standing
from stages.device import Device
from stages.hop import Hop
from stages.node import Node, NodeSettings
from stages.runner import ModelledRunner, Station

MODEL = "toy"
CUT_BYTES = (40_000, 60_000, 10_000, 400)
LAYER_S = (0.100, 0.010, 0.080)
SPEED = {Role.DEVICE: 4.0, Role.EDGE: 2.0, Role.CLOUD: 1.0}
WARM_UP = 0.25
"""This share of the samples comes before caches are full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakScenario:
    """The region, and how long."""

    hours: float = 24.0
    seed: int = 0
    devices: int = 3
    edges: int = 2  # one more comes and goes
    clouds: int = 2
    planners: int = 2
    task_every_s: float = 6.0  # on average
    samples: tuple[int, int] = (1, 6)
    churn_every_s: float = 300.0  # on average
    looks: int = 144  # how often memory is looked at
    lease_s: float = 10.0

    @property
    def remember(self) -> int:
        """Ended tasks that planner and nodes remember: few enough for the warm-up to reach it."""
        return max(10, min(10_000, int(self.hours * 3600 / self.task_every_s * WARM_UP / 2)))

    @property
    def keep_bytes(self) -> int:
        """What the broker keeps of a partition, once it is read: it is full before the warm-up is over."""
        return max(128 << 10, min(1 << 20, int(self.hours * (128 << 10))))

    @property
    def snapshot_every(self) -> int:
        """Decisions from one snapshot to the next: several of them fit what the broker keeps."""
        return self.keep_bytes // 4096


@dataclass(frozen=True, slots=True)
class Look:
    """What was in memory at one moment."""

    hour: float
    rss_bytes: int  # of the whole process
    python_blocks: int  # pieces of memory that Python has given out
    open_files: int
    coroutines: int  # asyncio tasks
    live_tasks: int  # tasks that the leader has not ended
    stage_tasks: int  # tasks that devices hold, and flows of edges and clouds
    open_records: int  # records whose offsets are held, and frames without a plan
    broker_bytes: int  # what the broker keeps of all topics


ALLOWED: dict[str, tuple[float, float]] = {
    "rss_bytes": (0.05, 1 << 20),
    "python_blocks": (0.03, 2_000),
    "open_files": (0.0, 0.5),
    "coroutines": (0.10, 10.0),
    "live_tasks": (0.25, 2.0),
    "stage_tasks": (0.25, 2.0),
    "open_records": (0.25, 3.0),
    "broker_bytes": (0.10, 1 << 20),
}
"""How far the mean of the second half may be above that of the first: a share of it, and an amount."""


@dataclass(slots=True)
class SoakResult:
    """What one soak saw."""

    scenario: SoakScenario
    looks: list[Look] = field(default_factory=list)
    churn: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    submitted: int = 0
    unended: int = 0
    crashes: list[str] = field(default_factory=list)  # processes that died of an error

    def verdict(self) -> list[dict[str, Any]]:
        """For each measure the means of both halves after the warm-up, what is allowed, and whether it is flat."""
        rest = self.looks[int(len(self.looks) * WARM_UP) :]
        half = len(rest) // 2
        rows = []
        for name, (share, amount) in ALLOWED.items():
            first = sum(getattr(look, name) for look in rest[:half]) / max(1, half)
            second = sum(getattr(look, name) for look in rest[half:]) / max(1, len(rest) - half)
            allowed = first * (1.0 + share) + amount
            rows.append(
                {"measure": name, "first": first, "second": second, "allowed": allowed, "flat": second <= allowed}
            )
        return rows

    @property
    def flat(self) -> bool:
        """Whether nothing grew, and every task ended."""
        return all(row["flat"] for row in self.verdict()) and not self.unended and not self.crashes


def soak(scenario: SoakScenario, *, progress: Callable[[float, float], None] | None = None) -> SoakResult:
    """Run it; `progress` is told the hours done and in all."""
    with quiet():
        return run_virtual(_Soak(scenario, progress).play(), horizon_s=scenario.hours * 3600 + 7200)


def profile(role: Role) -> ModelProfile:
    """How fast a node says that it runs the model."""
    return ModelProfile(
        model=MODEL,
        sha256="0" * 64,
        platform=role.value,
        layer_names=("conv", "pool", "dense"),
        layer_s=tuple(seconds * SPEED[role] for seconds in LAYER_S),
        cut_bytes=CUT_BYTES,
    )


class SlowRunner(ModelledRunner):
    """A machine that is `factor` times slower than it says."""

    def __init__(self, said: ModelProfile, factor: float) -> None:
        super().__init__([said])
        slow = said.model_copy(update={"layer_s": tuple(seconds * factor for seconds in said.layer_s)})
        self._real = ModelledRunner([slow])

    def station(self, plan: Plan, first: int, last: int) -> Station:
        """A place that takes its time."""
        return self._real.station(plan, first, last)


class Region:
    """Processes that can be killed, started and asked what they hold."""

    def __init__(self, scenario: SoakScenario, *, cloud_factor: float = 1.0) -> None:
        self.scenario = scenario
        self.cloud_factor = cloud_factor
        self.broker = MemoryBroker(
            latency_s=0.001,
            keep_control_bytes=scenario.keep_bytes,
            keep_consumed_bytes=scenario.keep_bytes,
            session_timeout_s=3.0,
        )
        self.planners: dict[str, PlannerService] = {}
        self.works: dict[str, Device | Hop] = {}
        self.nodes: dict[str, Node] = {}
        self.edges = [f"e{index + 1}" for index in range(scenario.edges + 1)]  # the last is a visitor
        self.visitors = {self.edges[-1]}
        self.processes: dict[str, Process] = {}
        names = [f"planner{index + 1}" for index in range(scenario.planners)]
        for name in names:
            self._add(name, partial(self._serve_planner, name), None)
        for role, count in (
            (Role.CLOUD, scenario.clouds),
            (Role.EDGE, len(self.edges)),
            (Role.DEVICE, scenario.devices),
        ):
            for index in range(count):
                name = f"{role.value[0]}{index + 1}"
                self._add(name, partial(self._serve_node, name, role), partial(self._leave, name))

    def _add(self, name: str, serve: Any, leave: Any) -> None:
        self.processes[name] = Process(name, partial(MemoryBus, self.broker, name), serve, leave=leave)

    def start(self, *, visitors: bool = False) -> None:
        """Everybody but the visitors."""
        for name, process in self.processes.items():
            if visitors or name not in self.visitors:
                process.start()

    @property
    def joined(self) -> bool:
        """Whether all that run are part of the region."""
        running = [name for name, process in self.processes.items() if not process.dead and not name.startswith("p")]
        return all(name in self.nodes and self.nodes[name].status.joined for name in running)

    def leader(self) -> PlannerService | None:
        """Who leads."""
        leading = [
            service
            for name, service in self.planners.items()
            if service.standing is Standing.LEADING and not self.processes[name].dead
        ]
        return max(leading, key=lambda service: service.decision_log.epoch, default=None)

    def running(self, kind: type[Device | Hop]) -> list[Any]:
        """The works of a kind whose processes live."""
        return [work for name, work in self.works.items() if isinstance(work, kind) and not self.processes[name].dead]

    def _make_core(self) -> PlannerCore:
        return PlannerCore(
            0, objective=Objective.PIPELINED, execution=Execution.STREAMING, remember_ended=self.scenario.remember
        )

    async def _serve_planner(self, name: str, bus: MemoryBus) -> None:
        service = self.planners[name] = PlannerService(
            bus, self._make_core, name=name, snapshot_every=self.scenario.snapshot_every
        )
        await service.run()

    async def _serve_node(self, name: str, role: Role, bus: MemoryBus) -> None:
        is_edge = role is Role.EDGE
        settings = NodeSettings(
            name=name,
            role=role,
            lease_s=self.scenario.lease_s,
            slots=2 if is_edge else 0,
            link1_capacity_bps=100_000_000 if is_edge else 0,
            link2_capacity_bps=20_000_000 if is_edge else 0,
            remembered_ends=self.scenario.remember,
        )
        said = profile(role)
        runner = SlowRunner(said, self.cloud_factor) if role is Role.CLOUD else ModelledRunner([said])
        node = self.nodes[name] = Node(bus, settings, runner)
        work = self.works[name] = Device(node) if role is Role.DEVICE else Hop(node)
        await node.run(work)

    async def _leave(self, name: str) -> None:
        if name in self.works:
            await self.nodes[name].drain()
            await self.works[name].drain()
            await self.nodes[name].leave()


class _Soak:
    def __init__(self, scenario: SoakScenario, progress: Callable[[float, float], None] | None) -> None:
        self.scenario = scenario
        self.random = random.Random(scenario.seed)
        self.result = SoakResult(scenario)
        self.region = Region(scenario)
        self._progress = progress
        self._open: set[str] = set()  # tasks that have not ended

    async def play(self) -> SoakResult:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(task_factory)
        region, scenario = self.region, self.scenario
        async with MemoryBus(region.broker, "client") as client:
            await client.create_topics(topics.specs(region.edges, Partitions(cloud=3, results=2)))
            counting = loop.create_task(self._count(client))
            region.start()
            while not region.joined:
                await asyncio.sleep(0.1)
            work = [loop.create_task(self._submit(client)), loop.create_task(self._churn())]
            began_s = loop.time()
            for number in range(1, scenario.looks + 1):
                at_s = began_s + number * scenario.hours * 3600 / scenario.looks
                await asyncio.sleep(max(0.0, at_s - loop.time()))
                self.result.looks.append(self._look((loop.time() - began_s) / 3600))
                if self._progress is not None:
                    self._progress(self.result.looks[-1].hour, scenario.hours)
            for task in work:
                task.cancel()
            await asyncio.wait(work)
            region.start()
            until_s = loop.time() + 900.0
            while self._open and loop.time() < until_s:
                await asyncio.sleep(1.0)
            self.result.unended = len(self._open)
            self.result.crashes = [end for process in region.processes.values() for end in process.ends]
            counting.cancel()
            for process in region.processes.values():
                process.crash()
            await asyncio.sleep(0.1)
        return self.result

    async def _submit(self, client: MemoryBus) -> None:
        draw = random.Random(self.scenario.seed + 1)
        while True:
            await asyncio.sleep(draw.expovariate(1.0 / self.scenario.task_every_s))
            task = TaskSubmitted(
                task_id=f"t{self.result.submitted}",
                device=f"d{draw.randrange(self.scenario.devices) + 1}",
                model=MODEL,
                samples=draw.randint(*self.scenario.samples),
                input=SeedInput(seed=self.result.submitted),
            )
            self._open.add(task.task_id)
            self.result.submitted += 1
            await client.send(topics.TASKS, messages.encode(task), key=task.task_id, partition=0)

    async def _churn(self) -> None:
        """Somebody is killed, leaves, or comes; whoever is gone is back within a minute or two."""
        draw, loop = self.random, asyncio.get_running_loop()
        region = self.region
        while True:
            await asyncio.sleep(draw.expovariate(1.0 / self.scenario.churn_every_s))
            process = region.processes[draw.choice(list(region.processes))]
            if process.name in region.visitors:
                self.result.churn["join" if process.dead else "leave"] += 1
                if process.dead:
                    process.start()
                else:
                    await process.stop()
                continue
            if process.dead:
                continue
            role = "planner" if process.name.startswith("p") else "node"
            if draw.random() < 0.5:
                self.result.churn[f"kill {role}"] += 1
                process.crash()
            else:
                self.result.churn[f"restart {role}"] += 1
                await process.stop()
            loop.call_later(draw.uniform(1.0, 90.0), process.start)

    async def _count(self, client: MemoryBus) -> None:
        log = DecisionLog()
        reader = await client.reader([(topics.DECISIONS, 0)], start="start")
        while True:
            try:
                records = await reader.fetch()
            except BusError:
                continue
            for record in records:
                message = log.read(record)
                if isinstance(message, Decision):
                    for change in message.changes:
                        if isinstance(change, Ended):
                            self.result.states[str(change.state)] += 1
                            self._open.discard(change.task_id)

    def _look(self, hour: float) -> Look:
        gc.collect()
        region = self.region
        leader = region.leader()
        devices, hops = region.running(Device), region.running(Hop)
        return Look(
            hour=hour,
            rss_bytes=_rss_bytes(),
            python_blocks=sys.getallocatedblocks(),
            open_files=_open_files(),
            coroutines=len(asyncio.all_tasks()),
            live_tasks=leader.core.live_tasks if leader is not None else 0,
            stage_tasks=sum(len(device.tasks) for device in devices) + sum(len(hop.flows) for hop in hops),
            open_records=sum(hop.open_records for hop in hops),
            broker_bytes=region.broker.bytes_held(),
        )


def _rss_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0

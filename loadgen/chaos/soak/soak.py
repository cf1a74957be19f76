"""Soak test (`deepar simulate soak`): a day of arrivals and churn in virtual time, checked for resource growth.

The real planner service and stages run on `MemoryBus` with modelled machines. Tasks arrive all day; nodes and planners
are killed or leave at intervals, and a temporary edge joins. Memory, open files and tasks in memory are sampled at
regular intervals. After a warm-up that fills the fixed-size caches, the second half must not exceed the first.

The soak's broker keeps a fixed number of bytes per topic, like a broker's retention, so the measurement covers the
services' memory. A second, short run uses a cloud many times slower than its profile.
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
from pathlib import Path
from typing import Any

from bus import messages, topics
from bus.memory.bus import MemoryBus
from bus.messages import Ended, SeedInput, TaskSubmitted
from bus.topics import Partitions
from loadgen.chaos.soak.soak_region import WARM_UP, SoakRegion, SoakScenario
from loadgen.sim.process import quiet, task_factory
from loadgen.sim.programs import REAL, Programs
from loadgen.sim.region import MODEL, decided
from loadgen.sim.virtual_loop import run_virtual
from stages.devices.device import Device
from stages.hops.hop import Hop


@dataclass(frozen=True, slots=True)
class Look:
    """Resource usage at one moment."""

    hour: float
    rss_bytes: int  # of the whole process
    python_blocks: int  # memory blocks that Python has allocated
    open_files: int
    coroutines: int  # asyncio tasks
    live_tasks: int  # tasks that the leader has not ended
    stage_tasks: int  # tasks that devices hold, and flows of edges and clouds
    open_records: int  # records whose offsets are held, and frames without a plan
    broker_bytes: int  # size of the records that the broker retains


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
"""Allowed excess of the second half's mean over the first half's: a relative and an absolute tolerance."""


@dataclass(slots=True)
class SoakResult:
    """Measurements of one soak."""

    scenario: SoakScenario
    looks: list[Look] = field(default_factory=list)
    churn: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    submitted: int = 0
    unended: int = 0
    crashes: list[str] = field(default_factory=list)  # processes that ended with an error

    def verdict(self) -> list[dict[str, Any]]:
        """For each measure: the means of both halves after the warm-up, the allowed second mean, and whether it is flat."""
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


def soak(
    scenario: SoakScenario, *, progress: Callable[[float, float], None] | None = None, programs: Programs = REAL
) -> SoakResult:
    """Run the soak test; `progress` receives the hours done and the hours in total."""
    with quiet():
        return run_virtual(_Soak(scenario, progress, programs).play(), horizon_s=scenario.hours * 3600 + 7200)


class _Soak:
    def __init__(
        self, scenario: SoakScenario, progress: Callable[[float, float], None] | None, programs: Programs
    ) -> None:
        self.scenario = scenario
        self.random = random.Random(scenario.seed)
        self.result = SoakResult(scenario)
        self.region = SoakRegion(scenario, programs=programs)
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
            await region.all_joined()
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
            await region.end()
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
        """Kill, stop or add processes at random; stopped processes return within a minute or two."""
        draw, loop = self.random, asyncio.get_running_loop()
        region = self.region
        while True:
            await asyncio.sleep(draw.expovariate(1.0 / self.scenario.churn_every_s))
            process = region.processes[draw.choice(list(region.processes))]
            if process.name == region.visitor:
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
        async for change in decided(client):
            if isinstance(change, Ended):
                self.result.states[str(change.state)] += 1
                self._open.discard(change.task_id)

    def _look(self, hour: float) -> Look:
        gc.collect()
        region = self.region
        leader = region.leader()
        works = region.works()
        devices = [work for work in works if isinstance(work, Device)]
        hops = [work for work in works if isinstance(work, Hop)]
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
    """Resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0

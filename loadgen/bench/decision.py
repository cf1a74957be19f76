"""Decision benchmark (`deepar loadgen bench decision`): time from a task's submission until a device reads its decision.

A real planner serves a region whose nodes are announced but not run. Tasks arrive at a constant rate, and each is
reported complete as soon as its start is read, so the load stays constant. Planner and generator share this process;
the measured time includes both and the bus trips of task and decision.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from time import perf_counter  # uvloop's clock counts whole milliseconds
from typing import Any, Literal

import uvloop

from bus import messages, topics
from bus.decisions import DecisionLog
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import (
    Admitted,
    Decision,
    NodeAnnounced,
    NodeJoined,
    NodeLeft,
    NodeLost,
    SeedInput,
    Start,
    TaskCompleted,
    TaskSubmitted,
)
from bus.port import Bus, Reader
from bus.topics import Partitions
from bus.values import ModelProfile, Parts, Role
from loadgen.bench.cpu_load import BusynessWatch
from loadgen.replay.readiness import decisions_from_now, require_unled
from planner.core.core import PlannerCore
from planner.service.region_context import PlannerSettings
from planner.service.service import PlannerService

Progress = Callable[[str], None]

RATE_PER_S = 100.0
TASKS = 1_500
DROPPED = 300
"""Number of first tasks that warm up the broker and are excluded."""

DEVICES, EDGES = 20, 4
P50_AIM_S, P99_AIM_S = 0.005, 0.010
_LEASE_S = 3_600.0
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class DecisionBenchSizes:
    """Amount of work to measure; tests use smaller values."""

    tasks: int = TASKS
    dropped: int = DROPPED
    rate_per_s: float = RATE_PER_S


def run(
    bus: Literal["memory", "kafka"] = "kafka",
    bootstrap: str | None = None,
    *,
    seed: int = 1,
    sizes: DecisionBenchSizes | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure on uvloop and return the object that docs/json.md describes, with `busyness` added.

    The benchmark leads the last region of the existing topics. Raises `ConfigError` if another planner leads that region,
    and `BusError` if no broker answers.
    """
    connection = KafkaConnection.from_env(bootstrap_servers=bootstrap) if bus == "kafka" else None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(
            _measure(bus, connection, sizes or DecisionBenchSizes(), seed, progress or (lambda line: None))
        )


async def _measure(
    name: str, connection: KafkaConnection | None, sizes: DecisionBenchSizes, seed: int, progress: Progress
) -> dict[str, Any]:
    broker = MemoryBroker()
    watch = BusynessWatch()
    async with AsyncExitStack() as stack:

        async def connect(client: str) -> Bus:
            made: Bus = MemoryBus(broker, client) if connection is None else KafkaBus(connection)
            return await stack.enter_async_context(made)

        generator = await connect("generator")
        await generator.create_topics(topics.specs([], Partitions()))
        region = await generator.partitions(topics.DECISIONS) - 1
        log, reader = await decisions_from_now(generator, region)
        await reader.close()
        require_unled(log, region)
        service = PlannerService(await connect("planner"), lambda: PlannerCore(region), PlannerSettings(region=region))
        trial = _Trial(generator, region, sizes, seed)
        async with asyncio.TaskGroup() as group:
            planner = group.create_task(service.run(), name="planner")
            progress("announcing")
            async with asyncio.timeout(_TIMEOUT_S):
                await trial.announce()
                progress(f"{sizes.tasks} tasks at {sizes.rate_per_s:g} per second")
            async with asyncio.timeout(_TIMEOUT_S + sizes.tasks / sizes.rate_per_s), watch:
                await trial.play()
            await trial.leave()
            planner.cancel()
    delays = sorted(trial.delays_s[sizes.dropped :])
    p50_s, p99_s = delays[len(delays) // 2], delays[min(len(delays) * 99 // 100, len(delays) - 1)]
    seen = watch.seen()
    aims = []
    if name == "kafka":
        for text, value, aim in (("p50", p50_s, P50_AIM_S), ("p99", p99_s, P99_AIM_S)):
            aims.append(
                {"name": f"submitted to decided, {text}, seconds", "value": value, "aim": aim, "pass": value <= aim}
            )
    return {
        "bench": "decision",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, uvloop",
        "results": [
            {"bus": name, "rate_per_s": sizes.rate_per_s, "p50_s": p50_s, "p99_s": p99_s, "tasks": len(delays)}
        ],
        "aims": aims,
        "busyness": seen.as_json(),
        "judgeable": not seen.too_busy,
        "note": "the machine was too busy to judge" if seen.too_busy else "",
    }


class _Trial:
    def __init__(self, bus: Bus, region: int, sizes: DecisionBenchSizes, seed: int) -> None:
        self.bus, self.region, self.sizes = bus, region, sizes
        self.delays_s: list[float] = []
        self._mark = f"bench-{os.getpid()}-{seed}"
        self._sent_s: dict[str, float] = {}
        self._nodes: list[str] = []  # a node's name is also its incarnation
        self._log = DecisionLog()
        self._reader: Reader | None = None

    async def announce(self) -> None:
        """Announce the nodes and wait until the planner has accepted them."""
        where = (topics.DECISIONS, self.region)
        self._reader = await self.bus.reader([where], start="start")
        for index in range(DEVICES + EDGES + 1):
            role = Role.CLOUD if index == 0 else Role.EDGE if index <= EDGES else Role.DEVICE
            message = NodeAnnounced(
                node=f"{self._mark}-{index}",
                role=role,
                region=self.region,
                incarnation=f"{self._mark}-{index}",
                lease_s=_LEASE_S,
                slots=4 if role is Role.EDGE else 0,
                link1_capacity_bps=10**9 if role is Role.EDGE else 0,
                link2_capacity_bps=10**9 if role is Role.EDGE else 0,
                models=(_profile(role),),
            )
            self._nodes.append(message.node)
            await self._send(topics.NODES, message, message.node)
        missing = set(self._nodes)
        while missing:
            for decision in await self._decisions():
                missing -= {change.node.node for change in decision.changes if isinstance(change, NodeJoined)}

    async def leave(self) -> None:
        """Let the nodes leave and wait until the planner has read it."""
        async with asyncio.timeout(_TIMEOUT_S):
            for node in (gone := set(self._nodes)):
                await self._send(topics.NODES, NodeLeft(node=node, region=self.region, incarnation=node), node)
            while gone:
                for decision in await self._decisions():
                    gone -= {change.node for change in decision.changes if isinstance(change, NodeLost)}

    async def play(self) -> None:
        """Open loop: each task is sent when it is due."""
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch(), name="decisions")
            begun_s = asyncio.get_running_loop().time()
            for number in range(self.sizes.tasks):
                due_s = begun_s + number / self.sizes.rate_per_s
                await asyncio.sleep(max(0.0, due_s - asyncio.get_running_loop().time()))
                task = TaskSubmitted(
                    task_id=f"{self._mark}-t{number}",
                    device=f"{self._mark}-{1 + EDGES + number % DEVICES}",
                    model="toy",
                    samples=10,
                    input=SeedInput(seed=number),
                )
                self._sent_s[task.task_id] = perf_counter()
                await self._post(topics.TASKS, task, task.task_id)
            await watching

    async def _watch(self) -> None:
        while len(self.delays_s) < self.sizes.tasks:
            for decision in await self._decisions():
                now = perf_counter()
                for change in decision.changes:
                    if isinstance(change, Admitted) and change.task.task_id in self._sent_s:
                        self.delays_s.append(now - self._sent_s.pop(change.task.task_id))
                    elif isinstance(change, Start):
                        done = TaskCompleted(
                            task_id=change.task_id,
                            attempt=change.attempt,
                            node=change.device,
                            measured=Parts(),
                            delay_s=0.0,
                        )
                        await self._post(topics.EVENTS, done, change.task_id)

    async def _decisions(self) -> list[Decision]:
        assert self._reader is not None
        read = [self._log.read(record) for record in await self._reader.fetch()]
        return [message for message in read if isinstance(message, Decision)]

    async def _send(self, topic: str, message: messages.Message, key: str) -> None:
        await self.bus.send(topic, messages.encode(message), key=key, partition=self.region)

    async def _post(self, topic: str, message: messages.Message, key: str) -> None:
        await self.bus.post(topic, messages.encode(message), key=key, partition=self.region)


def _profile(role: Role) -> ModelProfile:
    speed = {Role.DEVICE: 20.0, Role.EDGE: 3.0, Role.CLOUD: 1.0}[role]
    return ModelProfile(
        model="toy",
        sha256="0" * 64,
        platform=role.value,
        layer_names=tuple(f"layer{index}" for index in range(11)),
        layer_s=tuple(speed * 0.001 * (1 + index % 3) for index in range(11)),
        cut_bytes=(600_000, 400_000, 290_000, 190_000, 70_000, 60_000, 50_000, 40_000, 16_000, 16_000, 8_000, 4_000),
    )

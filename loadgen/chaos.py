"""`deepar simulate chaos`: the real shells and the real core on `MemoryBus` in virtual time, with faults.

One seed draws the tasks, the schedule of faults, where exactly a process dies, and what the bus does wrong. First faults,
then everything is healed, and the region must converge: every acknowledged task ends once, every sample shows once with the
right content, the ledger holds at every record, nothing is left behind. A seed that fails is replayed by its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import structlog

from bus import messages, topics
from bus.errors import BusError, DeeparError
from bus.faults import Faults
from bus.frames import Array, Plan
from bus.memory import MemoryBroker, MemoryBus
from bus.messages import SeedInput, TaskSubmitted
from bus.topics import Partitions
from bus.values import Execution, ModelProfile, Objective, Role
from loadgen.chaos_check import Oracle, Violation
from loadgen.chaos_process import Process, task_factory
from loadgen.virtual_loop import run_virtual
from planner.core import PlannerCore
from planner.service import PlannerService, Standing
from stages.device import Device
from stages.hop import Hop
from stages.node import Node, NodeSettings
from stages.runner import ModelledRunner, Station

LEASE_S = 4.0
JOIN_S = 60.0
SETTLE_S = 4.0
"""Virtual seconds after the last end within which nothing of a task may be left anywhere."""

CUT_BYTES = (9_000, 14_000, 1_200, 3_000)
LAYER_S = (0.08, 0.02, 0.06)
SPEED = {Role.DEVICE: 5.0, Role.EDGE: 2.0, Role.CLOUD: 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosScenario:
    """The region that is broken, and how much."""

    devices: int = 2
    edges: int = 2
    clouds: int = 2
    planners: int = 2
    tasks: int = 8
    samples: tuple[int, int] = (2, 24)
    faults_s: float = 20.0  # virtual seconds during which things go wrong
    faults: tuple[int, int] = (5, 12)  # how many
    converge_s: float = 150.0  # virtual seconds after healing within which every task must have ended
    clock_off_s: float | None = None  # how far the wall clock is off; None: drawn


@dataclass(frozen=True, slots=True)
class ChaosRun:
    """What one seed did."""

    seed: int
    virtual_s: float
    faults: Counter[str]  # by kind
    violations: tuple[Violation, ...]
    states: Counter[str]  # how the tasks ended
    retries: int  # attempts beyond the first
    suppressed: int  # duplicates that did not show
    trace: tuple[tuple[Any, ...], ...]  # what happened, in order; the same for the same seed


def run(
    seeds: Sequence[int], *, scenario: ChaosScenario | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Run the seeds; what `deepar simulate chaos --json` prints, and `states`, `retries`, `suppressed_duplicates`."""
    faults: Counter[str] = Counter()
    states: Counter[str] = Counter()
    violations = []
    virtual_s, retries, suppressed = 0.0, 0, 0
    for done, seed in enumerate(seeds, 1):
        found = run_seed(seed, scenario=scenario)
        faults += found.faults
        states += found.states
        virtual_s += found.virtual_s
        retries += found.retries
        suppressed += found.suppressed
        violations += [
            {
                "seed": seed,
                "guarantee": violation.guarantee,
                "what": violation.what,
                "replay": f"deepar simulate chaos --seeds 1 --seed {seed}",
            }
            for violation in found.violations
        ]
        if progress is not None:
            progress(done, len(seeds))
    return {
        "seeds": len(seeds),
        "simulated_hours": virtual_s / 3600.0,
        "faults": dict(sorted(faults.items())),
        "violations": violations,
        "states": dict(sorted(states.items())),
        "retries": retries,
        "suppressed_duplicates": suppressed,
    }


def run_seed(seed: int, *, scenario: ChaosScenario | None = None) -> ChaosRun:
    """One seed, from the first process to the verdict."""
    with _quiet():
        return run_virtual(_Chaos(seed, scenario or ChaosScenario()).play(), horizon_s=3_600.0)


# --- content that can be checked -------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def content(task_id: str, sample: int, position: int) -> Array:
    """What crosses position `position` for a sample: every byte depends on all three, and on where it stands."""
    tag = zlib.crc32(f"{task_id}/{sample}/{position}".encode())
    values = (np.arange(CUT_BYTES[position], dtype=np.uint32) * np.uint32(2654435761) + np.uint32(tag)) >> np.uint32(11)
    array: Array = values.astype(np.uint8)
    array.flags.writeable = False
    return array


class CheckedRunner(ModelledRunner):
    """A modelled machine whose tensors have a content, so that a stage notices when it is given another's."""

    def __init__(self, profile: ModelProfile, chaos: _Chaos, node: str, slots: int) -> None:
        super().__init__([profile])
        self._chaos = chaos
        self._node = node
        self._slots = slots
        self._open = 0

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """The content of position 0."""
        return lambda sample: [content(task.task_id, sample, 0)]

    def station(self, plan: Plan, first: int, last: int) -> Station:
        """A place that checks what it is given, and that no more places are open than the node has slots."""
        self._open += 1
        if self._slots and self._open > self._slots:
            self._chaos.say("G2", f"{self._node} computes {self._open} tasks at once, it has {self._slots} slots")
        return _CheckedStation(super().station(plan, first, last), self, plan.task_id, first, last)

    def closed(self) -> None:
        """A place is free again."""
        self._open -= 1

    def wrong(self, task_id: str, sample: int, position: int) -> None:
        """Something else came than what was sent."""
        self._chaos.say("G5", f"{self._node} was given a wrong content for {task_id}/{sample} at {position}")


class _CheckedStation:
    def __init__(self, inner: Station, runner: CheckedRunner, task_id: str, first: int, last: int) -> None:
        self._inner, self._runner = inner, runner
        self._task_id, self._first, self._last = task_id, first, last

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        if not same(inputs, self._task_id, sample, self._first):
            self._runner.wrong(self._task_id, sample, self._first)
        await self._inner.run(sample, inputs, ready_s)
        return [content(self._task_id, sample, self._last)]

    def close(self) -> None:
        self._inner.close()
        self._runner.closed()


def same(tensors: Sequence[Array], task_id: str, sample: int, position: int) -> bool:
    """Whether these are the tensors of that sample at that position."""
    return len(tensors) == 1 and np.array_equal(tensors[0], content(task_id, sample, position))


# --- one seed --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Stage:
    """A stage's process, and what runs in it at the moment."""

    settings: NodeSettings
    process: Process | None = None
    node: Node | None = None
    work: Device | Hop | None = None
    counters: Counter[str] = field(default_factory=Counter)  # of those that died


class _Chaos:
    def __init__(self, seed: int, scenario: ChaosScenario) -> None:
        self.seed = seed
        self.scenario = scenario
        self.random = random.Random(seed)
        self.broker = MemoryBroker(latency_s=0.001, session_timeout_s=3.0)
        self.violations: list[Violation] = []
        self.faults: Counter[str] = Counter()
        self.trace: list[tuple[Any, ...]] = []
        self.kept: dict[str, set[int]] = {}  # results that were shown: a store that outlives devices
        self.poisoned: dict[str, str] = {}  # task -> what was done to it
        self.acknowledged: list[str] = []
        self.stages: list[_Stage] = []
        self.planners: dict[str, PlannerService] = {}
        self.processes: list[Process] = []
        edges = [f"e{index + 1}" for index in range(scenario.edges)]
        self.edges = edges
        self.tasks = [self._task(index) for index in range(scenario.tasks)]
        self.policy = self.random.choice(["deepar", "deepar", "deepar", "edge-only", "cloud-only", "no-delay"])
        self.objective = self.random.choice(list(Objective))

    def say(self, guarantee: str, what: str) -> None:
        """A guarantee did not hold."""
        self.violations.append(Violation(guarantee, what))

    def note(self, *what: Any) -> None:
        """Remember that something happened, and when."""
        self.trace.append((round(asyncio.get_running_loop().time(), 6), *what))

    def _task(self, number: int) -> TaskSubmitted:
        draw = self.random
        return TaskSubmitted(
            task_id=f"t{number}",
            device=f"d{draw.randrange(self.scenario.devices) + 1}",
            model="toy",
            samples=draw.randint(*self.scenario.samples),
            input=SeedInput(seed=number),
            max_link1_bps=draw.choice([None, 500_000]),
        )

    # --- the cast ----------------------------------------------------------------------------------------------------

    def _make_core(self) -> PlannerCore:
        execution = Execution.STREAMING if self.objective is Objective.PIPELINED else Execution.SEQUENTIAL
        return PlannerCore(0, policy=self.policy, objective=self.objective, execution=execution)

    async def _serve_planner(self, name: str, bus: MemoryBus) -> None:
        service = self.planners[name] = PlannerService(
            bus, self._make_core, name=name, lease_s=LEASE_S / 2, snapshot_every=7
        )
        await service.run()

    async def _serve_stage(self, stage: _Stage, bus: MemoryBus) -> None:
        settings = stage.settings
        if stage.node is not None:
            stage.counters.update(stage.node.status.counters)
        speed = SPEED[settings.role]
        profile = ModelProfile(
            model="toy",
            sha256="0" * 64,
            platform=settings.name,
            layer_names=("conv", "pool", "dense"),
            layer_s=tuple(seconds * speed for seconds in LAYER_S),
            cut_bytes=CUT_BYTES,
        )
        node = Node(bus, settings, CheckedRunner(profile, self, settings.name, settings.slots))
        work: Device | Hop
        if settings.role is Role.DEVICE:
            work = Device(node, self._show, kept=lambda task_id: self.kept.get(task_id, ()))
        else:
            work = Hop(node)
        stage.node, stage.work = node, work
        await node.run(work)

    async def _leave(self, stage: _Stage) -> None:
        """What a stage does on SIGTERM."""
        if stage.work is None or stage.node is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await stage.work.drain()
        await stage.node.leave()

    def _show(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        shown = self.kept.setdefault(task.task_id, set())
        if sample in shown:
            self.say("G5", f"{task.task_id}/{sample} showed twice")
        if not same(outputs, task.task_id, sample, len(LAYER_S)):
            self.say("G5", f"{task.task_id}/{sample} showed a wrong content")
        shown.add(sample)
        self.note("shown", task.task_id, sample)

    def _cast(self) -> None:
        scenario = self.scenario
        settings = [
            *(NodeSettings(name=f"c{i + 1}", role=Role.CLOUD, lease_s=LEASE_S) for i in range(scenario.clouds)),
            *(
                NodeSettings(
                    name=name,
                    role=Role.EDGE,
                    slots=1,
                    link1_capacity_bps=1_500_000,
                    link2_capacity_bps=800_000,
                    lease_s=LEASE_S,
                )
                for name in self.edges
            ),
            *(NodeSettings(name=f"d{i + 1}", role=Role.DEVICE, lease_s=LEASE_S) for i in range(scenario.devices)),
        ]
        for index in range(scenario.planners):
            name = f"planner{index + 1}"
            self.processes.append(Process(name, self.broker, partial(self._serve_planner, name)))
        for one in settings:
            stage = _Stage(one)
            stage.process = Process(
                one.name, self.broker, partial(self._serve_stage, stage), leave=partial(self._leave, stage)
            )
            self.stages.append(stage)
            self.processes.append(stage.process)

    # --- the play ----------------------------------------------------------------------------------------------------

    async def play(self) -> ChaosRun:
        """First faults, then heal, then judge."""
        loop = asyncio.get_running_loop()
        loop.set_task_factory(task_factory)
        drawn_s = self.random.choice([0.0, -3600.0, 3600.0])  # nobody may notice
        off_s = drawn_s if self.scenario.clock_off_s is None else self.scenario.clock_off_s
        self.broker.wall_clock = lambda: 1e9 + loop.time() + off_s
        async with MemoryBus(self.broker, "client") as client:
            await client.create_topics(topics.specs(self.edges, Partitions(cloud=3, results=2)))
            self._cast()
            for process in self.processes:
                process.start()
            await self._until(self._joined, JOIN_S, "not everybody joined")
            submitting = asyncio.create_task(self._submit(client))
            await self._break(client)
            self._heal()
            await submitting
            ended = await self._until(self._all_ended, self.scenario.converge_s, "not every task ended")
            if ended:
                await asyncio.sleep(SETTLE_S)
            oracle = self._judge(settled=ended)
            for process in self.processes:
                process.crash()
            await asyncio.sleep(0.1)
        oracle.finish(self.acknowledged, self.poisoned)
        counters: Counter[str] = sum((self._counters(stage) for stage in self.stages), Counter())
        states = Counter(str(end.state) for ends in oracle.ends.values() for end in ends)
        return ChaosRun(
            self.seed,
            loop.time(),
            self.faults,
            (*self.violations, *oracle.violations),
            states,
            sum(oracle.attempts.values()),
            int(counters["duplicates_suppressed"]),
            tuple(self.trace),
        )

    async def _submit(self, client: MemoryBus) -> None:
        """Send each task until it is acknowledged; a second copy must not matter."""
        draw = random.Random(self.seed + 1)
        for task in self.tasks:
            await asyncio.sleep(draw.random() * 1.2 * self.scenario.faults_s / self.scenario.tasks)
            while True:
                try:
                    await client.send(topics.TASKS, messages.encode(task), key=task.task_id, partition=0)
                    break
                except BusError:
                    await asyncio.sleep(0.2)
            self.acknowledged.append(task.task_id)

    async def _until(self, holds: Callable[[], bool], within_s: float, otherwise: str) -> bool:
        try:
            async with asyncio.timeout(within_s):
                while not holds():
                    await asyncio.sleep(0.2)
        except TimeoutError:
            self.say("G1", f"{otherwise} within {within_s:g} virtual seconds")
            return False
        return True

    def _joined(self) -> bool:
        return all(stage.node is not None and stage.node.status.joined for stage in self.stages)

    def _leader(self) -> PlannerService | None:
        leading = [
            service
            for name, service in self.planners.items()
            if service.standing is Standing.LEADING and not self._process(name).dead
        ]
        return max(leading, key=lambda service: service.decision_log.epoch, default=None)

    def _process(self, name: str) -> Process:
        return next(process for process in self.processes if process.name == name)

    def _all_ended(self) -> bool:
        leader = self._leader()
        return (
            len(self.acknowledged) == len(self.tasks)
            and leader is not None
            and all(leader.core.ended.get(task_id) is not None for task_id in self.acknowledged)
        )

    # --- faults ------------------------------------------------------------------------------------------------------

    async def _break(self, client: MemoryBus) -> None:
        """What goes wrong, one after the other, often before the last is over."""
        draw = self.random
        count = draw.randint(*self.scenario.faults)
        for _ in range(count):
            await asyncio.sleep(draw.expovariate(count / self.scenario.faults_s))
            kind = draw.choice(
                [
                    "crash",
                    "crash",
                    "crash",
                    "freeze",
                    "freeze",
                    "cut",
                    "broker",
                    "terminate",
                    "bus",
                    "bus",
                    "bus",
                    "poison",
                ]
            )
            process = draw.choice(self.processes)
            self.faults[kind if kind in ("broker", "bus", "poison") else f"{kind} {_role(process.name)}"] += 1
            self.note(kind, process.name)
            await getattr(self, f"_{kind}")(process, client)
        await asyncio.sleep(draw.random() * 5.0)

    async def _crash(self, process: Process, client: MemoryBus) -> None:
        loop = asyncio.get_running_loop()
        away_s = self.random.choice([0.05, 1.0, 2.0 * LEASE_S])

        def restart() -> None:
            loop.call_later(away_s, process.start)

        process.crash_in(self.random.randrange(1, 150), restart)

    async def _freeze(self, process: Process, client: MemoryBus) -> None:
        process.freeze()
        asyncio.get_running_loop().call_later(self.random.uniform(0.2, 2.5 * LEASE_S), process.thaw)

    async def _cut(self, process: Process, client: MemoryBus) -> None:
        bus = process.bus
        if bus is not None and not process.dead and not process.frozen:
            bus.disconnect()
            asyncio.get_running_loop().call_later(self.random.uniform(0.2, 2.5 * LEASE_S), bus.reconnect)

    async def _broker(self, process: Process, client: MemoryBus) -> None:
        self.broker.pause()
        asyncio.get_running_loop().call_later(self.random.uniform(0.2, 9.0), self.broker.resume)

    async def _terminate(self, process: Process, client: MemoryBus) -> None:
        loop = asyncio.get_running_loop()
        away_s = self.random.choice([0.5, 6.0])

        async def stop() -> None:
            await process.stop()
            loop.call_later(away_s, process.start)

        self._stopping = loop.create_task(stop())

    async def _bus(self, process: Process, client: MemoryBus) -> None:
        draw = self.random
        kinds = ("lost_ack", "lost_post", "duplicate", "rebalance", "redelivery", "stale_commit", "late")
        chosen = {kind: draw.choice([0.02, 0.1, 0.3]) for kind in draw.sample(kinds, draw.randint(1, 4))}
        for kind in chosen:
            self.faults[f"bus {kind}"] += 1
        self.broker.faults = Faults(random=random.Random(draw.random()), late_s=0.05, **chosen)

    async def _poison(self, process: Process, client: MemoryBus) -> None:
        """Something unreadable on a topic; where it bears a task's name, that task may fail of it."""
        draw = self.random
        task = draw.choice(self.tasks)
        garbage = draw.choice(
            [b"\x80", b"", b"{}", b"\xc1" * 100, b'{"type":"task_submitted","v":9}', b"\x81\xa1v\x02"]
        )
        topic = draw.choice(
            [topics.TASKS, topics.EVENTS, topics.NODES, topics.RESULTS, topics.DECISIONS, topics.ACTIVATIONS_CLOUD]
            + [topics.activations_topic(edge) for edge in self.edges]
        )
        key = task.device if topic == topics.RESULTS else task.task_id
        if "activations" in topic:
            self.poisoned[task.task_id] = "poison"
        partition = None if "activations" in topic or topic == topics.RESULTS else 0
        with contextlib.suppress(BusError):
            await client.send(topic, garbage, key=key, partition=partition)

    def _heal(self) -> None:
        self.note("heal")
        self.broker.faults = None
        self.broker.resume()
        for process in self.processes:
            if process.bus is not None:
                process.bus.reconnect()
            process.thaw()
            process.start()

    # --- the verdict -------------------------------------------------------------------------------------------------

    def _judge(self, *, settled: bool) -> Oracle:
        oracle = Oracle(self._make_core())
        log = self.broker.logs(topics.DECISIONS)[0]
        oracle.read(log.read(0, log.end))
        for process in self.processes:
            for end in process.ends:
                self.say("G7", f"a process died of an error: {end}")
        for task in self.tasks:
            ends = oracle.ends.get(task.task_id, [])
            whole = set(range(task.samples))
            if ends and str(ends[0].state) == "COMPLETED" and self.kept.get(task.task_id) != whole:
                self.say("G5", f"{task.task_id} completed without {sorted(whole - self.kept.get(task.task_id, set()))}")
        for stage in self.stages:
            if self._counters(stage)["stalled_attempts"]:
                self.say("G5", f"{stage.settings.name} waited for samples that were lost")
        leader = self._leader()
        if leader is not None:
            try:
                leader.core.validate()
            except DeeparError as error:
                self.say("G2", str(error))
            if settled and leader.core.state_hash != oracle.core.state_hash:
                self.say("G3", "the leader's state is not what its decisions say")
        if settled:
            self._look_for_leftovers()
        return oracle

    def _look_for_leftovers(self) -> None:
        """G8: when every task is over, no stage holds anything of one."""
        for stage in self.stages:
            name, work = stage.settings.name, stage.work
            if isinstance(work, Device):
                if work.tasks:
                    self.say("G8", f"{name} still has {sorted(work.tasks)}")
            elif isinstance(work, Hop):
                if work.flows or work._orphans or work._orphan_bytes:
                    self.say("G8", f"{name} still has {sorted(work.flows)} and {sorted(work._orphans)}")
                if work.slots is not None and work.slots._value != stage.settings.slots:
                    self.say("G8", f"{name} has {work.slots._value} slots free of {stage.settings.slots}")
                if any(work.offsets._open.values()):
                    self.say("G8", f"{name} has records open: {work.offsets._open}")

    def _counters(self, stage: _Stage) -> Counter[str]:
        found = Counter(stage.counters)
        if stage.node is not None:
            found.update(stage.node.status.counters)
        return found


def _role(name: str) -> str:
    return {"p": "planner", "d": "device", "e": "edge", "c": "cloud"}[name[0]]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A thousand crashes that were ordered need not be told."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)

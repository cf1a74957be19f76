"""`deepar simulate chaos`: the real shells and the real core on `MemoryBus` in virtual time, with faults.

One seed draws the tasks, the schedule of faults, where exactly a process dies, and what the bus does wrong. First faults,
then everything is healed, and the region must converge: every acknowledged task ends once, every sample shows once with the
right content, the ledger holds at every record, nothing is left behind. What can be judged while it runs is judged at every
record, every commit and every step (`loadgen.chaos_watch`). A seed that fails is replayed by its number.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bus import messages, topics
from bus.errors import BusError, DeeparError
from bus.memory import MemoryBroker, MemoryBus
from bus.messages import Decision, HandleInput, SeedInput, TaskSubmitted
from bus.tensors import Array
from bus.topics import Partitions
from bus.values import Execution, Objective
from loadgen.chaos_check import Oracle, Violation
from loadgen.chaos_faults import Breaker
from loadgen.chaos_process import Process, quiet, task_factory
from loadgen.chaos_region import LAYER_S, LEASE_S, MODEL, Stage, cast, same
from loadgen.chaos_watch import Watch, WatchedBus
from loadgen.metrics import distribution
from loadgen.virtual_loop import run_virtual
from planner.core import DEFAULT_MAX_WAITING, PlannerCore
from planner.service import PlannerService, Standing
from stages.device import Device
from stages.hop import Hop

JOIN_S = 60.0
SETTLE_S = 4.0
"""Virtual seconds after the last end within which nothing of a task may be left anywhere."""
CHUNK = 20
"""So many seeds a process runs before it reports."""


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
    converge_s: float = 200.0  # virtual seconds after healing within which every task must have ended
    clocks: bool = True  # wall clocks are off by minutes, and jump
    max_waiting: int | None = None  # how many tasks may wait, None: drawn; then tasks may come all at once

    @property
    def edge_names(self) -> list[str]:
        """Its edges."""
        return [f"e{index + 1}" for index in range(self.edges)]


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
    silences: tuple[float, ...]  # seconds from a node's last sign of life until its tasks were planned again
    rejected: int  # tasks that a full queue refused
    trace: tuple[tuple[Any, ...], ...]  # what happened, in order; the same for the same seed


@dataclass(slots=True)
class _Sum:
    """Of many seeds."""

    seeds: int = 0
    virtual_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    violations: list[dict[str, Any]] = field(default_factory=list)
    retries: int = 0
    suppressed: int = 0
    rejected: int = 0
    silences: list[float] = field(default_factory=list)

    def add(self, other: _Sum) -> None:
        self.seeds += other.seeds
        self.virtual_s += other.virtual_s
        self.faults += other.faults
        self.states += other.states
        self.violations += other.violations
        self.retries += other.retries
        self.suppressed += other.suppressed
        self.rejected += other.rejected
        self.silences += other.silences

    def as_object(self) -> dict[str, Any]:
        replanned = distribution(self.silences) if self.silences else {}
        return {
            "seeds": self.seeds,
            "simulated_hours": self.virtual_s / 3600.0,
            "faults": dict(sorted(self.faults.items())),
            "violations": self.violations,
            "states": dict(sorted(self.states.items())),
            "retries": self.retries,
            "suppressed_duplicates": self.suppressed,
            "rejected_queue_full": self.rejected,
            "replanned_s": {"times": len(self.silences), "lease": LEASE_S} | replanned,
        }


def run(
    seeds: Sequence[int],
    *,
    scenario: ChaosScenario | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run the seeds, in `jobs` processes; what `deepar simulate chaos --json` prints, the same whatever `jobs` is."""
    chunks = [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]
    sums: list[_Sum | None] = [None] * len(chunks)
    done = 0
    for index, found in _sums(chunks, scenario, jobs):
        sums[index] = found
        done += found.seeds
        if progress is not None:
            progress(done, len(seeds))
    total = _Sum()
    for part in sums:
        assert part is not None
        total.add(part)
    return total.as_object()


def _sums(chunks: Sequence[Sequence[int]], scenario: ChaosScenario | None, jobs: int) -> Iterator[tuple[int, _Sum]]:
    if jobs <= 1 or len(chunks) < 2:
        for index, chunk in enumerate(chunks):
            yield index, _run_chunk(chunk, scenario)
        return
    # Not forked: a progress display has threads, and a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(jobs, len(chunks)), mp_context=context) as pool:
        futures = {pool.submit(_run_chunk, chunk, scenario): index for index, chunk in enumerate(chunks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run_chunk(seeds: Iterable[int], scenario: ChaosScenario | None) -> _Sum:
    total = _Sum()
    for seed in seeds:
        found = run_seed(seed, scenario=scenario)
        violations = [
            {
                "seed": seed,
                "guarantee": violation.guarantee,
                "what": violation.what,
                "replay": f"deepar simulate chaos --seeds 1 --seed {seed} --trace -",
            }
            for violation in found.violations
        ]
        total.add(
            _Sum(
                1,
                found.virtual_s,
                found.faults,
                found.states,
                violations,
                found.retries,
                found.suppressed,
                found.rejected,
                list(found.silences),
            )
        )
    return total


def run_seed(
    seed: int, *, scenario: ChaosScenario | None = None, sites: Callable[[str, str, bool], bool] | None = None
) -> ChaosRun:
    """One seed, from the first process to the verdict.

    `sites(name, place, over)` is asked at each await of planner and stages whether that process is to die there.
    """
    with quiet():
        return run_virtual(_Chaos(seed, scenario or ChaosScenario(), sites).play(), horizon_s=3_600.0)


class _Chaos:
    def __init__(self, seed: int, scenario: ChaosScenario, sites: Callable[[str, str, bool], bool] | None) -> None:
        self.seed = seed
        self.scenario = scenario
        self.random = random.Random(seed)
        self.broker = MemoryBroker(latency_s=0.001, session_timeout_s=3.0)
        self.violations: list[Violation] = []
        self.trace: list[tuple[Any, ...]] = []
        self.kept: dict[str, set[int]] = {}  # results that were shown: a store that outlives devices
        self.acknowledged: list[str] = []
        self.stages: list[Stage] = []
        self.planners: dict[str, PlannerService] = {}
        self.processes: list[Process] = []
        self.sites = sites
        self.policy = self.random.choice(["deepar", "deepar", "deepar", "edge-only", "cloud-only", "no-delay"])
        self.objective = self.random.choice(list(Objective))
        self.crowded = scenario.max_waiting is not None or self.random.random() < 0.15
        drawn = self.random.choice([0, 1, 2]) if self.crowded else DEFAULT_MAX_WAITING
        self.max_waiting = drawn if scenario.max_waiting is None else scenario.max_waiting
        self.fine = sites is not None or self.random.random() < 0.2  # each call to the bus is an await of its own
        self.tasks = [self._task(index) for index in range(scenario.tasks)]
        self.oracle = Oracle(self._make_core(), self.say)
        self.breaker = Breaker(self.random, scenario, self.broker, self.processes, self.note)
        self.watch = Watch(self.broker, self, self.oracle, self.breaker.harmed)

    def say(self, guarantee: str, what: str) -> None:
        """A guarantee did not hold."""
        self.note("VIOLATION", guarantee, what)
        self.violations.append(Violation(guarantee, what))

    def note(self, *what: Any) -> None:
        """Remember that something happened, and when."""
        self.trace.append((round(asyncio.get_running_loop().time(), 6), *what))

    def _note_decision(self, decision: Decision) -> None:
        for change in decision.changes:
            about = getattr(change, "task_id", None) or getattr(change, "node", "")
            if change.type == "admitted":
                about = change.task.task_id
            elif change.type == "node_joined":
                about = change.node.node
            self.note(
                change.type, about, *(getattr(change, name, "") for name in ("state", "cause") if hasattr(change, name))
            )

    def _task(self, number: int) -> TaskSubmitted:
        draw = self.random
        return TaskSubmitted(
            task_id=f"t{number}",
            device=f"d{draw.randrange(self.scenario.devices) + 1}",
            model=MODEL,
            samples=draw.randint(*self.scenario.samples),
            input=HandleInput(handle="camera") if draw.random() < 0.1 else SeedInput(seed=number),
            max_link1_bps=draw.choice([None, 500_000]),
            deadline_s=draw.uniform(5.0, 40.0) if draw.random() < 0.1 else None,
        )

    # --- the cast ----------------------------------------------------------------------------------------------------

    def _make_core(self) -> PlannerCore:
        execution = Execution.STREAMING if self.objective is Objective.PIPELINED else Execution.SEQUENTIAL
        return PlannerCore(
            0, policy=self.policy, objective=self.objective, execution=execution, max_waiting=self.max_waiting
        )

    def _connect(self, name: str) -> MemoryBus:
        bus = WatchedBus(self.broker, name, self.watch, fine=self.fine)
        bus.wall_clock = self.breaker.wall_clock(name)
        self.note("starts", name)
        return bus

    async def _serve_planner(self, name: str, bus: MemoryBus) -> None:
        service = self.planners[name] = PlannerService(
            bus,
            self._make_core,
            name=name,
            lease_s=LEASE_S / 2,
            snapshot_every=7,
            wall_clock=self.breaker.wall_clock(name),
        )
        await service.run()

    async def _serve_stage(self, stage: Stage, bus: MemoryBus) -> None:
        await stage.serve(bus, self, self._show, lambda task_id: self.kept.get(task_id, ()))

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
        for index in range(scenario.planners):
            name = f"planner{index + 1}"
            self.processes.append(Process(name, partial(self._connect, name), partial(self._serve_planner, name)))
        for settings in cast(scenario.clouds, scenario.edge_names, scenario.devices):
            stage = Stage(settings)
            stage.process = Process(
                settings.name,
                partial(self._connect, settings.name),
                partial(self._serve_stage, stage),
                leave=stage.leave,
            )
            stage.process.after = partial(self.watch.weigh, stage)
            self.stages.append(stage)
            self.processes.append(stage.process)
        if self.sites is not None:
            for process in self.processes:
                process.sites = partial(self.sites, process.name)
                process.crashed = partial(self._restart, process)

    def _restart(self, process: Process) -> None:
        self.note("dead", process.name)
        asyncio.get_running_loop().call_later(1.0, process.start)

    # --- the play ----------------------------------------------------------------------------------------------------

    async def play(self) -> ChaosRun:
        """First faults, then heal, then judge."""
        loop = asyncio.get_running_loop()
        loop.set_task_factory(task_factory)
        async with MemoryBus(self.broker, "client") as client:
            client.wall_clock = self.breaker.wall_clock("client")
            await client.create_topics(topics.specs(self.scenario.edge_names, Partitions(cloud=3, results=2)))
            self.watch.begin()
            self.watch.on_decision = self._note_decision
            self._cast()
            for process in self.processes:
                process.start()
            await self._until(self._joined, JOIN_S, "not everybody joined")
            submitting = asyncio.create_task(self._submit(client))
            await self.breaker.play(client)
            self.breaker.heal()
            await submitting
            ended = await self._until(self._all_ended, self.scenario.converge_s, "not every task ended")
            if ended:
                await asyncio.sleep(SETTLE_S)
                # A polite stop from the last of the faults may have come after the healing: wait for who is still away.
                await self._until(self._all_back, JOIN_S, "not everybody is back")
                for process in self.processes:
                    process.sites = None
                await self.breaker.garbage_everywhere(client)
                await asyncio.sleep(SETTLE_S)
            self._judge(settled=ended)
            for process in self.processes:
                process.crash()
            await asyncio.sleep(0.1)
        oracle = self.oracle
        counters: Counter[str] = sum((stage.counted() for stage in self.stages), Counter())
        return ChaosRun(
            self.seed,
            loop.time(),
            self.breaker.faults(),
            tuple(self.violations),
            Counter(str(end.state) for ends in oracle.ends.values() for end in ends),
            sum(oracle.attempts.values()),
            int(counters["duplicates_suppressed"]),
            tuple(self.watch.silences),
            sum(end.cause == "queue_full" for ends in oracle.ends.values() for end in ends),
            tuple(self.trace),
        )

    async def _submit(self, client: MemoryBus) -> None:
        """Send each task until it is acknowledged; a second copy must not matter."""
        draw = random.Random(self.seed + 1)
        hurry = 0.05 if self.crowded else 1.2
        for task in self.tasks:
            await asyncio.sleep(draw.random() * hurry * self.scenario.faults_s / self.scenario.tasks)
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

    def _all_back(self) -> bool:
        return self._joined() and not any(process.dead for process in self.processes) and not self.breaker.stopping

    def _leader(self) -> PlannerService | None:
        dead = {process.name for process in self.processes if process.dead}
        leading = [
            service
            for name, service in self.planners.items()
            if service.standing is Standing.LEADING and name not in dead
        ]
        return max(leading, key=lambda service: service.decision_log.epoch, default=None)

    def _all_ended(self) -> bool:
        leader = self._leader()
        return (
            len(self.acknowledged) == len(self.tasks)
            and leader is not None
            and all(leader.core.ended.get(task_id) is not None for task_id in self.acknowledged)
        )

    # --- the verdict -------------------------------------------------------------------------------------------------

    def _judge(self, *, settled: bool) -> None:
        oracle, breaker = self.oracle, self.breaker
        for process in self.processes:
            for end in process.ends:
                self.say("G7", f"a process died of an error: {end}")
        for task in self.tasks:
            ends = oracle.ends.get(task.task_id, [])
            whole = set(range(task.samples))
            if ends and str(ends[0].state) == "COMPLETED" and self.kept.get(task.task_id) != whole:
                self.say("G5", f"{task.task_id} completed without {sorted(whole - self.kept.get(task.task_id, set()))}")
            if oracle.stalled[task.task_id] and task.task_id not in breaker.missed:
                self.say("G5", f"{task.task_id} waited for samples that were lost")
        for stage in self.stages:
            if stage.counted()["stalled_attempts"] and not breaker.missed:
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
            if not self._joined():
                self.say("G1", "not everybody is back")
            self._look_for_leftovers()
            self._look_for_letters()
        oracle.finish(self.acknowledged, {task.task_id: self._excuses(task) for task in self.tasks})

    def _excuses(self, task: TaskSubmitted) -> frozenset[str]:
        """Causes of which a task may fail."""
        causes = set()
        if task.task_id in self.breaker.poisoned:
            causes.add("any")
        if task.task_id in self.breaker.cancelled:
            causes.add("cancelled")
        if task.deadline_s is not None:
            causes.add("deadline")
        if isinstance(task.input, HandleInput) and task.device in self.oracle.lost:
            causes.add("input_lost")
        if self.crowded:
            causes.add("queue_full")
        return frozenset(causes)

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
                    self.say("G2", f"{name} has {work.slots._value} slots free of {stage.settings.slots}")
                if any(work.offsets._open.values()):
                    self.say("G8", f"{name} has records open: {work.offsets._open}")

    def _look_for_letters(self) -> None:
        """G7: garbage is a dead letter, unless the letter itself was lost; exactly once while all is well."""
        log = self.broker.logs(topics.DEAD_LETTER)[0]
        kept = Counter(record.key or "" for record in log.read(0, 1 << 30))
        fresh = len(self.breaker.letters) - self.breaker.last_letters
        for index, origin in enumerate(self.breaker.letters):
            if not kept[origin] and (index >= fresh or not self.breaker.lossy):
                self.say("G7", f"no dead letter of {origin}")
            elif kept[origin] > 1 and index >= fresh:
                self.say("G7", f"{kept[origin]} dead letters of {origin}")

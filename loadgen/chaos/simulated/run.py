"""Run of one seed: builds the region, injects faults, heals it, and checks the guarantees."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bus import topics
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import Decision
from bus.topics import Partitions
from bus.values import Objective, Role
from loadgen.chaos.simulated.camera import Camera, CameraRecord
from loadgen.chaos.simulated.client import SimulatedClient
from loadgen.chaos.simulated.faults import Breaker
from loadgen.chaos.simulated.final_checks import FinalChecks
from loadgen.chaos.simulated.machines import BatchFaults, CheckedRunner, Machines
from loadgen.chaos.simulated.monitor import SimulatedMonitor
from loadgen.chaos.simulated.oracle import Oracle, Violation
from loadgen.chaos.simulated.region import LEASE_S, ChaosScenario
from loadgen.chaos.simulated.watched_bus import WatchedBus
from loadgen.sim.process import Process, task_factory
from loadgen.sim.programs import REAL, Programs
from loadgen.sim.region import VirtualRegion, VirtualStage
from planner.core.core import PlannerCore
from planner.core.options import DEFAULT_MAX_WAITING, CoreOptions
from planner.service.record_split import RECORD_BYTES
from planner.service.region_context import PART_BYTES, PlannerSettings
from planner.service.service import PlannerService

JOIN_S = 60.0
SETTLE_S = 4.0
"""Virtual seconds after the last task end within which all task state must be released."""

Sites = Callable[[str, str, bool], bool]
"""(process, source location, whether the wait is over) -> whether to kill it there; called at each await."""


@dataclass(frozen=True, slots=True)
class ChaosRun:
    """The result of one seed."""

    seed: int
    virtual_s: float
    faults: Counter[str]  # by kind
    violations: tuple[Violation, ...]
    states: Counter[str]  # how the tasks ended
    sessions: int  # opened by cameras
    frames: Counter[str]  # pushed through them: answered, dropped, or the cause of the error
    retries: int  # attempts beyond the first
    suppressed: int  # duplicate results that devices suppressed
    silences: tuple[float, ...]  # seconds from a node's last heartbeat until its tasks were retried
    rejected: int  # tasks rejected because of a full queue
    mixed: int  # placements of several routes
    encoded: int  # placements with codecs
    batches: Counter[str]  # batches of samples of several tasks, and what they met
    rerouted: int  # changes of the placement of a running task
    trace: tuple[tuple[Any, ...], ...]  # events in order; the same for the same seed


class Play:
    """The state of one seed's run."""

    def __init__(self, seed: int, scenario: ChaosScenario, sites: Sites | None, programs: Programs = REAL) -> None:
        self.programs = programs
        self.seed = seed
        self.scenario = scenario
        draw = random.Random(seed)
        self.broker = MemoryBroker(latency_s=0.001, session_timeout_s=3.0)
        self.violations: list[Violation] = []
        self.trace: list[tuple[Any, ...]] = []
        self.sites = sites
        self.policy = draw.choice(["deepar", "deepar", "deepar", "edge-only", "cloud-only", "no-delay"])
        self.objective = draw.choice(list(Objective))
        more = random.Random(f"routes of {seed}")  # apart, so that the rest of a seed does not depend on it
        if more.random() < scenario.routes:
            self.policy, self.objective = more.choice(["routes", "elastic"]), Objective.PIPELINED
        self.codecs = more.random() < scenario.codecs
        self.crowded = scenario.max_waiting is not None or draw.random() < 0.15
        drawn = draw.choice([0, 1, 2]) if self.crowded else DEFAULT_MAX_WAITING
        self.max_waiting = drawn if scenario.max_waiting is None else scenario.max_waiting
        self.fine = sites is not None or draw.random() < 0.2  # every bus call gets extra awaits
        self.client = SimulatedClient(draw, scenario, hurry=0.05 if self.crowded else 1.2, say=self.say, note=self.note)
        self.cameras = CameraRecord(self.say, self.note)
        self.oracle = Oracle(self._make_core(PlannerCore), self.say)
        self.region = VirtualRegion(self._connect)
        self.processes: list[Process] = []
        self.breaker = Breaker(draw, scenario, self.broker, self.processes, self.note, self.cameras.sessions)
        batches = random.Random(f"batches of {seed}")
        self.batch_faults = BatchFaults(batches, self.breaker.kill_in_batch)
        self.machines = Machines(
            say=self.say,
            codecs=self.codecs,
            batches=batches.random() < scenario.batches,
            faults=self.batch_faults if any(scenario.faults) else None,
            programs=programs,
        )
        self._add_processes()
        self.processes += self.region.processes.values()
        self.watch = SimulatedMonitor(self.broker, self.say, self.oracle, self._may_fail, self.breaker.forged)

    def say(self, guarantee: str, what: str) -> None:
        """Record a violated guarantee."""
        self.note("VIOLATION", guarantee, what)
        self.violations.append(Violation(guarantee, what))

    def note(self, *what: Any) -> None:
        """Append an event with its time to the trace."""
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

    # --- processes ----------------------------------------------------------------------------------------------------

    def _add_processes(self) -> None:
        for index in range(self.scenario.planners):
            name = f"planner{index + 1}"
            self.region.add_planner(name, partial(self._make_planner, name))
        draw = random.Random(f"cameras of {self.seed}")
        for settings in self.scenario.nodes():
            filming = settings.role is Role.DEVICE and draw.random() < self.scenario.cameras
            camera = Camera(settings.name, random.Random(draw.random()), self.cameras, self.scenario.faults_s)
            stage = VirtualStage(
                settings=settings,
                programs=self.programs,
                make_runner=partial(CheckedRunner, settings, self.machines),
                on_result=self.client.show if settings.role is Role.DEVICE else None,
                kept=self.client.shown,
                application=camera.run if filming else None,
                drain_s=2.0,
            )
            self.region.add_stage(stage)

    def _may_fail(self, task_id: str) -> bool:
        """Whether an attempt at the task may fail before all its samples were sent on."""
        return self.breaker.harmed(task_id) or task_id in self.batch_faults.bad

    def _make_core(self, make: Callable[..., PlannerCore]) -> PlannerCore:
        objective = self.objective
        return make(
            0,
            policy=self.policy,
            objective=objective,
            execution=objective.execution,
            options=CoreOptions(max_waiting=self.max_waiting, learning=True),
        )

    def _make_planner(self, name: str, bus: MemoryBus) -> PlannerService:
        clock = self.breaker.wall_clock(name)
        # In even seeds the limits are so small that most decisions and snapshots take several records.
        part_bytes, record_bytes = (PART_BYTES, RECORD_BYTES) if self.seed % 2 else (1_500, 1_000)
        settings = PlannerSettings(
            name=name, lease_s=LEASE_S / 2, snapshot_every=7, part_bytes=part_bytes, record_bytes=record_bytes
        )
        make_core = partial(self._make_core, self.programs.core)
        return self.programs.planner(bus, make_core, settings, wall_clock=clock)

    def _connect(self, name: str) -> MemoryBus:
        bus = WatchedBus(self.broker, name, self.watch, fine=self.fine)
        bus.wall_clock = self.breaker.wall_clock(name)
        self.note("starts", name)
        return bus

    def _spy(self) -> None:
        """Install the memory check at every stage step and the crash decision at every await."""
        for name, stage in self.region.stages.items():
            self.region.processes[name].after = partial(self.watch.weigh, stage)
        if self.sites is not None:
            for process in self.processes:
                process.sites = partial(self.sites, process.name)
                process.crashed = partial(self._restart, process)

    def _restart(self, process: Process) -> None:
        self.note("dead", process.name)
        asyncio.get_running_loop().call_later(1.0, process.start)

    # --- run ----------------------------------------------------------------------------------------------------

    async def play(self) -> ChaosRun:
        """Inject the faults, heal the region, then run the checks."""
        loop = asyncio.get_running_loop()
        loop.set_task_factory(task_factory)
        async with MemoryBus(self.broker, "client") as bus:
            bus.wall_clock = self.breaker.wall_clock("client")
            await bus.create_topics(topics.specs(self.scenario.edge_names, Partitions(cloud=3, results=2)))
            self.watch.begin()
            self.watch.on_decision = self._note_decision
            self._spy()
            for process in self.processes:
                process.start()
            await self._until(self._joined, JOIN_S, "not all processes joined")
            submitting = asyncio.create_task(
                self.client.submit(self.programs.client_bus(bus), random.Random(self.seed + 1))
            )
            bombs = random.Random(f"bombs of {self.seed}")
            bombing = asyncio.create_task(self.breaker.bomb(bus, bombs)) if self.codecs else None
            await self.breaker.play(bus)
            self.breaker.heal()
            if bombing is not None:
                await bombing
            await submitting
            ended = await self._until(self._all_ended, self.scenario.converge_s, "not every task ended")
            if ended:
                await asyncio.sleep(SETTLE_S)
                # A process that received SIGTERM just before healing may still be restarting, so wait for it.
                await self._until(self._all_back, JOIN_S, "not all processes are back")
                for process in self.processes:
                    process.sites = None
                await self.breaker.garbage_everywhere(bus)
                await asyncio.sleep(SETTLE_S)
            self._judge(settled=ended)
            await self.region.end()
        return self._result(loop.time())

    def _judge(self, *, settled: bool) -> None:
        verdict = FinalChecks(
            region=self.region,
            broker=self.broker,
            client=self.client,
            cameras=self.cameras,
            oracle=self.oracle,
            breaker=self.breaker,
            bad=self.batch_faults.bad,
            crowded=self.crowded,
            say=self.say,
        )
        verdict.judge(settled=settled)

    def _result(self, virtual_s: float) -> ChaosRun:
        ends = [end for task in self.client.tasks for end in self.oracle.ends.get(task.task_id, ())]
        return ChaosRun(
            seed=self.seed,
            virtual_s=virtual_s,
            faults=self.breaker.faults(),
            violations=tuple(self.violations),
            states=Counter(str(end.state) for end in ends),
            sessions=len(self.cameras.sessions),
            frames=self.cameras.outcomes.copy(),
            retries=sum(self.oracle.attempts.values()),
            suppressed=int(sum(stage.counted()["duplicates_suppressed"] for stage in self.region.stages.values())),
            silences=tuple(self.watch.silences),
            rejected=sum(end.cause == "queue_full" for end in ends),
            mixed=self.oracle.mixed,
            encoded=self.oracle.encoded,
            batches=self.batch_faults.met,
            rerouted=self.oracle.rerouted,
            trace=tuple(self.trace),
        )

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
        return all(stage.joined for stage in self.region.stages.values())

    def _all_back(self) -> bool:
        return self._joined() and not any(process.dead for process in self.processes) and not self.breaker.stopping

    def _all_ended(self) -> bool:
        leader, client, cameras = self.region.leader(), self.client, self.cameras
        sessions = [task.task_id for task in cameras.sessions if self.oracle.admitted[task.task_id]]
        return (
            len(client.acknowledged) == len(client.tasks)
            and leader is not None
            and not cameras.running
            and all(leader.core.ended.get(task_id) is not None for task_id in (*client.acknowledged, *sessions))
        )

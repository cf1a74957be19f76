"""Region of the soak test: permanent nodes, one temporary edge, and a cloud that may be slower than its profile."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

from bus.frames import AttemptPlan
from bus.memory.broker import MemoryBroker, Retention
from bus.memory.bus import MemoryBus
from bus.values import Execution, ModelProfile, Objective, Role
from loadgen.sim.programs import REAL, Programs
from loadgen.sim.region import VirtualRegion, VirtualStage, toy_profile
from planner.core.core import PlannerCore
from planner.core.options import CoreOptions
from planner.service.region_context import PlannerSettings
from planner.service.service import PlannerService
from stages.membership.settings import NodeSettings
from stages.runner import ModelledRunner, PaceClock, Station

CUT_BYTES = (40_000, 60_000, 10_000, 400)
LAYER_S = (0.100, 0.010, 0.080)
SPEED = {Role.DEVICE: 4.0, Role.EDGE: 2.0, Role.CLOUD: 1.0}
WARM_UP = 0.25
"""Share of the soak's duration that is the warm-up, in which caches fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakScenario:
    """Size of the region and duration of the soak."""

    hours: float = 24.0
    seed: int = 0
    devices: int = 3
    edges: int = 2  # permanent edges; a further one joins and leaves
    clouds: int = 2
    planners: int = 2
    task_every_s: float = 6.0  # on average
    samples: tuple[int, int] = (1, 6)
    churn_every_s: float = 300.0  # on average
    looks: int = 144  # number of measurements
    lease_s: float = 10.0

    @property
    def remember(self) -> int:
        """Number of ended tasks that planner and nodes remember, low enough to be reached during the warm-up."""
        return max(10, min(10_000, int(self.hours * 3600 / self.task_every_s * WARM_UP / 2)))

    @property
    def keep_bytes(self) -> int:
        """Retention limit of the broker per partition, low enough to be reached during the warm-up."""
        return max(128 << 10, min(1 << 20, int(self.hours * (128 << 10))))

    @property
    def snapshot_every(self) -> int:
        """Decisions between snapshots; the broker retains several times as many."""
        return self.keep_bytes // 4096


class SlowRunner(ModelledRunner):
    """A machine that is `factor` times slower than its announced profile."""

    def __init__(self, said: ModelProfile, factor: float) -> None:
        super().__init__([said])
        slow = said.slowed(factor)
        self._real = ModelledRunner([slow])

    def station(self, plan: AttemptPlan, first: int, last: int, pace: PaceClock) -> Station:
        """A station with the slowed-down times."""
        return self._real.station(plan, first, last, pace)


class SoakRegion(VirtualRegion):
    """Planners and stages on a broker with limited retention; one edge is temporary."""

    def __init__(self, scenario: SoakScenario, *, cloud_factor: float = 1.0, programs: Programs = REAL) -> None:
        self.programs = programs
        self.scenario = scenario
        self.broker = MemoryBroker(
            latency_s=0.001,
            retention=Retention(control_bytes=scenario.keep_bytes, consumed_bytes=scenario.keep_bytes),
            session_timeout_s=3.0,
        )
        super().__init__(partial(MemoryBus, self.broker))
        self.edges = [f"e{index + 1}" for index in range(scenario.edges + 1)]
        self.visitor = self.edges[-1]
        for index in range(scenario.planners):
            name = f"planner{index + 1}"
            self.add_planner(name, partial(self._make_planner, name))
        for role, names in (
            (Role.CLOUD, [f"c{index + 1}" for index in range(scenario.clouds)]),
            (Role.EDGE, self.edges),
            (Role.DEVICE, [f"d{index + 1}" for index in range(scenario.devices)]),
        ):
            said = toy_profile(role.value, (seconds * SPEED[role] for seconds in LAYER_S), CUT_BYTES)
            runner = partial(SlowRunner, said, cloud_factor if role is Role.CLOUD else 1.0)
            for name in names:
                self.add_stage(VirtualStage(settings=self._settings(name, role), make_runner=runner, programs=programs))

    def start(self) -> None:
        """Start all processes that are not running, except the temporary edge."""
        for name, process in self.processes.items():
            if name != self.visitor:
                process.start()

    async def all_joined(self) -> None:
        """Wait until all running nodes have joined the region."""
        while not all(stage.joined for name, stage in self.stages.items() if not self.processes[name].dead):
            await asyncio.sleep(0.1)

    def _make_core(self) -> PlannerCore:
        return self.programs.core(
            0,
            objective=Objective.PIPELINED,
            execution=Execution.STREAMING,
            options=CoreOptions(remember_ended=self.scenario.remember, learning=True),
        )

    def _make_planner(self, name: str, bus: MemoryBus) -> PlannerService:
        settings = PlannerSettings(name=name, snapshot_every=self.scenario.snapshot_every)
        return self.programs.planner(bus, self._make_core, settings)

    def _settings(self, name: str, role: Role) -> NodeSettings:
        is_edge = role is Role.EDGE
        return NodeSettings(
            name=name,
            role=role,
            lease_s=self.scenario.lease_s,
            slots=2 if is_edge else 0,
            link1_capacity_bps=100_000_000 if is_edge else 0,
            link2_capacity_bps=20_000_000 if is_edge else 0,
            remembered_ends=self.scenario.remember,
        )

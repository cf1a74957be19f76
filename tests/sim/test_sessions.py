"""Sessions in a region with the real planner: placed on every kind of nodes, and alive while nodes and planners are not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import pytest

from bus import messages, topics
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import (
    Change,
    Decision,
    Ended,
    HandleInput,
    Retried,
    SeedInput,
    SessionTerms,
    TaskState,
    TaskSubmitted,
)
from bus.tensors import Array
from bus.topics import Partitions
from bus.values import Execution, Kind, Objective, Role
from loadgen.chaos.simulated.oracle import Oracle
from loadgen.sim.process import task_factory
from loadgen.sim.region import VirtualRegion, VirtualStage, toy_profile
from loadgen.sim.virtual_loop import run_virtual
from planner.core.core import PlannerCore
from planner.service.region_context import PlannerSettings
from planner.service.service import PlannerService
from stages.devices.device import Device
from stages.devices.endings import SessionEndedError
from stages.devices.session import DeviceSession
from stages.hops.hop import Hop
from stages.membership.settings import NodeSettings
from tests.numbered_frames import NumberingRunner, answers, frame

CUT_BYTES = (4_000, 6_000, 1_000, 40)
LAYER_S = 0.010
"""The time of each of the three layers on a machine of speed 1."""
SLOW = 100.0


@dataclass(frozen=True, slots=True)
class Case:
    """What makes the planner choose one kind of placement: slowness of the tiers, and the rate of the session."""

    device: float
    edge: float
    cloud: float
    rate_hz: float  # a tier sustains three layers at 20 Hz, two at 38 Hz, one at 75 Hz


CASES = {
    Kind.DEVICE: Case(1.0, SLOW, SLOW, 20.0),
    Kind.EDGE: Case(SLOW, 1.0, SLOW, 20.0),
    Kind.CLOUD: Case(SLOW, SLOW, 1.0, 20.0),
    Kind.DEVICE_EDGE: Case(1.0, 1.0, SLOW, 38.0),
    Kind.EDGE_CLOUD: Case(SLOW, 1.0, 1.0, 38.0),
    Kind.DEVICE_EDGE_CLOUD: Case(1.0, 1.0, 1.0, 75.0),
}


def core() -> PlannerCore:
    return PlannerCore(0, policy="deepar", objective=Objective.PIPELINED, execution=Execution.STREAMING)


NODES = {"c1": Role.CLOUD, "c2": Role.CLOUD, "e1": Role.EDGE, "e2": Role.EDGE, "d1": Role.DEVICE}
NONE: Mapping[int, Callable[[], object]] = {}


class Place:
    """A region of processes that may be killed, and its decisions."""

    def __init__(self, broker: MemoryBroker, bus: MemoryBus, case: Case) -> None:
        self.bus, self.case = bus, case
        self.region = VirtualRegion(lambda name: MemoryBus(broker, name))
        self._broker = broker

    def build(self) -> None:
        for name in ("p1", "p2"):
            self.region.add_planner(name, partial(self._planner, name))
        for name, role in NODES.items():
            node = NodeSettings(name=name, role=role, lease_s=4.0)
            if role is Role.EDGE:
                node = replace(node, slots=1, link1_capacity_bps=40_000_000, link2_capacity_bps=20_000_000)
            slowness = {Role.DEVICE: self.case.device, Role.EDGE: self.case.edge, Role.CLOUD: self.case.cloud}[role]
            profile = toy_profile(name, (slowness * LAYER_S,) * 3, CUT_BYTES)
            self.region.add_stage(
                VirtualStage(settings=node, make_runner=partial(NumberingRunner, [profile]), drain_s=8.0)
            )
        for process in self.region.processes.values():
            process.start()

    @staticmethod
    def _planner(name: str, bus: MemoryBus) -> PlannerService:
        return PlannerService(bus, core, PlannerSettings(name=name, lease_s=2.0, snapshot_every=20))

    @property
    def device(self) -> Device:
        work = self.region.stages["d1"].work
        assert isinstance(work, Device)
        return work

    def changes(self) -> list[Change]:
        """Every change so far, checked by the oracle."""
        oracle = Oracle(core())
        log = self._broker.logs(topics.DECISIONS)[0]
        found: list[Change] = []
        for record in log.read(0, log.end):
            message = oracle.take(record)
            found += message.changes if isinstance(message, Decision) else ()
        assert oracle.violations == []
        return found

    async def open(self) -> DeviceSession:
        """A session that is ready."""
        terms = SessionTerms(rate_hz=self.case.rate_hz)
        task = TaskSubmitted(
            task_id="s", device="d1", model="toy", samples=1, input=HandleInput(handle="s"), session=terms
        )
        session = self.device.open_session(task)
        async with asyncio.timeout(30.0):
            await session.ready()
        return session

    async def stream(
        self, session: DeviceSession, count: int, events: Mapping[int, Callable[[], object]] = NONE
    ) -> None:
        """Push frames at the session's rate and check each answer; `events` happen before their frame."""
        futures: list[asyncio.Future[list[Array]]] = []
        for number in range(count):
            if number in events:
                events[number]()
            futures.append(session.push(frame(number, CUT_BYTES[0])))
            await asyncio.sleep(1.0 / self.case.rate_hz)
        async with asyncio.timeout(60.0):
            outputs = await asyncio.gather(*futures)
        assert all(answers(number, one) for number, one in enumerate(outputs))

    async def close(self, session: DeviceSession) -> None:
        """Close the session; it must have ended as completed, and no node may hold anything of it."""
        await session.close()
        await asyncio.sleep(3.0)
        (end,) = [change for change in self.changes() if isinstance(change, Ended) and change.task_id == "s"]
        assert end.state is TaskState.COMPLETED
        for name, stage in self.region.stages.items():
            if not self.region.processes[name].dead:
                assert not (stage.work.flows if isinstance(stage.work, Hop) else stage.work.tasks)  # type: ignore[union-attr]


@contextlib.asynccontextmanager
async def place(case: Case) -> AsyncIterator[Place]:
    asyncio.get_running_loop().set_task_factory(task_factory)
    broker = MemoryBroker(latency_s=0.001, session_timeout_s=3.0)
    async with MemoryBus(broker, "test") as bus:
        await bus.create_topics(topics.specs(["e1", "e2"], Partitions(cloud=2)))
        made = Place(broker, bus, case)
        made.build()
        async with asyncio.timeout(60.0):
            while not all(stage.joined for stage in made.region.stages.values()):
                await asyncio.sleep(0.1)
        yield made
        assert [end for process in made.region.processes.values() for end in process.ends] == []
        await made.region.end()


@pytest.mark.parametrize("kind", list(CASES), ids=[kind.value for kind in CASES])
def test_a_session_of_each_kind_answers_every_frame_and_ends_as_completed(kind: Kind) -> None:
    async def run() -> None:
        async with place(CASES[kind]) as p:
            session = await p.open()
            assert session.placed is not None
            assert session.placed.placement.kind is kind
            await p.stream(session, 100)
            await p.close(session)

    run_virtual(run())


EVERYWHERE = CASES[Kind.DEVICE_EDGE_CLOUD]


def test_a_session_survives_the_loss_of_its_edge_and_loses_no_frame() -> None:
    async def run() -> None:
        async with place(EVERYWHERE) as p:
            session = await p.open()
            assert session.placed is not None
            lost = session.placed.placement.edge
            assert lost is not None
            await p.stream(session, 1500, {300: p.region.processes[lost].crash})
            assert (session.placed.attempt, session.placed.placement.edge) == (2, {"e1": "e2", "e2": "e1"}[lost])
            await p.close(session)

    run_virtual(run())


@pytest.mark.parametrize("away", ["planners", "leader"])
def test_a_session_goes_on_while_the_planner_is_killed(away: str) -> None:
    """Also through frames that come while no planner is there at all."""

    async def run() -> None:
        async with place(EVERYWHERE) as p:
            session = await p.open()
            leader = p.region.leader()
            assert leader is not None
            names = [name for name, one in p.region.planners.items() if away == "planners" or one is leader]

            def kill() -> None:
                for name in names:
                    p.region.processes[name].crash()

            def start() -> None:
                for name in names:
                    p.region.processes[name].start()

            await p.stream(session, 1000, {100: kill, 400: start})
            assert session.placed is not None
            assert session.placed.attempt == 1
            await p.close(session)

    run_virtual(run())


def test_a_session_survives_a_cloud_stage_that_is_killed_and_one_that_is_stopped() -> None:
    async def run() -> None:
        async with place(EVERYWHERE) as p:
            session = await p.open()
            await session.push(frame(0, CUT_BYTES[0]))
            hops = {name: p.region.stages[name].work for name in ("c1", "c2")}
            (serving,) = [name for name, hop in hops.items() if isinstance(hop, Hop) and hop.flows]
            (other,) = {"c1", "c2"} - {serving}
            first, second = p.region.processes[serving], p.region.processes[other]
            stops: list[asyncio.Task[None]] = []
            events: dict[int, Callable[[], object]] = {
                200: first.crash,
                900: first.start,
                1500: lambda: stops.append(asyncio.create_task(second.stop())),
            }
            await p.stream(session, 2500, events)
            await asyncio.gather(*stops)
            await p.close(session)

    run_virtual(run())


def test_a_session_leaves_an_edge_that_drains() -> None:
    async def run() -> None:
        async with place(EVERYWHERE) as p:
            session = await p.open()
            assert session.placed is not None
            stopped = session.placed.placement.edge
            assert stopped is not None
            stops: list[asyncio.Task[None]] = []
            events = {300: lambda: stops.append(asyncio.create_task(p.region.processes[stopped].stop()))}
            await p.stream(session, 1000, events)
            await asyncio.gather(*stops)
            assert session.placed.placement.edge not in (None, stopped)
            assert [change.cause for change in p.changes() if isinstance(change, Retried)] == ["draining"]
            await p.close(session)

    run_virtual(run())


def test_a_device_that_restarts_has_lost_its_session() -> None:
    async def run() -> None:
        async with place(EVERYWHERE) as p:
            session = await p.open()
            future = session.push(frame(0, CUT_BYTES[0]))
            device = p.region.processes["d1"]
            device.crash()
            await asyncio.sleep(1.0)
            error = future.exception()
            assert isinstance(error, SessionEndedError)
            assert error.repeatable
            device.start()
            await asyncio.sleep(10.0)
            (end,) = [change for change in p.changes() if isinstance(change, Ended)]
            assert (end.state, end.cause) == (TaskState.FAILED, "input_lost")
            assert not p.device.tasks
            assert all(not stage.work.flows for stage in p.region.stages.values() if isinstance(stage.work, Hop))

    run_virtual(run())


def test_a_session_and_ordinary_tasks_on_the_same_edge_do_not_starve_each_other() -> None:
    async def run() -> None:
        async with place(CASES[Kind.EDGE]) as p:
            session = await p.open()
            task = TaskSubmitted(task_id="t", device="d1", model="toy", samples=400, input=SeedInput(seed=1))
            await p.bus.send(topics.TASKS, messages.encode(task), key="t", partition=0)
            await p.stream(session, 400)
            await asyncio.sleep(10.0)
            ended = {change.task_id: change.state for change in p.changes() if isinstance(change, Ended)}
            assert ended == {"t": TaskState.COMPLETED}
            await p.close(session)

    run_virtual(run())

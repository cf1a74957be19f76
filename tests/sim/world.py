"""A whole region on the embedded bus in virtual time: the real planner, the real stages, modelled machines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bus import topics
from bus.headers.tracing import SpanSink
from bus.identity.keys import Master, Speaker
from bus.identity.signed_bus import signed
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import SeedInput, TaskSubmitted
from bus.port import Bus
from bus.tensors import Array
from bus.values import ModelProfile, Objective, Role
from deploy.services import wiring as nodes
from loadgen.replay.outcome import Outcome
from loadgen.replay.replay import replay
from loadgen.replay.schedule import Entry, Schedule
from planner.service.service import PlannerService
from stages.devices.device import Device
from stages.hops.hop import Hop
from stages.membership.settings import NodeSettings
from stages.network.played import NO_NETWORK, PlayedNetwork
from stages.node import Node
from stages.runner import ModelledRunner

LAYERS = ("conv", "pool", "dense")
CUT_BYTES = (40_000, 60_000, 10_000, 40)


def profile(role: Role, scale: float = 1.0, model: str = "toy") -> ModelProfile:
    """A model of three layers, slower upstream."""
    speed = {Role.DEVICE: 4.0, Role.EDGE: 2.0, Role.CLOUD: 1.0}[role] * scale
    return ModelProfile(
        model=model,
        sha256="0" * 64,
        platform=role.value,
        layer_names=LAYERS,
        layer_s=(0.010 * speed, 0.001 * speed, 0.008 * speed),
        cut_bytes=CUT_BYTES,
    )


@dataclass
class World:
    """The services of a running region, and the results and busy times recorded so far."""

    bus: MemoryBus
    broker: MemoryBroker
    service: PlannerService
    master: Master | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    works: dict[str, Device | Hop] = field(default_factory=dict)
    trace: list[tuple[float, str, str, str]] = field(default_factory=list)
    shown: list[tuple[str, int]] = field(default_factory=list)
    outputs: dict[tuple[str, int], list[Array]] = field(default_factory=dict)  # what was shown last

    def show(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        """Record a result that a device shows."""
        self.shown.append((task.task_id, sample))
        self.outputs[task.task_id, sample] = outputs

    def bus_of(self, role: str, name: str) -> Bus:
        """The bus of a named node or planner, signed if the region requires proofs of identity."""
        return signed(self.bus, None if self.master is None else self.master.key(Speaker(role, name)))

    def add(
        self, settings: NodeSettings, runner: ModelledRunner, on_span: SpanSink | None
    ) -> Coroutine[Any, Any, None]:
        """Make a node whose work is recorded in `trace`; return the coroutine that runs it."""

        def on_busy(node: str, part: str, task_id: str, begin_s: float, end_s: float) -> None:
            self.trace.append((round(end_s, 9), node, part, task_id))

        node = Node(
            self.bus_of(settings.role.value, settings.name),
            settings,
            runner,
            on_busy=on_busy,
            on_span=on_span,
        )
        work = nodes.make_work(node, self.show)
        self.nodes[settings.name] = node
        self.works[settings.name] = work
        return node.run(work)

    async def replay(self, tasks: Sequence[TaskSubmitted], gap_s: float = 0.05) -> dict[str, Outcome]:
        """Submit tasks at a constant rate and wait for all of them."""
        entries = tuple(Entry(at_s=index * gap_s, task=task) for index, task in enumerate(tasks))
        result = await replay(self.bus_of("loadgen", "world"), Schedule(entries=entries), drain_timeout_s=60.0)
        return {outcome.task_id: outcome for outcome in result.outcomes}


def task(number: int, device: str = "d1", samples: int = 10, **more: object) -> TaskSubmitted:
    """A task of the toy model."""
    return TaskSubmitted(
        task_id=f"t{number}", device=device, model="toy", samples=samples, input=SeedInput(seed=number), **more
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldOptions:
    """The nodes of a region, and how its planner places tasks."""

    devices: Sequence[str] = ("d1", "d2", "d3")
    edges: Sequence[str] = ("e1", "e2")
    clouds: Sequence[str] = ("c1",)
    slots: int = 1  # of each edge
    link1_bps: int = 100_000_000  # link capacities of each edge
    link2_bps: int = 20_000_000
    policy: str = "deepar"
    objective: Objective = Objective.PIPELINED
    lease_s: float = 10.0  # of each node
    master: Master | None = None  # None: the region requires no proofs of identity
    networks: Mapping[str, PlayedNetwork] = field(default_factory=dict)  # by node
    probes: bool = False  # whether nodes measure their links
    learning: bool = False  # whether the planner corrects its predictions
    make_runner: Callable[[Role], ModelledRunner] = lambda role: ModelledRunner([profile(role)])

    def nodes(self) -> list[NodeSettings]:
        """The settings of all nodes: clouds, edges, devices."""
        return [
            *(self._node(name, Role.CLOUD) for name in self.clouds),
            *(self._edge(name) for name in self.edges),
            *(self._node(name, Role.DEVICE) for name in self.devices),
        ]

    def _node(self, name: str, role: Role) -> NodeSettings:
        network = self.networks.get(name, NO_NETWORK)
        return NodeSettings(name=name, role=role, lease_s=self.lease_s, probes=self.probes, network=network)

    def _edge(self, name: str) -> NodeSettings:
        return replace(
            self._node(name, Role.EDGE),
            slots=self.slots,
            link1_capacity_bps=self.link1_bps,
            link2_capacity_bps=self.link2_bps,
        )


DEFAULT_WORLD = WorldOptions()


@contextlib.asynccontextmanager
async def world(
    options: WorldOptions = DEFAULT_WORLD, *, broker: MemoryBroker | None = None, on_span: SpanSink | None = None
) -> AsyncIterator[World]:
    """A region whose nodes have all joined."""
    broker = broker or MemoryBroker()
    async with MemoryBus(broker, "world") as bus:
        await nodes.create_missing_topics(bus, options.edges)
        objective = options.objective
        setup = nodes.PlannerSetup(
            policy=options.policy, objective=objective, execution=objective.execution, master=options.master,
            learning=options.learning,
        )  # fmt: skip
        service = nodes.make_planner(bus, setup)
        service.trace_to(on_span)
        made = World(bus, broker, service, options.master)
        async with nodes.embedded() as group:
            group.create_task(service.run(), name="planner")
            for settings in options.nodes():
                group.create_task(made.add(settings, options.make_runner(settings.role), on_span), name=settings.name)
            async with asyncio.timeout(60.0):
                while not all(node.status.joined for node in made.nodes.values()):
                    await asyncio.sleep(0.01)
            made.trace.append((round(asyncio.get_running_loop().time(), 9), "", "ready", ""))
            yield made


__all__ = ["World", "WorldOptions", "profile", "task", "topics", "world"]

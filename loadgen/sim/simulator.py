"""Full simulator: the complete live code in virtual time.

The real planner service, the real device, edge and cloud shells and a replay each have a connection to one
`MemoryBroker`; `ModelledRunner` replaces the computation. Frames are encoded, chunked, shaped and decoded as on Kafka.
The full simulator is about a thousand times slower than `loadgen.sim.core_driver` and validates it: for the same
scenario both give the same placements, and delays within one percent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from bus import topics
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import NodeAnnounced
from bus.values import Role
from loadgen.replay.outcome import Outcome, Recorder
from loadgen.replay.replay import Observers, replay
from loadgen.replay.schedule import Schedule
from loadgen.sim.core_driver import core_for
from loadgen.sim.platforms import Platforms
from loadgen.sim.scenario import Scenario, edge_name
from loadgen.sim.virtual_loop import run_virtual
from planner.service.service import PlannerService
from stages.devices.device import Device
from stages.hops.hop import Hop, hop_of
from stages.membership.settings import NodeSettings
from stages.network.played import PlayedNetwork
from stages.node import BusySink, Node
from stages.runner import ModelledRunner

JOIN_TIMEOUT_S = 120.0
"""Virtual-time limit for all nodes to join."""

LEASE_S = 60.0
"""Heartbeat interval, longer than the live default because heartbeats would dominate the number of events."""

DRAIN_TIMEOUT_S = 20_000.0
"""Virtual seconds without any task end after which the replay gives up; longer than the longest task."""


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """The result of a finished simulation."""

    outcomes: tuple[Outcome, ...]  # in due order
    virtual_s: float  # virtual time at the end
    records: int  # records on all topics


def simulate(
    scenario: Scenario,
    seed: int,
    platforms: Platforms,
    *,
    schedule: Schedule | None = None,
    on_busy: BusySink | None = None,
    progress: Callable[[Recorder], None] | None = None,
    horizon_s: float | None = None,
) -> SimulationResult:
    """Run a scenario on the real shells in virtual time; `schedule` replaces the scenario's own schedule.

    The same arguments give the same outcomes. `on_busy` is called for every busy period of a station. Raises
    `DeadlockError`, `HorizonError`, and the errors of the shells.
    """
    chosen = schedule or scenario.schedule(seed)
    return run_virtual(
        _simulate(scenario, seed, platforms, chosen, on_busy=on_busy, progress=progress), horizon_s=horizon_s
    )


async def _simulate(
    scenario: Scenario,
    seed: int,
    platforms: Platforms,
    schedule: Schedule,
    *,
    on_busy: BusySink | None,
    progress: Callable[[Recorder], None] | None,
) -> SimulationResult:
    broker = MemoryBroker()
    edges = [edge_name(index) for index in range(scenario.edges)]
    async with AsyncExitStack() as stack:

        async def connect(name: str) -> MemoryBus:
            return await stack.enter_async_context(MemoryBus(broker, name))

        bus = await connect("loadgen")
        await bus.create_topics(topics.specs(edges))
        service = PlannerService(await connect("planner"), lambda: core_for(scenario))
        nodes: list[tuple[Node, Device | Hop]] = []
        for announced in scenario.nodes(seed, platforms.profiles, lease_s=LEASE_S):
            node = Node(
                await connect(announced.node),
                settings_of(announced, scenario.network(announced.role)),
                ModelledRunner(announced.models),
                on_busy=on_busy,
            )
            nodes.append((node, Device(node) if announced.role is Role.DEVICE else hop_of(node)))
        serving: list[tuple[str, Coroutine[Any, Any, None]]] = [("planner", service.run())]
        serving += [(node.settings.name, node.run(work)) for node, work in nodes]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(serve, name=name) for name, serve in serving]
            await _joined([node for node, _ in nodes])
            result = await replay(
                bus, schedule, drain_timeout_s=DRAIN_TIMEOUT_S, observers=Observers(progress=progress)
            )
            for task in tasks:
                task.cancel()
        service.core.validate()
        records = sum([sum((await bus.end_offsets(spec.name)).values()) for spec in topics.specs(edges)])
    return SimulationResult(result.outcomes, asyncio.get_running_loop().time(), records)


async def _joined(nodes: Sequence[Node]) -> None:
    async with asyncio.timeout(JOIN_TIMEOUT_S):
        while not all(node.status.joined for node in nodes):
            await asyncio.sleep(0.01)


def settings_of(announced: NodeAnnounced, network: PlayedNetwork) -> NodeSettings:
    """Node settings with which a shell sends the given announcement, which has the latency of `network`."""
    return NodeSettings(
        name=announced.node,
        role=announced.role,
        region=announced.region,
        lease_s=announced.lease_s,
        slots=announced.slots,
        link1_capacity_bps=announced.link1_capacity_bps,
        link2_capacity_bps=announced.link2_capacity_bps,
        reachable_edges=announced.reachable_edges,
        network=network,
    )

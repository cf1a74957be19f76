"""The lease that every node holds: it stops by itself in time, and goes on as soon as the bus is back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from bus import topics
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.messages import Decision, LinkMeasurement
from bus.values import Role
from loadgen.sim.virtual_loop import run_virtual
from stages.membership.settings import NodeSettings
from stages.node import HEARTBEATS_PER_LEASE, Node
from stages.runner import ModelledRunner

LEASE_S = 10.0


class Idle:
    """Work that has nothing to do."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.measured: list[LinkMeasurement] = []
        self.resting = True

    async def run(self) -> None:
        self.node.serving.set()
        await asyncio.Event().wait()

    def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
        pass

    def idle(self) -> bool:
        return self.resting

    def links(self) -> list[LinkMeasurement]:
        return self.measured

    def on_lost(self) -> None:
        pass


@pytest.mark.parametrize("away_s", [7.0, 8.3, 9.9, 11.0, 30.0, 31.7])
def test_work_stops_while_the_bus_is_away_and_goes_on_at_once_when_it_is_back(away_s: float) -> None:
    async def main() -> tuple[float, float]:
        broker = MemoryBroker()
        clock = asyncio.get_running_loop().time
        async with MemoryBus(broker, "n") as bus:
            await bus.create_topics(topics.specs(["n"]))
            node = Node(bus, NodeSettings(name="n", role=Role.EDGE, slots=1, lease_s=LEASE_S), ModelledRunner([]))
            serving = asyncio.create_task(node.run(Idle(node)))
            await asyncio.sleep(3.1)
            await node.lease.gate()
            broker.pause()
            gone_s = clock()
            while node.lease.alive:
                await asyncio.sleep(0.01)
            stopped_s = clock() - gone_s
            await asyncio.sleep(gone_s + away_s - clock())
            assert not node.lease.alive
            broker.resume()
            back_s = clock()
            await node.lease.gate()
            resumed_s = clock() - back_s
            serving.cancel()
            await asyncio.wait([serving])
            return stopped_s, resumed_s

    stopped_s, resumed_s = run_virtual(main())
    assert LEASE_S / 2 - LEASE_S / HEARTBEATS_PER_LEASE <= stopped_s <= LEASE_S / 2 + 0.02
    assert resumed_s < 0.05

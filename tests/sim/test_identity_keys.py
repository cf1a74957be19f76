"""Nodes without a key, or with a key of another master, end with an error that says so; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from bus import topics
from bus.errors import ConfigError
from bus.identity.keys import Master
from bus.messages import (
    Decision,
    LinkMeasurement,
    NodeJoined,
)
from bus.values import Role
from loadgen.replay.replay import replay
from loadgen.replay.schedule import Entry, Schedule
from loadgen.sim.virtual_loop import run_virtual
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner
from tests.sim.forgeries import HORIZON_S, MASTER, dead_letters_of, leading
from tests.sim.planners import Town, town
from tests.sim.world import profile, task


async def _told(master: Master | None, started: str) -> tuple[str, list[str]]:
    """What a device fails of that can prove nothing, and what the region refused of it."""
    async with town(master=MASTER) as place:
        if started == "before the planner":
            starting = asyncio.create_task(_start(place, master))
            await asyncio.sleep(2.0)
        place.start("only", snapshot_every=2)
        await leading(place)
        if started == "behind a snapshot":
            await place.submit(range(4))
            await place.until_ended(4)
            await asyncio.sleep(1.0)
            assert (await place.bus.end_offsets(topics.SNAPSHOTS))[0] > 0
        if started != "before the planner":
            starting = asyncio.create_task(_start(place, master))
        clock = asyncio.get_running_loop().time
        began_s = clock()
        await asyncio.wait({starting})
        assert clock() - began_s < 5.0
        found: BaseException | None = starting.exception()
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        assert isinstance(found, ConfigError)
        await asyncio.sleep(1.0)
        return str(found), [letter.error for letter in await dead_letters_of(place)]


def test_a_node_with_no_key_or_a_key_of_another_master_is_told_at_once() -> None:
    for started in ("after the planner", "behind a snapshot"):
        told, refused = run_virtual(_told(None, started), horizon_s=HORIZON_S)
        assert "device d1 has no key" in told
        assert refused == []  # it said nothing
    other = Master(bytes(32))
    told, refused = run_virtual(_told(other, "after the planner"), horizon_s=HORIZON_S)
    assert f"that of device:d1 is of {other.fingerprint}" in told
    assert refused == []


@pytest.mark.parametrize("end", ["left", "killed"])
def test_a_node_with_a_new_key_waits_for_the_planner_that_knows_it(end: str) -> None:
    """A region changes its master: node and planner start at once, behind a log that demands the old one."""

    async def run() -> tuple[bool, list[str]]:
        async with town(master=MASTER) as place:
            old = place.start("old", snapshot_every=2)
            await place.submit(range(4))
            await place.until_ended(4)
            await (old.stop() if end == "left" else old.kill())
            fresh = Master(bytes(32))
            starting = asyncio.create_task(_start(place, fresh))
            await asyncio.sleep(0.5)
            assert not starting.done()
            place.start("new", master=fresh)
            await asyncio.sleep(5.0)
            assert not starting.done()
            joined = [
                change.node.node
                for decision in (await place.story()).decisions
                for change in decision.changes
                if isinstance(change, NodeJoined) and len(change.node.incarnation) == 12  # a real node's
            ]
            starting.cancel()
            await asyncio.wait({starting})
            return joined == ["d1"], [letter.error for letter in await dead_letters_of(place) if "d1" in letter.error]

    assert run_virtual(run(), horizon_s=HORIZON_S) == (True, [])


def test_a_node_hears_of_a_demand_that_is_new() -> None:
    told, refused = run_virtual(_told(None, "before the planner"), horizon_s=HORIZON_S)
    assert "device d1 has no key" in told
    assert refused  # what it had said before
    assert all("the record is not signed" in error for error in refused)


async def _start(place: Town, master: Master | None) -> None:
    bus = Town(place.broker, place.bus, master=master).bus_of("device:d1")
    node = Node(bus, NodeSettings(name="d1", role=Role.DEVICE), ModelledRunner([profile(Role.DEVICE)]))

    class Idle:
        async def run(self) -> None:
            node.serving.set()
            await asyncio.get_running_loop().create_future()

        def on_decision(self, decision: Decision, fenced: Any) -> None: ...

        def idle(self) -> bool:
            return True

        def links(self) -> Iterable[LinkMeasurement]:
            return ()

        def on_lost(self) -> None: ...

    await node.run(Idle())


def test_a_replay_without_a_key_is_told_before_it_submits() -> None:
    async def run() -> int:
        async with town(master=MASTER) as place:
            place.start("only")
            await leading(place)
            with pytest.raises(ConfigError, match="has no key"):
                await replay(place.bus, Schedule(entries=(Entry(at_s=0.0, task=task(1)),)), drain_timeout_s=5.0)
            result = await replay(
                place.bus_of("loadgen:x"), Schedule(entries=(Entry(at_s=0.0, task=task(1)),)), drain_timeout_s=5.0
            )
            assert [outcome.state for outcome in result.outcomes] == ["COMPLETED"]
            return (await place.bus.end_offsets(topics.TASKS))[0]

    assert run_virtual(run(), horizon_s=HORIZON_S) == 1

"""Several planners share many regions: one joins, one leaves, one dies, and no task is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from bus import topics
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.topics import Partitions
from loadgen.sim.virtual_loop import run_virtual
from planner.core.core import PlannerCore
from planner.service.region_context import PlannerSettings
from planner.service.region_group import RegionShare
from planner.service.service import PlannerService, Standing
from tests.decision_story import Story
from tests.sim.planners import Town

REGIONS = 6


@dataclass
class Sharer:
    """A planner process that shares regions."""

    broker: MemoryBroker
    name: str
    bus: MemoryBus = field(init=False)
    share: RegionShare = field(init=False)
    task: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        self.bus = MemoryBus(self.broker, self.name)
        self.share = RegionShare(self.bus, self._make)
        self.task = asyncio.create_task(self._run(), name=self.name)

    def _make(self, region: int) -> PlannerService:
        return PlannerService(
            self.bus, lambda: PlannerCore(region), PlannerSettings(name=self.name, region=region, lease_s=1.0)
        )

    async def _run(self) -> None:
        async with self.bus:
            await self.share.run()

    def leads(self) -> list[int]:
        """The regions that it leads now."""
        return sorted(r for r, service in self.share.services.items() if service.standing is Standing.LEADING)

    async def end(self, *, kill: bool = False) -> None:
        """As by SIGTERM or SIGKILL."""
        if kill:
            self.bus.kill()
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def _until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)


async def _moves() -> dict[int, Story]:
    broker = MemoryBroker()
    async with MemoryBus(broker, "towns") as bus:
        await bus.create_topics(topics.specs(partitions=Partitions(regions=REGIONS)))
        towns = [Town(broker, bus, region) for region in range(REGIONS)]
        for town in towns:
            await town.announce()
        async with asyncio.TaskGroup() as group:
            playing = [group.create_task(town.play()) for town in towns]
            submitting = [group.create_task(town.submit(range(40), gap_s=0.5)) for town in towns]
            a = Sharer(broker, "a")
            await _until(lambda: len(a.leads()) == REGIONS)

            b = Sharer(broker, "b")  # joins: half of the regions move
            await _until(lambda: len(a.leads()) == len(b.leads()) == REGIONS // 2)
            assert not set(a.leads()) & set(b.leads())

            c = Sharer(broker, "c")
            await _until(lambda: len(a.leads()) == len(b.leads()) == len(c.leads()) == REGIONS // 3)

            await b.end()  # leaves
            await _until(lambda: len(a.leads()) + len(c.leads()) == REGIONS)

            await a.end(kill=True)  # dies: the group finds out when its session runs out
            await _until(lambda: len(c.leads()) == REGIONS)
            await asyncio.gather(*submitting)
            stories = {town.region: await town.until_ended(40) for town in towns}
            await c.end()
            for task in playing:
                task.cancel()
    return stories


def test_planners_that_join_leave_and_die_move_regions_and_lose_no_task() -> None:
    stories = run_virtual(_moves(), horizon_s=3600.0)
    for story in stories.values():
        story.check({f"t{number}" for number in range(40)})
    owners = {region: [opened.planner for opened in story.opened] for region, story in stories.items()}
    assert all(names[0] == "a" and names[-1] == "c" for names in owners.values())
    assert all(first != second for names in owners.values() for first, second in pairwise(names)), (
        "a region that did not move was claimed again"
    )
    assert Counter(name for names in owners.values() for name in names)["b"] >= REGIONS // 2

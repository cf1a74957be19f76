"""Many regions, several planners: a consumer group says who looks after which region.

A region is a partition of the control topics, and the group shares partitions out evenly, so a planner that joins takes
regions over and one that leaves or dies gives them back. The group serves liveness only; that no two planners decide for
one region is the epochs' work (`planner.service.service`). So an assignment need not be punctual: whoever was given a region
stands by until its leader lets go, and whoever lost one goes on until it hears of it, and then leaves politely.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

import structlog

from bus import topics
from bus.errors import BusError
from bus.port import Bus, TopicPartition
from planner.service.service import RETRY_S, PlannerService

PLANNER_GROUP = "deepar.planners"
"""The consumer group of all planners that share the regions."""

log = structlog.get_logger("planner")


class RegionShare:
    """One planner process's share of all regions. `make_service` gives the planner of a region."""

    def __init__(self, bus: Bus, make_service: Callable[[int], PlannerService]) -> None:
        self.services: dict[int, PlannerService] = {}  # by region: what this process looks after now
        self._bus = bus
        self._make_service = make_service
        self._running: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Serve until cancelled. Raises what a region's planner raises, and `BusError` where the group cannot be joined."""
        member = await self._bus.join([topics.NODES], group=PLANNER_GROUP, on_assigned=self._assigned)
        try:
            while True:
                for running in self._running.values():
                    if running.done():
                        running.result()  # it serves until it is cancelled: this raises
                try:
                    # The group is joined for its partitions; what stands in them the services read for themselves.
                    if await member.fetch(timeout_s=RETRY_S):
                        await member.commit({held: member.position(held) for held in member.assignment()})
                except BusError as error:
                    log.warning("planner group not reached; retrying", error=str(error))
                    await asyncio.sleep(RETRY_S)
        finally:
            await self._stop(list(self._running))
            await member.close()

    async def _assigned(self, partitions: frozenset[TopicPartition]) -> None:
        """Keep what stays, leave what goes to others, begin what is new."""
        regions = sorted(region for _, region in partitions)
        await self._stop([region for region in self._running if region not in regions])
        for region in regions:
            if region not in self._running:
                service = self.services[region] = self._make_service(region)
                self._running[region] = asyncio.create_task(service.run(), name=f"{service.name}: region {region}")
        log.info("regions assigned", regions=regions)

    async def _stop(self, regions: Iterable[int]) -> None:
        stopping = [self._running.pop(region) for region in regions]
        for running in stopping:
            running.cancel()
        for running in stopping:
            with contextlib.suppress(asyncio.CancelledError):
                await running
        self.services = {region: self.services[region] for region in self._running}


__all__ = ["PLANNER_GROUP", "RegionShare"]

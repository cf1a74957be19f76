"""Region group: a Kafka consumer group that assigns regions to planner processes.

A region is a partition of the control topics, and the group distributes partitions evenly among the processes that are
alive. The group serves liveness only; epochs ensure that each region has one leader (`planner.service.service`). A late
assignment is therefore harmless: the new planner stands by until the old leader leaves, and the old leader goes on
until its process learns that the region was revoked.
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
    """The regions assigned to one planner process. `make_service` creates the planner of a region."""

    def __init__(self, bus: Bus, make_service: Callable[[int], PlannerService]) -> None:
        self.services: dict[int, PlannerService] = {}  # by region: the planners this process runs now
        self._bus = bus
        self._make_service = make_service
        self._running: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Serve until cancelled. Raises any error of a region's planner, and `BusError` if joining the group fails."""
        member = await self._bus.join([topics.NODES], group=PLANNER_GROUP, on_assigned=self._assigned)
        try:
            while True:
                for running in self._running.values():
                    if running.done():
                        running.result()  # raises: a planner ends by an error or by cancellation only
                try:
                    # Membership only provides the assignment; each planner reads the topics itself.
                    if await member.fetch(timeout_s=RETRY_S):
                        await member.commit({held: member.position(held) for held in member.assignment()})
                except BusError as error:
                    log.warning("planner group not reached; retrying", error=str(error))
                    await asyncio.sleep(RETRY_S)
        finally:
            await self._stop(list(self._running))
            await member.close()

    async def _assigned(self, partitions: frozenset[TopicPartition]) -> None:
        """Stop the planners of revoked regions and start those of newly assigned ones."""
        regions = sorted(region for _, region in partitions)
        await self._stop([region for region in self._running if region not in regions])
        for region in regions:
            if region not in self._running:
                service = self.services[region] = self._make_service(region)
                self._running[region] = asyncio.create_task(
                    service.run(), name=f"{service.context.settings.name}: region {region}"
                )
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

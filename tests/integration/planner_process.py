"""A planner as a process that is quick to start, for a test that kills many: forked from one that has imported everything."""

from __future__ import annotations

import asyncio
import logging
from multiprocessing.synchronize import Event

import structlog
import uvloop

from bus.kafka.bus import KafkaBus, KafkaConnection
from planner.core.core import PlannerCore
from planner.service.region_context import PlannerSettings
from planner.service.service import PlannerService, Standing


def serve(bootstrap: str, name: str, region: int, lease_s: float, snapshot_every: int, leads: Event) -> None:
    """Run a planner until killed; `leads` is set while it leads."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(bootstrap, name, region, lease_s, snapshot_every, leads))


async def _serve(bootstrap: str, name: str, region: int, lease_s: float, snapshot_every: int, leads: Event) -> None:
    async with KafkaBus(KafkaConnection(bootstrap_servers=bootstrap)) as bus, asyncio.TaskGroup() as group:
        service = PlannerService(
            bus,
            lambda: PlannerCore(region),
            PlannerSettings(name=name, region=region, lease_s=lease_s, snapshot_every=snapshot_every),
        )
        group.create_task(service.run(), name=name)
        while True:
            if service.standing is Standing.LEADING:
                leads.set()
            await asyncio.sleep(0.01)

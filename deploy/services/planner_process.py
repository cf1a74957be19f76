"""The planner process: for one region, several regions, or a share of all (`deepar planner --regions`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from bus import topics
from bus.errors import ConfigError
from bus.port import Bus
from deploy.services.broker_wait import Patience
from deploy.services.process import until_stopped
from deploy.services.telemetry.learned_gauges import by_region
from deploy.services.telemetry.otel import tracing
from deploy.services.telemetry.probes import Health, serve_probes
from deploy.services.topic_watch import TopicWatch, used_by
from deploy.services.wiring import require_region
from planner.core.core import PlannerCore
from planner.service.region_group import RegionShare
from planner.service.service import PlannerService, Standing

ALL = "all"


def parse_regions(text: str) -> tuple[int, ...] | None:
    """`all` as None, `0,2,5` as numbers, ascending. Raises `ConfigError`."""
    if text.strip().lower() == ALL:
        return None
    try:
        regions = sorted({int(part) for part in text.split(",")})
    except ValueError:
        regions = []
    if not regions or regions[0] < 0:
        raise ConfigError(f"--regions {text}: must be `all` or a comma-separated list such as 0,1,2")
    return tuple(regions)


def planner_counters(services: Iterable[PlannerService]) -> dict[str, float]:
    """Counters for `/metrics`, summed over the planners of this process."""
    some = list(services)
    return {
        "decisions": float(sum(service.counters.decisions for service in some)),
        "dead_letters": float(sum(service.counters.dead_letters for service in some)),
        "lost_inputs": float(sum(service.counters.lost_inputs for service in some)),
        "policy_errors": float(sum(service.counters.policy_errors for service in some)),
        "learned": float(sum(service.counters.learned for service in some)),
        "input_failures": float(sum(service.counters.input_failures for service in some)),
        "wrong_identity": float(sum(service.context.input_filter.refused for service in some)),
    }


def planner_gauges(cores: Iterable[PlannerCore]) -> dict[str, float]:
    """Live tasks, and nodes that are avoided because attempts keep failing there."""
    found = list(cores)
    circuits = [circuit for core in found for circuit in core.circuits.values()]
    return {
        "tasks": float(sum(core.live_tasks for core in found)),
        "failing_nodes": float(sum(circuit.until_s is not None for circuit in circuits)),
    }


async def run_planner(
    bus: Bus, service: PlannerService, *, http_port: int | None = None, http_host: str = "127.0.0.1"
) -> None:
    """Run the planner of one region as a process."""
    patience = Patience.from_env()
    async with contextlib.AsyncExitStack() as stack:
        service.trace_to(await stack.enter_async_context(tracing("deepar-planner")))
        await patience.through(lambda: stack.enter_async_context(bus))
        await patience.through(lambda: require_region(bus, service.context.settings.region))
        watch = await stack.enter_async_context(
            TopicWatch(bus, used_by("planner"), service.context.settings.region + 1).watching()
        )

        def look() -> Health:
            core = service.core
            detail = {"standing": service.standing.value}
            gauges = planner_gauges([core])
            leading = {str(service.context.settings.region): service.standing is Standing.LEADING}
            return Health(
                ready=service.standing is not Standing.READING,
                detail=detail,
                gauges=gauges,
                counters=planner_counters([service]),
                leading=leading,
                statistics={str(service.context.settings.region): service.context.statistics},
                learned=by_region({str(service.context.settings.region): core}),
            ).without(watch.missing)

        labels = {
            "role": "planner",
            "node": service.context.settings.name,
            "region": str(service.context.settings.region),
        }
        async with serve_probes(look, port=http_port, host=http_host, labels=labels):
            await until_stopped(
                service.run(), planner=service.context.settings.name, region=service.context.settings.region
            )


class _Listed:
    """One planner per listed region; each leads its region or stands by if another planner leads."""

    def __init__(self, make_service: Callable[[int], PlannerService], regions: tuple[int, ...]) -> None:
        self.services = {region: make_service(region) for region in regions}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for region, service in self.services.items():
                group.create_task(service.run(), name=f"{service.context.settings.name}: region {region}")


async def run_regions(
    bus: Bus,
    make_service: Callable[[int], PlannerService],
    regions: tuple[int, ...] | None,
    *,
    name: str,
    http_port: int | None = None,
    http_host: str = "127.0.0.1",
) -> None:
    """Run planners for these regions as a process; None: for a share of all regions, divided among such planners.

    Raises `ConfigError` if the topics have no partition for a region.
    """
    patience = Patience.from_env()
    async with contextlib.AsyncExitStack() as stack:
        on_span = await stack.enter_async_context(tracing("deepar-planner"))
        await patience.through(lambda: stack.enter_async_context(bus))

        def make(region: int) -> PlannerService:
            service = make_service(region)
            service.trace_to(on_span)
            return service

        await patience.through(lambda: require_region(bus, max(regions) if regions else 0))
        planners = _Listed(make, regions) if regions is not None else RegionShare(bus, make)
        total = await patience.through(lambda: bus.partitions(topics.DECISIONS))
        needed = max(regions) + 1 if regions else total
        watch = await stack.enter_async_context(TopicWatch(bus, used_by("planner"), needed).watching())

        def look() -> Health:
            services = planners.services
            return Health(
                ready=all(service.standing is not Standing.READING for service in services.values()),
                detail={"standing": {str(region): service.standing.value for region, service in services.items()}},
                gauges=planner_gauges(service.core for service in services.values()),
                counters=planner_counters(services.values()),
                leading={str(region): service.standing is Standing.LEADING for region, service in services.items()},
                statistics={str(region): service.context.statistics for region, service in services.items()},
                learned=by_region({str(region): service.core for region, service in services.items()}),
            ).without(watch.missing)

        which = ALL if regions is None else ",".join(map(str, regions))
        labels = {"role": "planner", "node": name, "region": which}
        async with serve_probes(look, port=http_port, host=http_host, labels=labels):
            await until_stopped(planners.run(), planner=name, regions=which, of=total)

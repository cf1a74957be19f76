"""The process of `deepar up`: a planner and all stages of one file, on one bus and one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from bus.identity.keys import Key, Master, Speaker
from bus.identity.signed_bus import signed
from bus.port import Bus
from bus.topics import Partitions
from deploy.services import wiring
from deploy.services.broker_wait import Patience
from deploy.services.identities import key_of
from deploy.services.process import until_stopped
from deploy.services.runners import make_runner
from deploy.services.serving import endpoint_of
from deploy.services.settings import NodeOptions, PlannerOptions, UpSettings
from deploy.services.telemetry.otel import tracing
from deploy.services.topic_watch import TopicWatch, used_by
from deploy.services.wiring import PlannerSetup, Stage, node_settings
from stages.membership.settings import NodeSettings


async def run_up(
    settings: UpSettings, bus: Bus, http_port: int | None, http_host: str, master: Master | None = None
) -> None:
    """Run planner and stages on one bus, in one event loop; with a `master`, all of them prove their identity."""
    options: list[NodeOptions] = [*settings.cloud, *settings.edge, *settings.device]
    endpoints = {option.name: endpoint_of(option) for option in settings.device}
    patience = Patience.from_env()
    async with contextlib.AsyncExitStack() as stack:
        on_span = await stack.enter_async_context(tracing("deepar"))
        await patience.through(lambda: stack.enter_async_context(bus))
        partitions, edges = Partitions(regions=settings.bus.regions), [edge.name for edge in settings.edge]
        await patience.through(lambda: wiring.create_missing_topics(bus, edges, partitions))
        await patience.through(lambda: wiring.require_region(bus, settings.region))
        watched = dict.fromkeys(used_by("planner"))
        for option in options:
            watched |= dict.fromkeys(used_by(node_settings(option, region=0, lease_s=1.0).role.value, option.name))
        await stack.enter_async_context(TopicWatch(bus, watched, settings.region + 1).watching())
        runners = {}
        for option in options:
            made = node_settings(option, region=settings.region, lease_s=settings.lease)
            runners[option.name] = await asyncio.to_thread(
                make_runner, made.role, option, option.models or settings.models, wiring.log.info
            )

        stages: list[Stage] = []
        for option in options:
            made = node_settings(option, region=settings.region, lease_s=settings.lease)
            key = node_key(made, option, master)
            stages.append(Stage(signed(bus, key), made, runners[option.name], on_span=on_span))
            if (endpoint := endpoints.get(option.name)) is not None:
                stage = stages[-1]
                serving = endpoint.serving(option.name, stage.device, stage.ready, runners[option.name])
                stage.inference = await stack.enter_async_context(serving)

        async def serve() -> None:
            async with asyncio.TaskGroup() as group:
                if settings.planner is not None:
                    service = wiring.make_planner(bus, planner_setup(settings, settings.planner, master))
                    service.trace_to(on_span)
                    group.create_task(service.run(), name="planner")
                for stage in stages:
                    group.create_task(stage.node.run(stage.work), name=stage.node.settings.name)

        await until_stopped(serve(), nodes=len(options), region=settings.region)


def planner_setup(settings: UpSettings, planner: PlannerOptions, master: Master | None) -> PlannerSetup:
    """The settings of the file's planner."""
    return PlannerSetup(
        region=settings.region,
        policy=planner.policy,
        objective=settings.objective,
        execution=settings.execution,
        max_waiting=planner.max_waiting,
        max_waiting_per_device=planner.max_waiting_per_device,
        patience_s=planner.patience,
        when_late=planner.when_late,
        learning=planner.learn,
        lease_s=planner.lease,
        master=master,
    )


def node_key(settings: NodeSettings, option: NodeOptions, master: Master | None) -> Key | None:
    """The key of a node: from its configured file, else derived from the master."""
    speaker = Speaker(settings.role.value, settings.name)
    if option.identity_key is not None:
        return key_of(speaker, Path(option.identity_key))
    return None if master is None else master.key(speaker)

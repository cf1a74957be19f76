"""The processes of a live comparison: a planner and nodes with modelled machines, on Kafka until terminated."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
import uvloop

from bus.errors import BusError, BusUnavailableError
from bus.kafka.bus import KafkaBus, KafkaConnection
from bus.messages import NodeAnnounced
from bus.topics import specs
from bus.values import Role
from loadgen.sim.core_driver import core_for
from loadgen.sim.scenario import Scenario
from loadgen.sim.simulator import settings_of
from loadgen.workers import Worker
from planner.service.service import PlannerService
from stages.devices.device import Device
from stages.hops.hop import hop_of
from stages.node import Node
from stages.runner import ModelledRunner


@dataclass(frozen=True, slots=True)
class LiveServices:
    """Work of one process; it is pickled and sent to the process."""

    connection: KafkaConnection
    nodes: tuple[NodeAnnounced, ...]  # nodes to run, as their announcements describe them
    scenario: Scenario  # the networks that the nodes play, and the settings of the planner
    has_planner: bool = False  # whether to run the planner of region 0


@contextmanager
def running(scenario: Scenario, nodes: Sequence[NodeAnnounced], connection: KafkaConnection) -> Iterator[None]:
    """Run planner, cloud, edges and two halves of the devices, each in its own process.

    Raises `BusError` naming the processes that ended early, if the bus becomes unavailable inside the block.
    """
    devices = [node for node in nodes if node.role is Role.DEVICE]
    parts: dict[str, tuple[NodeAnnounced, ...]] = {
        "planner": (),
        "cloud": tuple(node for node in nodes if node.role is Role.CLOUD),
        "edges": tuple(node for node in nodes if node.role is Role.EDGE),
        "devices-1": tuple(devices[::2]),
        "devices-2": tuple(devices[1::2]),
    }
    processes: list[Worker] = []
    try:
        for name, members in parts.items():
            spec = LiveServices(connection, members, scenario, has_planner=name == "planner")
            process = Worker(target=_run, args=(spec,), name=f"deepar compare: {name}", daemon=True)
            process.start()
            processes.append(process)
        yield
    except BusUnavailableError as error:
        ended = [f"{running.name} (exit code {running.exitcode})" for running in processes if not running.is_alive()]
        if ended:
            raise BusError(f"{error}; ended early: {', '.join(ended)}") from None
        raise
    finally:
        for running in processes:
            running.terminate()
        for running in processes:
            running.join(5)
            if running.is_alive():
                running.kill()


def _run(services: LiveServices) -> None:
    """Run until the process is terminated."""
    # Only warnings are logged, because five processes share one terminal.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(services))


async def _serve(services: LiveServices) -> None:
    async with KafkaBus(services.connection) as bus, asyncio.TaskGroup() as group:
        edges = [node.node for node in services.nodes if node.role is Role.EDGE]
        await bus.create_topics(specs(edges))
        scenario = services.scenario
        if services.has_planner:
            group.create_task(PlannerService(bus, lambda: core_for(scenario)).run(), name="planner")
        for announced in services.nodes:
            settings = settings_of(announced, scenario.network(announced.role))
            node = Node(bus, settings, ModelledRunner(announced.models))
            work = Device(node) if announced.role is Role.DEVICE else hop_of(node)
            group.create_task(node.run(work), name=announced.node)

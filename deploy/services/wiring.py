"""Construction of services: a bus configured from the environment, and a node or planner on that bus."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from bus import topic_settings, topics
from bus.errors import BusError, BusUnavailableError, ConfigError, UnknownTopicError
from bus.headers.tracing import SpanSink
from bus.identity.keys import Master
from bus.kafka.bus import KafkaBus
from bus.kafka.connection import KafkaConnection
from bus.port import Bus
from bus.topics import Partitions
from bus.values import Execution, Objective, Role
from deploy.services.broker_wait import Patience
from deploy.services.process import until_stopped
from deploy.services.result_file import ResultFile
from deploy.services.settings import DeviceOptions, EdgeOptions, NodeOptions
from deploy.services.telemetry.otel import tracing
from deploy.services.telemetry.probes import Health, serve_probes
from deploy.services.topic_watch import TopicWatch, used_by
from planner.core.core import PlannerCore
from planner.core.options import DEFAULT_PATIENCE_S, CoreOptions, WhenLate
from planner.service.region_context import PlannerSettings
from planner.service.service import PlannerService
from stages.devices.attempt import ResultSink
from stages.devices.device import Device
from stages.hops.hop import Hop, hop_of
from stages.membership.settings import NodeSettings
from stages.node import BusySink, Node
from stages.runner import ComputesBatches, Runner, UsesGpu

if TYPE_CHECKING:  # they import the inference runtime
    from deploy.services.serving import Endpoint
    from stages.serving.inference import DeviceInference

log = structlog.get_logger("deepar")


def kafka_bus(bootstrap_servers: str | None = None, *, delivery_timeout_s: float | None = None) -> KafkaBus:
    """A Kafka bus, configured from the environment. Raises `ConfigError`."""
    connection = KafkaConnection.from_env(bootstrap_servers=bootstrap_servers, delivery_timeout_s=delivery_timeout_s)
    return KafkaBus(connection)


async def create_missing_topics(bus: Bus, edges: Sequence[str] = (), partitions: Partitions | None = None) -> None:
    """Create the missing topics of a system with these edges."""
    await bus.create_topics(topics.specs(edges, partitions))


async def require_region(bus: Bus, region: int, edges: Sequence[str] = ()) -> None:
    """Create missing topics if this user has the permission. Raises `ConfigError` if topics are still missing, have no
    partition for the region, or have settings that contradict the table of topics.
    """
    try:
        await create_missing_topics(bus, edges)
    except BusUnavailableError:
        raise
    except BusError as error:
        log.info("topics not created: not permitted", error=str(error))
    await require_partition(bus, region)
    topic_settings.require(await bus.found_topics(spec.name for spec in topics.specs(edges)))


async def require_partition(bus: Bus, region: int) -> None:
    """Raise `ConfigError` unless the topics exist and have a partition for the region."""
    try:
        regions = await bus.partitions(topics.DECISIONS)
    except UnknownTopicError:
        raise ConfigError("the topics do not exist", remedy="create them: deepar topics create") from None
    if region >= regions:
        raise ConfigError(f"region {region} does not exist: the topics have {regions} region(s), counted from 0")


def node_settings(options: NodeOptions, *, region: int, lease_s: float) -> NodeSettings:
    """The settings that a node with these options announces."""
    make = partial(
        NodeSettings,
        name=options.name,
        region=region,
        lease_s=lease_s,
        network=options.network,
        probes=True,
        rehearses=True,
    )
    match options:
        case DeviceOptions():
            return make(role=Role.DEVICE, link1_capacity_bps=options.link, reachable_edges=options.edges)
        case EdgeOptions():
            return make(
                role=Role.EDGE,
                slots=options.slots,
                link1_capacity_bps=options.link1,
                link2_capacity_bps=options.link2,
            )
        case _:
            return make(role=Role.CLOUD)


def make_work(node: Node, on_result: ResultSink | None = None) -> Device | Hop:
    """The work loop for a node's role: `Device` or `Hop`."""
    if node.settings.role is not Role.DEVICE:
        return hop_of(node)
    if isinstance(on_result, ResultFile):
        return Device(node, on_result, kept=on_result.kept)
    return Device(node, on_result)


async def run_stage(
    bus: Bus,
    settings: NodeSettings,
    make: Callable[[], Runner],
    *,
    http_port: int | None = None,
    http_host: str = "127.0.0.1",
    on_result: ResultSink | None = None,
    on_busy: BusySink | None = None,
    endpoint: Endpoint | None = None,
) -> None:
    """Run one stage as a process: load its models, serve, drain on a stop signal, leave the region.

    With an `endpoint`, clients send their own input to the device.
    """
    patience = Patience.from_env()
    edges = [settings.name] if settings.role is Role.EDGE else []
    async with contextlib.AsyncExitStack() as stack:
        on_span = await stack.enter_async_context(tracing(f"deepar-{settings.role.value}"))
        await patience.through(lambda: stack.enter_async_context(bus))
        await patience.through(lambda: require_region(bus, settings.region, edges))
        runner = await asyncio.to_thread(make)
        watch = TopicWatch(bus, used_by(settings.role.value, settings.name), settings.region + 1)
        stage = Stage(bus, settings, runner, on_result, on_busy, on_span)
        labels = {"role": settings.role.value, "node": settings.name, "region": str(settings.region)}
        await stack.enter_async_context(watch.watching())
        if endpoint is not None:
            serving = endpoint.serving(settings.name, stage.device, stage.ready, runner)
            stage.inference = await stack.enter_async_context(serving)

        def look() -> Health:
            return stage.look().without(watch.missing)

        async with serve_probes(look, port=http_port, host=http_host, labels=labels):
            try:
                asked = await until_stopped(
                    patience.through(stage.serve),
                    drain=stage.drain,
                    node=settings.name,
                    role=settings.role.value,
                )
                if asked:
                    async with asyncio.timeout(3.0):
                        await stage.node.leave()
            finally:
                await runner.close()


class Stage:
    """A node and its work, recreated if the broker becomes unavailable before they serve."""

    def __init__(
        self,
        bus: Bus,
        settings: NodeSettings,
        runner: Runner,
        on_result: ResultSink | None = None,
        on_busy: BusySink | None = None,
        on_span: SpanSink | None = None,
    ) -> None:
        self._parts = (bus, settings, runner)
        self._runner = runner
        self._on_result, self._on_busy, self._on_span = on_result, on_busy, on_span
        self.inference: DeviceInference | None = None  # of a device that serves clients
        self._make()

    def _make(self) -> None:
        self.node = Node(*self._parts, on_busy=self._on_busy, on_span=self._on_span)
        self.work = make_work(self.node, self._on_result)

    async def serve(self) -> None:
        """Serve until cancelled. Raises `BusUnavailableError` if the broker is unavailable before the node serves."""
        try:
            await self.node.run(self.work)
        except* BusUnavailableError as away:
            if self.node.serving.is_set():
                raise
            error: BaseException = away
        else:
            return
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self._make()
        raise error

    async def drain(self) -> None:
        """Finish tasks under way and accept no new ones."""
        if self.inference is not None:
            self.inference.drain()
        await self.node.drain()
        await self.work.drain()

    def device(self) -> Device:
        """The device that clients are served by."""
        assert isinstance(self.work, Device)
        return self.work

    def ready(self) -> bool:
        """Whether the stage takes tasks."""
        return self.node.status.ready and self.node.status.joined

    def look(self) -> Health:
        """The health that the probes report."""
        status, work = self.node.status, self.work
        detail: dict[str, Any] = {
            "caught_up": status.caught_up,
            "warm": status.warm,
            "receiving": status.receiving,
            "joined": status.joined,
        }
        counters = dict(status.counters)
        if isinstance(work, Hop):
            counters |= {name: float(value) for name, value in work.stage.sent_bytes.items()}
        else:
            counters["link1_bytes"] = float(work.link1.sent_bytes)
        gauges = {"tasks": float(len(work.flows) if isinstance(work, Hop) else len(work.tasks))}
        segments = self._runner.gpu_segments() if isinstance(self._runner, UsesGpu) else None
        if segments is not None:
            on_cpu = {segment: reason for segment, reason in segments.items() if reason}
            detail["not_on_gpu"] = on_cpu
            gauges["gpu_segments"] = float(len(segments) - len(on_cpu))
            gauges["gpu_refused_segments"] = float(len(on_cpu))
        batches = self._runner.batch_segments() if isinstance(self._runner, ComputesBatches) else None
        if batches is not None and isinstance(self._runner, ComputesBatches):
            alone = {segment: reason for segment, reason in batches.items() if reason}
            detail["one_by_one"] = alone
            gauges["batch_segments"] = float(len(batches) - len(alone))
            sizes = self._runner.batch_sizes()
            counters["batches"] = float(sum(sizes.values()))
            counters["batched_samples"] = float(sum(size * count for size, count in sizes.items()))
        if self.inference is None:
            return Health(status.ready, detail, gauges, counters)
        gauges["serving_sessions"] = float(self.inference.sessions)
        return Health(status.ready, detail, gauges, counters, served=self.inference.by_model)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSetup:
    """The settings of one region's planner."""

    name: str = "planner"
    region: int = 0
    policy: str = "deepar"  # name of a policy, or module:name
    objective: Objective = Objective.PIPELINED
    execution: Execution = Execution.STREAMING
    max_waiting: int = 10_000  # queued tasks in the region
    max_waiting_per_device: int = 1_000  # queued tasks of one device
    patience_s: float = DEFAULT_PATIENCE_S  # maximum wait for a device or a suitable node
    when_late: WhenLate = WhenLate.REJECT  # for tasks that are predicted to miss their deadline
    learning: bool = False  # completed tasks and measured links correct later predictions
    lease_s: float = 5.0  # silence after which a leading planner counts as lost
    take_over: bool = False  # lead at once, without waiting for the leader's lease to expire
    snapshot_every: int = 500  # decisions between two snapshots
    master: Master | None = None  # master secret; if set, every record needs a proof of identity
    trust_everybody: bool = False  # accept records without proof even if the region has required it so far


def make_planner(bus: Bus, setup: PlannerSetup) -> PlannerService:
    """A planner service. Raises `UnknownNameError` for an unknown policy."""

    options = CoreOptions(
        max_waiting=setup.max_waiting,
        patience_s=setup.patience_s,
        when_late=setup.when_late,
        max_waiting_per_device=setup.max_waiting_per_device,
        learning=setup.learning,
        fair=True,
    )

    def make_core() -> PlannerCore:
        return PlannerCore(
            setup.region,
            policy=setup.policy,
            objective=setup.objective,
            execution=setup.execution,
            options=options,
        )

    settings = PlannerSettings(
        name=setup.name,
        region=setup.region,
        lease_s=setup.lease_s,
        take_over=setup.take_over,
        snapshot_every=setup.snapshot_every,
        trust_everybody=setup.trust_everybody,
    )
    return PlannerService(bus, make_core, settings, master=setup.master)


@contextlib.asynccontextmanager
async def embedded() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that is cancelled when the block ends: planner and stages inside one process."""
    group = asyncio.TaskGroup()
    stop = _Stop()
    try:
        async with group:
            yield group
            raise stop
    except* _Stop:
        pass


class _Stop(Exception):
    """Ends the embedded services."""

"""Putting services together: a bus from settings, a runner from models or profiles, a node or a planner around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

import structlog

from bus import topics
from bus.errors import BusError, BusUnavailableError, ConfigError, UnknownTopicError
from bus.identity import Master
from bus.kafka import KafkaBus
from bus.kafka_connection import KafkaConnection
from bus.messages import TaskSubmitted
from bus.port import Bus
from bus.tensors import Array
from bus.topics import Partitions
from bus.tracing import SpanSink
from bus.values import Execution, ModelProfile, Objective, Role
from deploy.otel import tracing
from deploy.patience import Patience
from deploy.probes import Health, serve_probes
from deploy.process import until_stopped
from planner.core import PlannerCore
from planner.profiles import load_profile
from planner.service import PlannerService, Standing
from stages.compute import LitertRunner
from stages.device import Device, ResultSink
from stages.hop import Hop
from stages.node import BusySink, Node, NodeSettings
from stages.runner import ModelledRunner, Runner
from stages.zoo import load_model

log = structlog.get_logger("deepar")
Progress = Callable[[str], None]


def kafka_bus(bootstrap_servers: str | None = None) -> KafkaBus:
    """A bus on Kafka as the environment describes it. Raises `ConfigError`."""
    return KafkaBus(KafkaConnection.from_env(bootstrap_servers=bootstrap_servers))


async def create_missing_topics(bus: Bus, edges: Sequence[str] = (), partitions: Partitions | None = None) -> None:
    """Create every topic that a system with these edges needs and that is not there."""
    await bus.create_topics(topics.specs(edges, partitions))


async def require_region(bus: Bus, region: int, edges: Sequence[str] = ()) -> None:
    """Create the topics that are missing, where this user may. Raises `ConfigError` where they still are, or have no
    partition for the region.
    """
    try:
        await create_missing_topics(bus, edges)
    except BusUnavailableError:
        raise
    except BusError as error:
        log.info("may not create topics; they must be there", error=str(error))
    try:
        regions = await bus.partitions(topics.DECISIONS)
    except UnknownTopicError:
        raise ConfigError("the topics are not there", remedy="create them: deepar topics create") from None
    if region >= regions:
        raise ConfigError(f"there is no region {region}: the topics have {regions}, counted from 0")


def make_runner(
    role: Role,
    name: str,
    *,
    models: Sequence[str],
    runner: str = "litert",
    profile: str | None = None,
    slowdown: float = 1.0,
    threads: int = 1,
    say: Progress | None = None,
) -> Runner:
    """A runner that computes (`litert`) or plays (`modelled`) the models.

    `profile` names measured times to play or to pace by; without one this machine is measured (and remembered). `slowdown`
    stretches them. Raises `UnknownNameError`, `ModelError`, `ConfigError`.
    """
    known: dict[str, ModelProfile] = {}
    if profile is not None:
        known = {played.model: played for played in getattr(load_profile(profile), role.value).values()}
        missing = [model for model in models if model not in known]
        if missing:
            raise ConfigError(f"profile {profile} has no {', '.join(missing)}; it has {', '.join(sorted(known))}")
        if runner == "modelled":
            return ModelledRunner([scaled(known[model], slowdown, f"{role} {name}") for model in models])
    loaded = [load_model(model) for model in models]
    for model in loaded:
        if model.name in known and known[model.name].sha256 != model.sha256:
            raise ConfigError(
                f"profile {profile} is of another {model.name}: its SHA-256 is {known[model.name].sha256}, "
                f"that of the model {model.sha256}",
                remedy="play it without computing: --runner modelled",
            )
    measured = LitertRunner(
        loaded,
        slowdown=slowdown,
        num_threads=threads,
        platform=f"{role} {name}",
        say=say,
        profiles=known,
        paced=bool(known),
    )
    if runner == "modelled":
        return ModelledRunner(measured.profiles())
    return measured


def scaled(profile: ModelProfile, slowdown: float, platform: str) -> ModelProfile:
    """The same model on a machine `slowdown` times slower."""
    return profile.model_copy(
        update={"platform": platform, "layer_s": tuple(seconds * slowdown for seconds in profile.layer_s)}
    )


def make_work(node: Node, on_result: ResultSink | None = None) -> Device | Hop:
    """What a node of this role does."""
    if node.settings.role is not Role.DEVICE:
        return Hop(node)
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
) -> None:
    """One stage as a process: ready its models, serve, drain when asked to stop, leave."""
    patience = Patience.from_env()
    edges = [settings.name] if settings.role is Role.EDGE else []
    async with contextlib.AsyncExitStack() as stack:
        on_span = await stack.enter_async_context(tracing(f"deepar-{settings.role.value}"))
        await patience.through(lambda: stack.enter_async_context(bus))
        await patience.through(lambda: require_region(bus, settings.region, edges))
        runner = await asyncio.to_thread(make)
        stage = Stage(bus, settings, runner, on_result, on_busy, on_span)
        labels = {"role": settings.role.value, "node": settings.name, "region": str(settings.region)}
        async with serve_probes(stage.look, port=http_port, host=http_host, labels=labels):
            try:
                asked = await until_stopped(
                    patience.through(stage.serve),
                    drain=lambda: stage.work.drain(),
                    node=settings.name,
                    role=settings.role.value,
                )
                if asked:
                    async with asyncio.timeout(3.0):
                        await stage.node.leave()
            finally:
                await runner.close()


class Stage:
    """A node and its work; made anew while the broker goes away again before they serve."""

    def __init__(
        self,
        bus: Bus,
        settings: NodeSettings,
        runner: Runner,
        on_result: ResultSink | None = None,
        on_busy: BusySink | None = None,
        on_span: SpanSink | None = None,
    ) -> None:
        self._made_of = (bus, settings, runner)
        self._on_result, self._on_busy, self._on_span = on_result, on_busy, on_span
        self._make()

    def _make(self) -> None:
        self.node = Node(*self._made_of, on_busy=self._on_busy, on_span=self._on_span)
        self.work = make_work(self.node, self._on_result)

    async def serve(self) -> None:
        """Serve until cancelled. Raises `BusUnavailableError` where the broker is away before it serves."""
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

    def look(self) -> Health:
        """For the probes."""
        status, work = self.node.status, self.work
        detail = {
            "caught_up": status.caught_up,
            "warm": status.warm,
            "receiving": status.receiving,
            "joined": status.joined,
        }
        counters = dict(status.counters)
        if isinstance(work, Hop):
            sent = {"link1_bytes": work.results.sent_bytes, "link2_bytes": work.link2.sent_bytes}
            counters |= {name: float(value) for name, value in sent.items()}
        else:
            counters["link1_bytes"] = float(work.link1.sent_bytes)
        tasks = len(work.flows) if isinstance(work, Hop) else len(work.tasks)
        return Health(status.ready, detail, {"tasks": float(tasks)}, counters)


def make_planner(
    bus: Bus,
    *,
    name: str = "planner",
    region: int = 0,
    policy: str = "deepar",
    objective: Objective = Objective.PIPELINED,
    execution: Execution = Execution.STREAMING,
    max_waiting: int = 10_000,
    lease_s: float = 5.0,
    take_over: bool = False,
    snapshot_every: int = 500,
    master: Master | None = None,
    trust_everybody: bool = False,
) -> PlannerService:
    """A planner's service; with a `master` it demands proofs of identity. Raises `UnknownNameError` for an unknown policy."""

    def make_core() -> PlannerCore:
        return PlannerCore(region, policy=policy, objective=objective, execution=execution, max_waiting=max_waiting)

    return PlannerService(
        bus,
        make_core,
        name=name,
        region=region,
        lease_s=lease_s,
        take_over=take_over,
        snapshot_every=snapshot_every,
        master=master,
        trust_everybody=trust_everybody,
    )


def planner_counters(services: Iterable[PlannerService]) -> dict[str, float]:
    """What `/metrics` counts of one planner, or of one process's planners together."""
    some = list(services)
    return {
        "decisions": float(sum(service.decisions for service in some)),
        "dead_letters": float(sum(service.dead_letters for service in some)),
        "wrong_identity": float(sum(service.door.refused for service in some)),
    }


async def run_planner(
    bus: Bus, service: PlannerService, *, http_port: int | None = None, http_host: str = "127.0.0.1"
) -> None:
    """A planner as a process."""
    patience = Patience.from_env()
    async with contextlib.AsyncExitStack() as stack:
        service.trace_to(await stack.enter_async_context(tracing("deepar-planner")))
        await patience.through(lambda: stack.enter_async_context(bus))
        await patience.through(lambda: require_region(bus, service.region))

        def look() -> Health:
            core = service.core
            detail = {"standing": service.standing.value}
            gauges = {"leading": float(service.standing is Standing.LEADING), "tasks": float(core.live_tasks)}
            return Health(service.standing is not Standing.READING, detail, gauges, planner_counters([service]))

        labels = {"role": "planner", "node": service.name, "region": str(service.region)}
        async with serve_probes(look, port=http_port, host=http_host, labels=labels):
            await until_stopped(service.run(), planner=service.name, region=service.region)


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


class ResultFile:
    """One JSON line a result: task, sample, and the index of the largest output. Each (task, sample) stands there once,
    also when the device that writes was killed and started again: what is in the file is not computed again.
    """

    def __init__(self, path: Path) -> None:
        import json

        self._kept: dict[str, set[int]] = {}
        before = path.read_bytes() if path.exists() else b""
        for line in before.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short
                known = json.loads(line)
                self._kept.setdefault(str(known["task_id"]), set()).add(int(known["sample"]))
        self._handle = path.open("a", encoding="utf-8")
        if before and not before.endswith(b"\n"):
            self._handle.write("\n")

    def kept(self, task_id: str) -> set[int]:
        """The samples of a task that are in the file."""
        return self._kept.get(task_id, set())

    def close(self) -> None:
        """Nothing more will come."""
        self._handle.close()

    def __call__(self, task: TaskSubmitted, sample: int, outputs: list[Array]) -> None:
        import json

        import numpy as np

        line: dict[str, object] = {"task_id": task.task_id, "model": task.model, "sample": sample}
        if outputs and outputs[0].size:
            line["top"] = int(np.argmax(outputs[0]))
        self._handle.write(json.dumps(line) + "\n")
        self._handle.flush()
        self._kept.setdefault(task.task_id, set()).add(sample)


def result_file(path: Path) -> ResultFile:
    """A sink for a device's results; see `ResultFile`."""
    return ResultFile(path)

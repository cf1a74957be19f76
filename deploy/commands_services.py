"""`deepar planner | stage | up | topics`: the services, one process each or all in one."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bus import topics
from bus.errors import ConfigError
from bus.identity import Key, Master, Speaker
from bus.port import Bus
from bus.signed import signed
from bus.topics import Partitions
from bus.units import parse_duration, parse_rate
from bus.values import Execution, Objective, Role
from deploy import nodes
from deploy.identities import KeyFile, MasterFile, key_of, master_of
from deploy.otel import tracing
from deploy.patience import Patience
from deploy.planner_regions import parse_regions, run_regions
from deploy.process import run_on_uvloop, until_stopped
from deploy.settings import CloudOptions, DeviceOptions, EdgeOptions, NodeOptions, UpSettings, load_settings, options_of
from planner.service import PlannerService
from stages.node import Node, NodeSettings

stage_app = typer.Typer(no_args_is_help=True, help="Run one stage: a device, an edge or a cloud worker.")
topics_app = typer.Typer(no_args_is_help=True, help="Create or list the topics.")

Bootstrap = Annotated[
    str | None,
    typer.Option(
        "--bootstrap-servers", "-b", help="Kafka, host:port. Default: KAFKA_BOOTSTRAP_SERVERS, else localhost:9092."
    ),
]
Region = Annotated[
    int, typer.Option(min=0, envvar="DEEPAR_REGION", help="The region: a partition of the control topics.")
]
HttpPort = Annotated[
    int | None,
    typer.Option(
        min=1, max=65535, envvar="DEEPAR_HTTP_PORT", help="Serve /livez, /readyz and /metrics here; off unless set."
    ),
]
HttpHost = Annotated[str, typer.Option(envvar="DEEPAR_HTTP_HOST", help="Address that --http-port listens on.")]
Lease = Annotated[str, typer.Option(envvar="DEEPAR_LEASE", help="Silent for longer than this means lost.")]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", "-m", envvar="DEEPAR_MODELS", help="A model it serves; may be given again. [default: lenet alexnet]"
    ),
]
Slowdown = Annotated[
    float, typer.Option(min=1.0, envvar="DEEPAR_SLOWDOWN", help="Play a machine so many times slower than this one.")
]
RunnerKind = Annotated[
    str,
    typer.Option("--runner", envvar="DEEPAR_RUNNER", help="litert computes; modelled only takes the profile's time."),
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        envvar="DEEPAR_PROFILE",
        help="Times to play in the place of this machine's, slowdown on top: a name (paper) or a file.",
    ),
]
Threads = Annotated[int, typer.Option("--num-threads", min=1, help="Threads of one inference.")]


def planner(
    bootstrap_servers: Bootstrap = None,
    region: Region = 0,
    regions: Annotated[
        str | None,
        typer.Option(
            envvar="DEEPAR_REGIONS",
            help="Several regions: 0,1,2 stands by for each; `all` shares all with the other planners that say so.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="What this planner is called.")] = "planner",
    policy: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_POLICY",
            help="deepar, no-delay, device-only, edge-only, cloud-only, neurosurgeon, or module:name.",
        ),
    ] = "deepar",
    objective: Annotated[
        Objective, typer.Option(envvar="DEEPAR_OBJECTIVE", help="What to minimise; pipelined goes with streaming.")
    ] = Objective.PIPELINED,
    lease: Lease = "5s",
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Waiting tasks above this are rejected (queue_full).")
    ] = 10_000,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Do not wait until the leading planner is silent.")
    ] = False,
    snapshot_every: Annotated[int, typer.Option(min=1, help="Decisions between two snapshots.")] = 500,
    identity_master: MasterFile = None,
    trust_everybody: Annotated[
        bool, typer.Option("--trust-everybody", help="Demand no proofs of identity, though the region did until now.")
    ] = False,
    http_port: HttpPort = None,
    http_host: HttpHost = "127.0.0.1",
) -> None:
    """Run the planner of a region: it decides where every task runs, and publishes its decisions.

    A second planner for the same region stands by and takes over when the first falls silent.

    Example: `deepar planner --policy neurosurgeon --http-port 9100`
    """
    bus = nodes.kafka_bus(bootstrap_servers)
    lease_s = parse_duration(lease)
    master = master_of(identity_master)
    if master is not None and trust_everybody:
        raise ConfigError("--trust-everybody and --identity-master exclude each other")

    def make(region: int) -> PlannerService:
        return nodes.make_planner(
            bus,
            name=name,
            region=region,
            policy=policy,
            objective=objective,
            execution=execution_of(objective),
            max_waiting=max_waiting,
            lease_s=lease_s,
            take_over=take_over,
            snapshot_every=snapshot_every,
            master=master,
            trust_everybody=trust_everybody,
        )

    make(region)  # an unknown policy is told before anything is connected
    if regions is None:
        run_on_uvloop(nodes.run_planner(bus, make(region), http_port=http_port, http_host=http_host))
    else:
        wanted = parse_regions(regions)
        run_on_uvloop(run_regions(bus, make, wanted, name=name, http_port=http_port, http_host=http_host))


def execution_of(objective: Objective) -> Execution:
    """The execution mode that goes with an objective."""
    return Execution.STREAMING if objective is Objective.PIPELINED else Execution.SEQUENTIAL


@stage_app.command("device")
def device(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="The device's name.")] = "d1",
    edges: Annotated[
        list[str] | None,
        typer.Option("--edge", envvar="DEEPAR_EDGES", help="An edge it can reach; may be given again. Default: all."),
    ] = None,
    link: Annotated[str, typer.Option(envvar="DEEPAR_LINK", help="Its own limit on link 1, 0: none.")] = "0",
    results: Annotated[Path | None, typer.Option(help="Append every result as a JSON line to this file.")] = None,
    models: Models = None,
    slowdown: Slowdown = 1.0,
    runner: RunnerKind = "litert",
    profile: ProfileName = None,
    num_threads: Threads = 1,
    bootstrap_servers: Bootstrap = None,
    region: Region = 0,
    lease: Lease = "10s",
    identity_key: KeyFile = None,
    http_port: HttpPort = None,
    http_host: HttpHost = "127.0.0.1",
) -> None:
    """Run a device: it computes the front of its tasks' models, sends activations, and collects results.

    Example: `deepar stage device --name d1 --edge e1 --slowdown 8 --results d1.jsonl`
    """
    options = options_of(
        DeviceOptions,
        name=name,
        edges=tuple(edges) if edges else None,
        link=parse_rate(link),
        slowdown=slowdown,
        profile=profile,
        runner=_runner(runner),
        threads=num_threads,
    )
    _run_stage(options, models, bootstrap_servers, region, lease, identity_key, http_port, http_host, results)


@stage_app.command("edge")
def edge(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="The edge's name; part of its topic's name.")] = "e1",
    slots: Annotated[int, typer.Option(min=1, envvar="DEEPAR_SLOTS", help="Tasks that may compute at once (r_e).")] = 2,
    link1: Annotated[str, typer.Option(envvar="DEEPAR_LINK1", help="Capacity to its devices.")] = "1Gbps",
    link2: Annotated[str, typer.Option(envvar="DEEPAR_LINK2", help="Capacity to the cloud.")] = "100Mbps",
    models: Models = None,
    slowdown: Slowdown = 1.0,
    runner: RunnerKind = "litert",
    profile: ProfileName = None,
    num_threads: Threads = 1,
    bootstrap_servers: Bootstrap = None,
    region: Region = 0,
    lease: Lease = "10s",
    identity_key: KeyFile = None,
    http_port: HttpPort = None,
    http_host: HttpHost = "127.0.0.1",
) -> None:
    """Run an edge: it computes the middle of the models in its slots, and relays between devices and the cloud.

    Example: `deepar stage edge --name e1 --slots 4 --link1 1Gbps --link2 100Mbps`
    """
    if name in topics.RESERVED_EDGE_NAMES:
        raise ConfigError(f"an edge cannot be called {name}: a topic has that name")
    options = options_of(
        EdgeOptions,
        name=name,
        slots=slots,
        link1=parse_rate(link1),
        link2=parse_rate(link2),
        slowdown=slowdown,
        profile=profile,
        runner=_runner(runner),
        threads=num_threads,
    )
    _run_stage(options, models, bootstrap_servers, region, lease, identity_key, http_port, http_host, None)


@stage_app.command("cloud")
def cloud(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="This worker's name.")] = "c1",
    models: Models = None,
    slowdown: Slowdown = 1.0,
    runner: RunnerKind = "litert",
    profile: ProfileName = None,
    num_threads: Threads = 1,
    bootstrap_servers: Bootstrap = None,
    region: Region = 0,
    lease: Lease = "10s",
    identity_key: KeyFile = None,
    http_port: HttpPort = None,
    http_host: HttpHost = "127.0.0.1",
) -> None:
    """Run a cloud worker: it computes the rest of the models. Several share the work as one consumer group.

    Example: `deepar stage cloud --name c2 --model MODEL.tflite`
    """
    options = options_of(
        CloudOptions, name=name, slowdown=slowdown, profile=profile, runner=_runner(runner), threads=num_threads
    )
    _run_stage(options, models, bootstrap_servers, region, lease, identity_key, http_port, http_host, None)


def _runner(kind: str) -> str:
    if kind not in ("litert", "modelled"):
        raise ConfigError(f"--runner {kind}: it is litert or modelled")
    return kind


def _run_stage(
    options: NodeOptions,
    models: list[str] | None,
    bootstrap_servers: str | None,
    region: int,
    lease: str,
    identity_key: Path | None,
    http_port: int | None,
    http_host: str,
    results: Path | None,
) -> None:
    names = [name for entry in models or ["lenet", "alexnet"] for name in entry.split(",") if name]
    settings = node_settings(options, region=region, lease_s=parse_duration(lease))
    key = key_of(Speaker(settings.role.value, settings.name), identity_key)
    make = partial(
        nodes.make_runner,
        settings.role,
        options.name,
        models=names,
        runner=options.runner,
        profile=options.profile,
        slowdown=options.slowdown,
        threads=options.threads,
        say=_say,
    )
    on_result = nodes.result_file(results) if results else None
    bus = signed(nodes.kafka_bus(bootstrap_servers), key)
    run_on_uvloop(nodes.run_stage(bus, settings, make, http_port=http_port, http_host=http_host, on_result=on_result))


def _say(line: str) -> None:
    nodes.log.info(line)


def node_settings(options: NodeOptions, *, region: int, lease_s: float) -> NodeSettings:
    """What a node of these options announces."""
    make = partial(NodeSettings, name=options.name, region=region, lease_s=lease_s)
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


# --- deepar up -------------------------------------------------------------------------------------------------------


def up(
    file: Annotated[Path, typer.Argument(help="A TOML file: which nodes, models, bus and planner.")],
    bootstrap_servers: Bootstrap = None,
    identity_master: MasterFile = None,
    http_port: HttpPort = None,
    http_host: HttpHost = "127.0.0.1",
) -> None:
    """Start the planner and all stages of one TOML file in this process, until Ctrl-C.

    With `bus.kind = "kafka"` other processes can submit tasks and follow along; `deploy/example.toml` shows every key. With a
    master secret the region demands proofs of identity, and every node here gets its key from it.

    Example: `deepar up deploy/example.toml`
    """
    settings = load_settings(file)
    if settings.bus.kind == "memory":
        raise ConfigError(
            f"{file}: bus.kind: with the bus inside this process nobody could submit a task",
            remedy='set kind = "kafka" and start `deepar broker`; for a run without a broker: deepar demo',
        )
    bus = nodes.kafka_bus(bootstrap_servers or settings.bus.bootstrap_servers)
    run_on_uvloop(run_up(settings, bus, http_port, http_host, master_of(identity_master)))


async def run_up(
    settings: UpSettings, bus: Bus, http_port: int | None, http_host: str, master: Master | None = None
) -> None:
    """Planner and stages around one bus, in one event loop; with a `master` each of them proves who it is."""
    options: list[NodeOptions] = [*settings.cloud, *settings.edge, *settings.device]
    patience = Patience.from_env()
    async with contextlib.AsyncExitStack() as stack:
        on_span = await stack.enter_async_context(tracing("deepar"))
        await patience.through(lambda: stack.enter_async_context(bus))
        partitions, edges = Partitions(regions=settings.bus.regions), [edge.name for edge in settings.edge]
        await patience.through(lambda: nodes.create_missing_topics(bus, edges, partitions))
        await patience.through(lambda: nodes.require_region(bus, settings.region))
        runners = {}
        for option in options:
            made = node_settings(option, region=settings.region, lease_s=settings.lease)
            runners[option.name] = await asyncio.to_thread(
                nodes.make_runner,
                made.role,
                option.name,
                models=option.models or settings.models,
                runner=option.runner,
                profile=option.profile,
                slowdown=option.slowdown,
                threads=option.threads,
                say=_say,
            )

        async def serve() -> None:
            async with asyncio.TaskGroup() as group:
                if settings.planner is not None:
                    service = nodes.make_planner(
                        bus,
                        region=settings.region,
                        policy=settings.planner.policy,
                        objective=settings.objective,
                        execution=settings.execution,
                        max_waiting=settings.planner.max_waiting,
                        lease_s=settings.planner.lease,
                        master=master,
                    )
                    service.trace_to(on_span)
                    group.create_task(service.run(), name="planner")
                for option in options:
                    made = node_settings(option, region=settings.region, lease_s=settings.lease)
                    node = Node(signed(bus, _key(made, option, master)), made, runners[option.name], on_span=on_span)
                    group.create_task(node.run(nodes.make_work(node)), name=option.name)

        await until_stopped(serve(), nodes=len(options), region=settings.region)


def _key(settings: NodeSettings, option: NodeOptions, master: Master | None) -> Key | None:
    """A node's key: from the file that is named for it, else made of the master."""
    speaker = Speaker(settings.role.value, settings.name)
    if option.identity_key is not None:
        return key_of(speaker, Path(option.identity_key))
    return None if master is None else master.key(speaker)


# --- deepar topics ---------------------------------------------------------------------------------------------------


@topics_app.command("create")
def topics_create(
    edges: Annotated[
        list[str] | None, typer.Option("--edge", help="Create this edge's topic too; may be given again.")
    ] = None,
    regions: Annotated[int, typer.Option(min=1, help="Partitions of the control topics.")] = 1,
    cloud_partitions: Annotated[int, typer.Option(min=1, help="At most so many cloud workers share the work.")] = 8,
    bootstrap_servers: Bootstrap = None,
) -> None:
    """Create the topics that are missing. Services create theirs by themselves where they may.

    Example: `deepar topics create --edge e1 --edge e2 --regions 1`
    """

    async def main() -> None:
        async with nodes.kafka_bus(bootstrap_servers) as bus:
            partitions = Partitions(regions=regions, cloud=cloud_partitions)
            await nodes.create_missing_topics(bus, edges or [], partitions)
            for spec in topics.specs(edges or [], partitions):
                typer.echo(f"{spec.name}  {await bus.partitions(spec.name)} partition(s)")

    run_on_uvloop(main())


@topics_app.command("list")
def topics_list() -> None:
    """Show the table of topics: what each carries, who writes it, who reads it.

    Example: `deepar topics list`
    """
    table = Table(title="the flow")
    for name in ("topic", "carries", "key", "written by", "read by"):
        table.add_column(name, overflow="fold")
    for topic in topics.TABLE:
        table.add_row(
            topic.name,
            f"{', '.join(topic.messages) or '-'} ({topic.payload.value})",
            topic.key,
            ", ".join(topic.writers),
            ", ".join(topic.readers),
        )
    Console().print(table)


__all__ = ["planner", "stage_app", "topics_app", "up"]

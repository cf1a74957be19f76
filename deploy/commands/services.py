"""`deepar planner | stage | up`: the services, in one process each or all in one process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bus import topics
from bus.errors import ConfigError
from bus.identity.keys import Speaker
from bus.identity.signed_bus import signed
from bus.port import Bus
from bus.text.units import parse_duration
from bus.values import Objective
from deploy.console_output import completion
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import Bootstrap, GpuTolerance, ProbeOptions, Region
from deploy.services import wiring
from deploy.services.identities import KeyFile, MasterFile, key_of, master_of
from deploy.services.planner_process import parse_regions, run_planner, run_regions
from deploy.services.process import run_on_uvloop
from deploy.services.result_file import ResultFile
from deploy.services.settings import (
    CloudOptions,
    DeviceOptions,
    EdgeOptions,
    NodeOptions,
    Served,
    ServedModel,
    UpSettings,
    lease_of,
    load_settings,
    node_name,
    options_of,
)
from deploy.services.wiring import PlannerSetup
from planner.core.options import WhenLate
from planner.service.service import PlannerService
from stages.models.compute_options import parse_threads
from stages.models.files.choice import parse_shapes, shape_words

stage_app = typer.Typer(no_args_is_help=True, help="Run one stage: a device, an edge or a cloud worker.")

Lease = Annotated[str, typer.Option(envvar="DEEPAR_LEASE", help="Maximum silence before a process counts as lost: 5s.")]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        envvar="DEEPAR_MODELS",
        help="Model that the stage serves; repeatable. [default: lenet alexnet]",
        autocompletion=completion.models,
    ),
]
Signature = Annotated[
    str | None,
    typer.Option("--signature", envvar="DEEPAR_SIGNATURE", help="Signature to use of the single --model."),
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        envvar="DEEPAR_INPUT_SHAPE",
        metavar="NAME=1x1280",
        help="Shape of an input that the single --model leaves open; repeatable.",
    ),
]
Slowdown = Annotated[
    float,
    typer.Option(min=1.0, envvar="DEEPAR_SLOWDOWN", help="Factor to slow down computing, to emulate a slower machine."),
]
RunnerKind = Annotated[
    str,
    typer.Option(
        "--runner",
        envvar="DEEPAR_RUNNER",
        help="Runner: litert computes; modelled only waits for the times of the profile.",
    ),
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        envvar="DEEPAR_PROFILE",
        help="Profile to use instead of measuring this machine: a name (paper) or a file. --slowdown multiplies its times.",
    ),
]
Remeasure = Annotated[
    bool,
    typer.Option(
        "--remeasure", envvar="DEEPAR_REMEASURE", help="Measure this machine again and ignore stored measurements."
    ),
]
Threads = Annotated[
    str,
    typer.Option(
        "--num-threads",
        metavar="N|auto",
        help="Number of threads for one inference; auto measures, and takes the fewest that are about as fast as any.",
    ),
]


Edges = Annotated[
    list[str] | None,
    typer.Option(
        "--edge",
        envvar="DEEPAR_EDGES",
        help="Edge that the device can reach; repeatable. Default: all.",
        autocompletion=completion.edges,
    ),
]
DeviceLink = Annotated[
    str, typer.Option(envvar="DEEPAR_LINK", help="Limit of the device's link 1, like 50Mbps; 0: no limit.")
]


@dataclass(frozen=True, kw_only=True)
class PlannerRegionOptions:
    """The region or regions of a planner process, and its name."""

    bootstrap_servers: Bootstrap = None
    region: Region = 0
    regions: Annotated[
        str | None,
        typer.Option(
            envvar="DEEPAR_REGIONS",
            help="Several regions: a list (0,1,2), or `all` to share all regions with other `all` planners.",
        ),
    ] = None
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the planner.")] = "planner"


@dataclass(frozen=True, kw_only=True)
class DecisionOptions:
    """How a planner decides."""

    policy: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_POLICY",
            help=(
                "Policy: deepar, no-delay, device-only, edge-only, cloud-only, neurosurgeon, routes, elastic, or "
                "module:name."
            ),
            autocompletion=completion.policies,
        ),
    ] = "deepar"
    objective: Annotated[
        Objective,
        typer.Option(
            envvar="DEEPAR_OBJECTIVE", help="Delay to minimise: pipelined for streaming execution, or sequential."
        ),
    ] = Objective.PIPELINED
    learn: Annotated[
        bool,
        typer.Option(
            "--learn/--no-learn",
            envvar="DEEPAR_LEARN",
            help="Correct predictions by what completed tasks and nodes measured.",
            rich_help_panel="Learning",  # a box of its own, so that its two names do not narrow the other helps
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class QueueOptions:
    """How long a planner waits for nodes, and how many tasks it lets wait."""

    lease: Lease = "5s"
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Maximum number of waiting tasks; further tasks are rejected (queue_full).")
    ] = 10_000
    patience: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_PATIENCE",
            help="Maximum time that a task waits for its device or a suitable node before it is rejected "
            "(no_device) or fails (device_lost, no_node).",
        ),
    ] = "10min"
    when_late: Annotated[
        WhenLate, typer.Option(help="Action for a task that is predicted to miss its deadline under every placement.")
    ] = WhenLate.REJECT
    max_waiting_per_device: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of waiting tasks per device; further tasks are rejected (device_queue_full)."
        ),
    ] = 1_000


@dataclass(frozen=True, kw_only=True)
class LeadershipOptions:
    """How a planner starts to lead, and which records it accepts."""

    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over", help="Take over at once instead of waiting for the leading planner's lease to expire."
        ),
    ] = False
    snapshot_every: Annotated[int, typer.Option(min=1, help="Decisions between two snapshots.")] = 500
    identity_master: MasterFile = None
    trust_everybody: Annotated[
        bool,
        typer.Option(
            "--trust-everybody",
            help="Accept records without proof of identity even if the region has required it so far.",
        ),
    ] = False


@with_option_groups
def planner(
    region: PlannerRegionOptions,
    decisions: DecisionOptions,
    queue: QueueOptions,
    leadership: LeadershipOptions,
    probes: ProbeOptions,
) -> None:
    """Run the planner of a region. It decides where each task runs and publishes its decisions.

    A second planner for the same region stands by and takes over when the first one stops sending heartbeats.

    Example: `deepar planner --policy neurosurgeon --http-port 9100`
    """
    bus = wiring.kafka_bus(region.bootstrap_servers)
    setup = planner_setup(region, decisions, queue, leadership)

    def make(number: int) -> PlannerService:
        return wiring.make_planner(bus, replace(setup, region=number))

    service = make(region.region)  # reports an unknown policy before connecting
    http_port, http_host = probes.http_port, probes.http_host
    if region.regions is None:
        run_on_uvloop(run_planner(bus, service, http_port=http_port, http_host=http_host))
    else:
        wanted = parse_regions(region.regions)
        run_on_uvloop(run_regions(bus, make, wanted, name=setup.name, http_port=http_port, http_host=http_host))


def planner_setup(
    region: PlannerRegionOptions, decisions: DecisionOptions, queue: QueueOptions, leadership: LeadershipOptions
) -> PlannerSetup:
    """The planner that the options describe. Raises `ConfigError`."""
    master = master_of(leadership.identity_master)
    if master is not None and leadership.trust_everybody:
        raise ConfigError("--trust-everybody and --identity-master exclude each other")
    return PlannerSetup(
        name=node_name(region.name, "--name"),
        region=region.region,
        policy=decisions.policy,
        objective=decisions.objective,
        execution=decisions.objective.execution,
        max_waiting=queue.max_waiting,
        max_waiting_per_device=queue.max_waiting_per_device,
        patience_s=parse_duration(queue.patience, "--patience"),
        when_late=queue.when_late,
        learning=decisions.learn,
        lease_s=lease_of(queue.lease),
        take_over=leadership.take_over,
        snapshot_every=leadership.snapshot_every,
        master=master,
        trust_everybody=leadership.trust_everybody,
    )


@dataclass(frozen=True, kw_only=True)
class StageFlags:
    """The options that all stages share."""

    models: Models = None
    signature: Signature = None
    input_shape: InputShape = None
    slowdown: Slowdown = 1.0
    runner: RunnerKind = "litert"
    profile: ProfileName = None
    num_threads: Threads = "1"
    remeasure: Remeasure = False
    bootstrap_servers: Bootstrap = None
    region: Region = 0
    lease: Lease = "10s"
    identity_key: KeyFile = None
    probes: ProbeOptions = field(default_factory=ProbeOptions)

    def machine(self) -> dict[str, Any]:
        """The part of `NodeOptions` that describes how the node computes. Raises `ConfigError`."""
        if self.runner not in ("litert", "modelled"):
            raise ConfigError(f"--runner {self.runner}: must be litert or modelled")
        return {
            "slowdown": self.slowdown,
            "profile": self.profile,
            "runner": self.runner,
            "threads": parse_threads(self.num_threads),
            "remeasure": self.remeasure,
        }

    def served(self) -> list[Served]:
        """The models to serve. Raises `ConfigError` if a signature or shape is given for more than one model."""
        names = [name for entry in self.models or ["lenet", "alexnet"] for name in entry.split(",") if name]
        shapes = {name: shape_words(shape) for name, shape in parse_shapes(self.input_shape or ()).items()}
        if self.signature is None and not shapes:
            return list(names)
        if len(names) != 1:
            raise ConfigError(
                "--signature and --input-shape need exactly one --model",
                remedy="pass one --model, or use `deepar up`, whose file sets them per model",
            )
        return [ServedModel(model=names[0], signature=self.signature, input_shape=shapes)]


@dataclass(frozen=True, kw_only=True)
class Link1Options:
    """The network that a device plays on link 1."""

    link1_latency: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_LINK1_LATENCY",
            help="One-way latency to play on link 1, like 20ms: what the device sends and its results arrive later. "
            "Or a CSV file: see --link1-trace.",
        ),
    ] = "0"
    link1_trace: Annotated[
        Path | None,
        typer.Option(
            envvar="DEEPAR_LINK1_TRACE",
            help="CSV file (t_s,bps,latency_s; the last column is optional) to play on link 1; it repeats.",
        ),
    ] = None

    def played(self) -> dict[str, Any]:
        """The part of `DeviceOptions` that describes the network."""
        return {"link1_latency": self.link1_latency, "link1_trace": self.link1_trace}


@dataclass(frozen=True, kw_only=True)
class Link2Options:
    """The network that an edge or a cloud worker plays on link 2."""

    link2_latency: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_LINK2_LATENCY",
            help="One-way latency to play on link 2, like 40ms: what this stage sends over it arrives later. "
            "Or a CSV file: see --link2-trace.",
        ),
    ] = "0"
    link2_trace: Annotated[
        Path | None,
        typer.Option(
            envvar="DEEPAR_LINK2_TRACE",
            help="CSV file (t_s,bps,latency_s; the last column is optional) to play on link 2; it repeats.",
        ),
    ] = None

    def played(self) -> dict[str, Any]:
        """The part of the stage's options that describes the network."""
        return {"link2_latency": self.link2_latency, "link2_trace": self.link2_trace}


@dataclass(frozen=True, kw_only=True)
class AcceleratorFlags:
    """What an edge or a cloud worker computes with."""

    accelerator: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_ACCELERATOR",
            help="Processor for inference: cpu, gpu (where its results agree with the CPU's), or auto (where it is faster).",
        ),
    ] = "cpu"
    gpu_tolerance: GpuTolerance = 1e-4
    batches: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_BATCHES",
            help="Compute samples that wait for the same layers together: exact (where results stay the same to the bit), "
            "any (also where they differ slightly), or off.",
        ),
    ] = "exact"

    def chosen(self) -> dict[str, Any]:
        """The part of the stage's options that describes the processor."""
        return {"accelerator": self.accelerator, "gpu_tolerance": self.gpu_tolerance, "batches": self.batches}


@dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """How a device serves clients."""

    serve: Annotated[
        str | None,
        typer.Option(
            envvar="DEEPAR_SERVE",
            metavar="HOST:PORT",
            help="Serve clients over HTTP (Open Inference Protocol): 127.0.0.1:8600.",
        ),
    ] = None
    serve_grpc: Annotated[
        str | None,
        typer.Option(envvar="DEEPAR_SERVE_GRPC", metavar="HOST:PORT", help="The same over gRPC; needs the extra grpc."),
    ] = None
    serve_token_file: Annotated[
        str | None,
        typer.Option(
            envvar="DEEPAR_SERVE_TOKEN_FILE",
            help="File with the bearer tokens of clients, one a line. [default: those in DEEPAR_SERVE_TOKEN]",
        ),
    ] = None
    serve_certificate: Annotated[
        str | None, typer.Option(envvar="DEEPAR_SERVE_CERTIFICATE", help="PEM file with the certificate for TLS.")
    ] = None
    serve_key: Annotated[
        str | None, typer.Option(envvar="DEEPAR_SERVE_KEY", help="PEM file with the key of the certificate.")
    ] = None
    serve_insecure: Annotated[
        bool,
        typer.Option(
            "--serve-insecure",
            envvar="DEEPAR_SERVE_INSECURE",
            help="Serve other machines even without tokens or TLS.",
        ),
    ] = False
    sessions: Annotated[
        bool,
        typer.Option(
            "--sessions/--no-sessions",
            envvar="DEEPAR_SERVE_SESSIONS",
            help="Compute requests in warm sessions, or plan each as a task of its own.",
            rich_help_panel="Serving",  # a box of its own, so that its two names do not narrow the other helps
        ),
    ] = True

    def served(self) -> dict[str, Any]:
        """The part of `DeviceOptions` that describes the endpoint."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@stage_app.command("device")
@with_option_groups
def device(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the device.")] = "d1",
    edges: Edges = None,
    link: DeviceLink = "0",
    results: Annotated[Path | None, typer.Option(help="Append every result as a JSON line to this file.")] = None,
    *,
    network: Link1Options,
    serving: ServeFlags,
    flags: StageFlags,
) -> None:
    """Run a device. It computes the first layers of its tasks' models, sends activations and collects results.

    On one machine, `--link1-latency` and `--link1-trace` play the network of the device: its frames and its results arrive
    later, and what it sends follows a recorded bandwidth. With `--serve`, clients send it their own input.

    Example: `deepar stage device --name d1 --edge e1 --slowdown 8 --link1-latency 20ms --results d1.jsonl`
    """
    options = options_of(
        DeviceOptions,
        name=name,
        edges=tuple(edges) if edges else None,
        link=link,
        **network.played(),
        **serving.served(),
        **flags.machine(),
    )
    _run_stage(options, flags, results)


@stage_app.command("edge")
@with_option_groups
def edge(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the edge; part of its topic's name.")] = "e1",
    slots: Annotated[
        int, typer.Option(min=1, envvar="DEEPAR_SLOTS", help="Maximum number of tasks that compute at once (r_e).")
    ] = 2,
    link1: Annotated[str, typer.Option(envvar="DEEPAR_LINK1", help="Capacity of link 1, to its devices.")] = "1Gbps",
    link2: Annotated[str, typer.Option(envvar="DEEPAR_LINK2", help="Capacity of link 2, to the cloud.")] = "100Mbps",
    *,
    network: Link2Options,
    accelerator: AcceleratorFlags,
    flags: StageFlags,
) -> None:
    """Run an edge. It computes the middle layers in its slots and relays between devices and the cloud.

    `--link2-latency` and `--link2-trace` play a network between edge and cloud; give the cloud workers the same.

    Example: `deepar stage edge --name e1 --slots 4 --link1 1Gbps --link2 100Mbps --link2-latency 40ms`
    """
    if name in topics.RESERVED_EDGE_NAMES:
        raise ConfigError(f"an edge cannot be named {name}: the name is reserved for a topic")
    options = options_of(
        EdgeOptions,
        name=name,
        slots=slots,
        link1=link1,
        link2=link2,
        **network.played(),
        **accelerator.chosen(),
        **flags.machine(),
    )
    _run_stage(options, flags)


@stage_app.command("cloud")
@with_option_groups
def cloud(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the worker.")] = "c1",
    *,
    network: Link2Options,
    accelerator: AcceleratorFlags,
    flags: StageFlags,
) -> None:
    """Run a cloud worker. It computes the last layers; several workers share the tasks as one consumer group.

    `--link2-latency` and `--link2-trace` play a network between the cloud and the edges, in the direction of the results.

    Example: `deepar stage cloud --name c2 --model MODEL.tflite --link2-latency 40ms`
    """
    options = options_of(CloudOptions, name=name, **network.played(), **accelerator.chosen(), **flags.machine())
    _run_stage(options, flags)


@with_option_groups
def gateway(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="Name of the gateway among the devices.")] = "gateway",
    edges: Edges = None,
    link: DeviceLink = "0",
    *,
    network: Link1Options,
    serving: ServeFlags,
    flags: StageFlags,
) -> None:
    """Serve clients that have no device: a device stage whose requests only edges and the cloud compute.

    Example: `deepar gateway --serve 127.0.0.1:8600 --edge e1`
    """
    options = options_of(
        DeviceOptions,
        name=name,
        edges=tuple(edges) if edges else None,
        link=link,
        gateway=True,
        **network.played(),
        **({**serving.served(), "serve": serving.serve or "127.0.0.1:8600"}),
        **flags.machine(),
    )
    _run_stage(options, flags)


def _run_stage(options: NodeOptions, flags: StageFlags, results: Path | None = None) -> None:
    from deploy.services.runners import make_runner  # imported here: the inference runtime is slow to import

    settings = wiring.node_settings(options, region=flags.region, lease_s=lease_of(flags.lease))
    key = key_of(Speaker(settings.role.value, settings.name), flags.identity_key)
    make = partial(make_runner, settings.role, options, flags.served(), wiring.log.info)
    on_result = ResultFile(results) if results else None
    endpoint = None
    if isinstance(options, DeviceOptions):
        from deploy.services.serving import endpoint_of  # imported here: it imports the inference runtime

        endpoint = endpoint_of(options)
    bus, probes = signed(wiring.kafka_bus(flags.bootstrap_servers), key), flags.probes
    run_on_uvloop(
        wiring.run_stage(
            bus,
            settings,
            make,
            http_port=probes.http_port,
            http_host=probes.http_host,
            on_result=on_result,
            endpoint=endpoint,
        )
    )


# --- deepar up -------------------------------------------------------------------------------------------------------


@with_option_groups
def up(
    file: Annotated[Path, typer.Argument(help="TOML file with the nodes, models, bus and planner.")],
    bootstrap_servers: Bootstrap = None,
    identity_master: MasterFile = None,
    *,
    probes: ProbeOptions,
) -> None:
    """Start the planner and all stages of one TOML file in this process, until Ctrl-C.

    With `bus.kind = "kafka"` other processes can submit tasks and follow along; `deploy/example.toml` shows every key. With
    `bus.kind = "memory"` no broker is needed, and clients reach the system through a device that serves them. With a master
    secret the region requires proofs of identity, and the key of every node is derived from the secret.

    Example: `deepar up deploy/serve.toml`
    """
    from deploy.services.up import run_up

    settings = load_settings(file)
    bus = _bus_of(settings, file, bootstrap_servers)
    run_on_uvloop(run_up(settings, bus, probes.http_port, probes.http_host, master_of(identity_master)))


def _bus_of(settings: UpSettings, file: Path, bootstrap_servers: str | None) -> Bus:
    """The bus that the file chooses. Raises `ConfigError` where nothing could use an in-process bus."""
    if settings.bus.kind == "kafka":
        return wiring.kafka_bus(bootstrap_servers or settings.bus.bootstrap_servers)
    if bootstrap_servers is not None:
        raise ConfigError(
            f"{file}: bus.kind: the bus is in this process, but a broker is given: {bootstrap_servers}",
            remedy='set kind = "kafka", or leave out --bootstrap-servers',
        )
    if not any(device.serve or device.serve_grpc for device in settings.device):
        raise ConfigError(
            f"{file}: bus.kind: other processes cannot submit tasks to a bus inside this process",
            remedy='let a device serve clients: serve = "127.0.0.1:8600"; or set kind = "kafka" and start `deepar broker`',
        )
    from bus.memory.bus import MemoryBroker, MemoryBus  # imported here: services on Kafka do not use it

    return MemoryBus(MemoryBroker(), "deepar-up")

"""`deepar planner | stage | up`: the services, one process each or all in one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from bus import topics
from bus.errors import ConfigError
from bus.identity.keys import Speaker
from bus.identity.signed_bus import signed
from bus.text.units import parse_duration
from bus.values import Objective
from deploy.console_output import completion
from deploy.console_output.options import Bootstrap, HttpHost, HttpPort, Region
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
    lease_of,
    load_settings,
    node_name,
    options_of,
)
from planner.core.placing import WhenLate
from planner.service.service import PlannerService
from stages.models.files.choice import parse_shapes, shape_words

stage_app = typer.Typer(no_args_is_help=True, help="Run one stage: a device, an edge or a cloud worker.")

Lease = Annotated[
    str, typer.Option(envvar="DEEPAR_LEASE", help="A process that is silent for longer counts as lost: 5s.")
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        envvar="DEEPAR_MODELS",
        help="A model it serves; may be given again. [default: lenet alexnet]",
        autocompletion=completion.models,
    ),
]
Signature = Annotated[
    str | None,
    typer.Option("--signature", envvar="DEEPAR_SIGNATURE", help="Which signature of its one --model is meant."),
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        envvar="DEEPAR_INPUT_SHAPE",
        metavar="NAME=1x1280",
        help="Shape of an input that its one --model leaves open; repeatable.",
    ),
]
Slowdown = Annotated[
    float,
    typer.Option(
        min=1.0, envvar="DEEPAR_SLOWDOWN", help="Slow computing down by this factor, to play a slower machine."
    ),
]
RunnerKind = Annotated[
    str,
    typer.Option(
        "--runner", envvar="DEEPAR_RUNNER", help="litert runs the models; modelled only waits for the profile's times."
    ),
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        envvar="DEEPAR_PROFILE",
        help="Use these times instead of measuring this machine, with --slowdown on top: a name (paper) or a file.",
    ),
]
Remeasure = Annotated[
    bool,
    typer.Option(
        "--remeasure", envvar="DEEPAR_REMEASURE", help="Measure this machine anew, whatever is remembered of it."
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
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="The planner's name.")] = "planner",
    policy: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_POLICY",
            help="deepar, no-delay, device-only, edge-only, cloud-only, neurosurgeon, or module:name.",
            autocompletion=completion.policies,
        ),
    ] = "deepar",
    objective: Annotated[
        Objective, typer.Option(envvar="DEEPAR_OBJECTIVE", help="What to minimise; pipelined goes with streaming.")
    ] = Objective.PIPELINED,
    lease: Lease = "5s",
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Waiting tasks above this are rejected (queue_full).")
    ] = 10_000,
    patience: Annotated[
        str,
        typer.Option(
            envvar="DEEPAR_PATIENCE",
            help="Time that a task may wait for its device, or for any node that can serve it, before it is rejected "
            "(no_device) or fails (device_lost, no_node).",
        ),
    ] = "10min",
    when_late: Annotated[
        WhenLate, typer.Option(help="What to do with a task that no placement is predicted to end by its deadline.")
    ] = WhenLate.REJECT,
    max_waiting_per_device: Annotated[
        int, typer.Option(min=1, help="Waiting tasks of one device above this are rejected (device_queue_full).")
    ] = 1_000,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Do not wait until the leading planner is silent.")
    ] = False,
    snapshot_every: Annotated[int, typer.Option(min=1, help="Decisions between two snapshots.")] = 500,
    identity_master: MasterFile = None,
    trust_everybody: Annotated[
        bool,
        typer.Option(
            "--trust-everybody",
            help="Accept records without proof of identity, in a region that demanded it until now.",
        ),
    ] = False,
    http_port: HttpPort = None,
    http_host: HttpHost = "127.0.0.1",
) -> None:
    """Run the planner of a region: it decides where every task runs, and publishes its decisions.

    A second planner for the same region stands by and takes over when the first falls silent.

    Example: `deepar planner --policy neurosurgeon --http-port 9100`
    """
    bus = wiring.kafka_bus(bootstrap_servers)
    name, lease_s, patience_s = node_name(name, "--name"), lease_of(lease), parse_duration(patience, "--patience")
    master = master_of(identity_master)
    if master is not None and trust_everybody:
        raise ConfigError("--trust-everybody and --identity-master exclude each other")

    def make(region: int) -> PlannerService:
        return wiring.make_planner(
            bus,
            name=name,
            region=region,
            policy=policy,
            objective=objective,
            execution=objective.execution,
            max_waiting=max_waiting,
            patience_s=patience_s,
            when_late=when_late,
            max_waiting_per_device=max_waiting_per_device,
            lease_s=lease_s,
            take_over=take_over,
            snapshot_every=snapshot_every,
            master=master,
            trust_everybody=trust_everybody,
        )

    make(region)  # an unknown policy is told before anything is connected
    if regions is None:
        run_on_uvloop(run_planner(bus, make(region), http_port=http_port, http_host=http_host))
    else:
        wanted = parse_regions(regions)
        run_on_uvloop(run_regions(bus, make, wanted, name=name, http_port=http_port, http_host=http_host))


@dataclass(frozen=True, kw_only=True)
class StageFlags:
    """The options that every stage has."""

    models: Models = None
    signature: Signature = None
    input_shape: InputShape = None
    slowdown: Slowdown = 1.0
    runner: RunnerKind = "litert"
    profile: ProfileName = None
    num_threads: Threads = 1
    remeasure: Remeasure = False
    bootstrap_servers: Bootstrap = None
    region: Region = 0
    lease: Lease = "10s"
    identity_key: KeyFile = None
    http_port: HttpPort = None
    http_host: HttpHost = "127.0.0.1"

    def machine(self) -> dict[str, Any]:
        """What of `NodeOptions` says how it computes. Raises `ConfigError`."""
        if self.runner not in ("litert", "modelled"):
            raise ConfigError(f"--runner {self.runner}: it is litert or modelled")
        return {
            "slowdown": self.slowdown,
            "profile": self.profile,
            "runner": self.runner,
            "threads": self.num_threads,
            "remeasure": self.remeasure,
        }

    def served(self) -> list[Served]:
        """The models that it serves. Raises `ConfigError` where it is open which of them a signature or a shape is for."""
        names = [name for entry in self.models or ["lenet", "alexnet"] for name in entry.split(",") if name]
        shapes = {name: shape_words(shape) for name, shape in parse_shapes(self.input_shape or ()).items()}
        if self.signature is None and not shapes:
            return list(names)
        if len(names) != 1:
            raise ConfigError(
                "--signature and --input-shape are about one model, and there are several",
                remedy="name one --model, or start the nodes with `deepar up`, whose file says it of each model",
            )
        return [ServedModel(model=names[0], signature=self.signature, input_shape=shapes)]


def with_stage_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, which reads the options off a signature: those of `StageFlags` in the place of `flags`."""
    shared = inspect.signature(StageFlags, eval_str=True).parameters

    @wraps(command)
    def run(**given: Any) -> None:
        flags = StageFlags(**{name: given.pop(name) for name in shared})
        command(**given, flags=flags)

    own = [entry for entry in inspect.signature(command, eval_str=True).parameters.values() if entry.name != "flags"]
    parameters = [entry.replace(kind=inspect.Parameter.KEYWORD_ONLY) for entry in (*own, *shared.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return run


@stage_app.command("device")
@with_stage_flags
def device(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="The device's name.")] = "d1",
    edges: Annotated[
        list[str] | None,
        typer.Option(
            "--edge",
            envvar="DEEPAR_EDGES",
            help="An edge it can reach; may be given again. Default: all.",
            autocompletion=completion.edges,
        ),
    ] = None,
    link: Annotated[
        str, typer.Option(envvar="DEEPAR_LINK", help="Limit of its own link 1, like 50Mbps; 0: no limit.")
    ] = "0",
    results: Annotated[Path | None, typer.Option(help="Append every result as a JSON line to this file.")] = None,
    *,
    flags: StageFlags,
) -> None:
    """Run a device: it computes the front of its tasks' models, sends activations, and collects results.

    Example: `deepar stage device --name d1 --edge e1 --slowdown 8 --results d1.jsonl`
    """
    options = options_of(
        DeviceOptions,
        name=name,
        edges=tuple(edges) if edges else None,
        link=link,
        **flags.machine(),
    )
    _run_stage(options, flags, results)


@stage_app.command("edge")
@with_stage_flags
def edge(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="The edge's name; part of its topic's name.")] = "e1",
    slots: Annotated[int, typer.Option(min=1, envvar="DEEPAR_SLOTS", help="Tasks that may compute at once (r_e).")] = 2,
    link1: Annotated[str, typer.Option(envvar="DEEPAR_LINK1", help="Capacity of link 1, to its devices.")] = "1Gbps",
    link2: Annotated[str, typer.Option(envvar="DEEPAR_LINK2", help="Capacity of link 2, to the cloud.")] = "100Mbps",
    *,
    flags: StageFlags,
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
        link1=link1,
        link2=link2,
        **flags.machine(),
    )
    _run_stage(options, flags)


@stage_app.command("cloud")
@with_stage_flags
def cloud(
    name: Annotated[str, typer.Option(envvar="DEEPAR_NODE", help="This worker's name.")] = "c1",
    *,
    flags: StageFlags,
) -> None:
    """Run a cloud worker: it computes the rest of the models. Several share the work as one consumer group.

    Example: `deepar stage cloud --name c2 --model MODEL.tflite`
    """
    options = options_of(CloudOptions, name=name, **flags.machine())
    _run_stage(options, flags)


def _run_stage(options: NodeOptions, flags: StageFlags, results: Path | None = None) -> None:
    from deploy.services.runners import make_runner  # not at the top: the runtime of the models takes long to import

    settings = wiring.node_settings(options, region=flags.region, lease_s=lease_of(flags.lease))
    key = key_of(Speaker(settings.role.value, settings.name), flags.identity_key)
    make = partial(make_runner, settings.role, options, flags.served(), wiring.log.info)
    on_result = ResultFile(results) if results else None
    bus = signed(wiring.kafka_bus(flags.bootstrap_servers), key)
    run_on_uvloop(
        wiring.run_stage(bus, settings, make, http_port=flags.http_port, http_host=flags.http_host, on_result=on_result)
    )


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
    from deploy.services.up import run_up

    settings = load_settings(file)
    if settings.bus.kind == "memory":
        raise ConfigError(
            f"{file}: bus.kind: with the bus inside this process nobody could submit a task",
            remedy='set kind = "kafka" and start `deepar broker`; for a run without a broker: deepar demo',
        )
    bus = wiring.kafka_bus(bootstrap_servers or settings.bus.bootstrap_servers)
    run_on_uvloop(run_up(settings, bus, http_port, http_host, master_of(identity_master)))

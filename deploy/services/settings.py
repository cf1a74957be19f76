"""The configuration file of `deepar up`: one TOML file that says what runs.

execution = "streaming"              # or "sequential", the paper's way
objective = "pipelined"              # or "sequential", the paper's (7)
models = ["lenet", "alexnet"]        # names of the zoo, .tflite files, or tables: see `ServedModel`

[bus]
kind = "memory"                      # or "kafka"

[planner]
policy = "deepar"

[[edge]]
name = "e1"
slots = 2
link1 = "200Mbps"
link2 = "40Mbps"
slowdown = 3.0

[[device]]
name = "d1"
slowdown = 10.0

[[cloud]]
name = "c1"
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    PlainValidator,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from bus.errors import ConfigError
from bus.text.units import parse_duration, parse_rate
from bus.values import Execution, NodeName, Objective
from planner.core.options import DEFAULT_PATIENCE_S, WhenLate
from stages.models.compute_options import BatchMode, ThreadCount, parse_threads
from stages.models.files.choice import ModelChoice, parse_shapes
from stages.network.played import NO_NETWORK, PlayedNetwork
from stages.network.trace import MAX_LATENCY_S, Trace, is_trace_file, read_trace


def _or_value_error(parse: Any) -> Any:
    def checked(value: Any) -> Any:
        try:
            return parse(value)
        except ConfigError as error:
            raise ValueError(f"{error}; {error.remedy}" if error.remedy else str(error)) from None

    return checked


Rate = Annotated[int, BeforeValidator(_or_value_error(parse_rate)), Field(ge=0)]
Latency = Annotated[float, BeforeValidator(_or_value_error(parse_duration)), Field(ge=0, le=MAX_LATENCY_S)]
PlayedTrace = Annotated[InstanceOf[Trace], BeforeValidator(_or_value_error(lambda file: read_trace(Path(file))))]
"""A trace, given as the name of its file."""
Duration = Annotated[float, BeforeValidator(_or_value_error(parse_duration)), Field(gt=0)]
Threads = Annotated[ThreadCount, PlainValidator(_or_value_error(lambda value: parse_threads(str(value), "threads")))]


class _Strict(BaseModel):
    """Base of all settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServedModel(_Strict):
    """A model with its choices: `{model = "FILE", signature = "NAME", input_shape = {NAME = "1x1280"}}`."""

    model: str  # a name of the zoo, or a .tflite file
    signature: str | None = None  # None: the main subgraph's
    input_shape: dict[str, str] = {}  # input's name -> its dimensions

    @property
    def choice(self) -> ModelChoice:
        """The choice in the form that loading a model expects. Raises `ConfigError`."""
        return ModelChoice(self.signature, parse_shapes(f"{name}={sizes}" for name, sizes in self.input_shape.items()))

    @model_validator(mode="after")
    def _readable(self) -> Self:
        _or_value_error(lambda served: served.choice)(self)
        return self


Served = Annotated[
    Annotated[str, Tag("name")] | Annotated[ServedModel, Tag("table")],
    Discriminator(lambda entry: "table" if isinstance(entry, dict | ServedModel) else "name"),
]
"""A model in a settings file: a name, or a table."""


class NodeOptions(_Strict):
    """Options that all nodes share."""

    name: NodeName
    slowdown: Annotated[float, Field(ge=1.0)] = 1.0  # emulates a machine slower by this factor
    models: tuple[Served, ...] | None = None  # None: the file's
    profile: str | None = None  # profile with times: a name or a file
    runner: Literal["litert", "modelled"] = "litert"  # compute, or sleep the profile's time
    threads: Threads = 1  # of the runtime for one inference; auto: measured
    remeasure: bool = False  # measure this machine again, ignore stored measurements
    identity_key: str | None = None  # file of the identity key; None: derived from the master of `up`

    @model_validator(mode="before")
    @classmethod
    def _latency_from_file(cls, values: Any) -> Any:
        """`link1_latency = "lte.csv"` is another way to write `link1_trace = "lte.csv"`."""
        for latency, trace in (("link1_latency", "link1_trace"), ("link2_latency", "link2_trace")):
            given = values.get(latency) if isinstance(values, dict) else None
            if isinstance(given, str) and is_trace_file(given):
                if values.get(trace) is not None:
                    raise ValueError(f"{latency} and {trace} both name a trace; leave out one of them")
                values = {**values, latency: 0.0, trace: given}
        return values

    @property
    def network(self) -> PlayedNetwork:
        """The network that the node plays on its own link."""
        return NO_NETWORK

    @model_validator(mode="after")
    def _playable(self) -> Self:
        _or_value_error(lambda options: options.network)(self)
        return self


Options = TypeVar("Options", bound=NodeOptions)


class DeviceOptions(NodeOptions):
    """A device."""

    link: Rate = 0  # its own limit on link 1, 0: none
    link1_latency: Latency = 0.0  # one-way latency to play on link 1, in both directions
    link1_trace: PlayedTrace | None = None  # file whose bandwidth and latency to play on link 1
    edges: tuple[NodeName, ...] | None = None  # E_i, the edges it can reach; None: all
    serve: str | None = None  # HOST:PORT where clients send their input over HTTP; None: nowhere
    serve_grpc: str | None = None  # the same over gRPC
    serve_token_file: str | None = None  # bearer tokens, one a line; None: those in DEEPAR_SERVE_TOKEN
    serve_certificate: str | None = None  # for TLS, PEM
    serve_key: str | None = None  # of the certificate, PEM
    serve_insecure: bool = False  # allow other machines without tokens or TLS
    sessions: bool = True  # requests share warm sessions; false: each is a task of its own
    gateway: bool = False  # it computes nothing itself for its clients

    @property
    def network(self) -> PlayedNetwork:
        """The network to play on link 1."""
        return PlayedNetwork(self.link1_latency, self.link1_trace)


class ServerOptions(NodeOptions):
    """Options that edges and cloud workers share."""

    accelerator: Literal["cpu", "gpu", "auto"] = "cpu"  # gpu: where it is right; auto: where it is faster, too
    gpu_tolerance: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-4  # largest relative difference from the CPU
    batches: BatchMode = "exact"  # when samples that wait for the same layers are computed together


class EdgeOptions(ServerOptions):
    """An edge."""

    slots: Annotated[int, Field(ge=1)] = 2  # r_e, tasks computing at once
    link1: Rate = 1_000_000_000  # B_e^1, to its devices
    link2: Rate = 100_000_000  # B_e^2, to the cloud
    link2_latency: Latency = 0.0  # one-way latency to play on link 2, in the direction of the cloud
    link2_trace: PlayedTrace | None = None  # file whose bandwidth and latency to play there

    @property
    def network(self) -> PlayedNetwork:
        """The network to play on link 2."""
        return PlayedNetwork(self.link2_latency, self.link2_trace)


class CloudOptions(ServerOptions):
    """A cloud stage."""

    link2_latency: Latency = 0.0  # one-way latency to play on link 2, in the direction of the edges
    link2_trace: PlayedTrace | None = None  # file whose bandwidth and latency to play there

    @property
    def network(self) -> PlayedNetwork:
        """The network to play on link 2."""
        return PlayedNetwork(self.link2_latency, self.link2_trace)


class BusOptions(_Strict):
    """The bus: in this process, or Kafka (`KAFKA_*` variables configure the connection)."""

    kind: Literal["memory", "kafka"] = "memory"
    bootstrap_servers: str | None = None  # host:port; None: KAFKA_BOOTSTRAP_SERVERS, else localhost:9092
    regions: Annotated[int, Field(ge=1)] = 1  # partitions of the control topics


class PlannerOptions(_Strict):
    """The planner."""

    policy: str = "deepar"
    lease: Duration = 5.0
    max_waiting: Annotated[int, Field(ge=1)] = 10_000
    patience: Duration = DEFAULT_PATIENCE_S
    when_late: WhenLate = WhenLate.REJECT
    learn: bool = True  # correct predictions by what completed tasks and nodes measured
    max_waiting_per_device: Annotated[int, Field(ge=1)] = 1_000


class UpSettings(_Strict):
    """The whole file."""

    region: Annotated[int, Field(ge=0)] = 0
    lease: Duration = 10.0  # of the nodes
    objective: Objective = Objective.PIPELINED
    execution: Execution = Execution.STREAMING
    models: Annotated[tuple[Served, ...], Field(min_length=1)] = ("lenet",)
    bus: BusOptions = BusOptions()
    planner: PlannerOptions | None = PlannerOptions()
    device: tuple[DeviceOptions, ...] = ()
    edge: tuple[EdgeOptions, ...] = ()
    cloud: tuple[CloudOptions, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [node.name for node in (*self.device, *self.edge, *self.cloud)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: duplicate node name")
        if self.bus.kind == "memory":
            known = {edge.name for edge in self.edge}
            for device in self.device:
                for edge in device.edges or ():
                    if edge not in known:
                        raise ValueError(f"device {device.name} names the edge {edge}, which is not defined")
        try:
            self.objective.executed_as(self.execution)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


def load_settings(path: Path) -> UpSettings:
    """Read and check a file. Raises `ConfigError` naming the file and the key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    try:
        return UpSettings.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_fault(error)}") from None


def options_of(kind: type[Options], **values: Any) -> Options:
    """A node's options from flags. Raises `ConfigError` naming the flag."""
    try:
        return kind(**values)
    except ValidationError as error:
        key, message = _key_and_fault(error)
        flag = key.replace("edges.", "edge ").replace("_", "-")
        raise ConfigError(f"--{flag}: {message}" if key else message) from None


def node_name(text: str, flag: str) -> str:
    """Validate and return a node name. Raises `ConfigError` naming the flag."""
    try:
        return TypeAdapter(NodeName).validate_python(text)
    except ValidationError as error:
        raise ConfigError(f"{flag} {_first_fault(error)}") from None


def lease_of(text: str, flag: str = "--lease") -> float:
    """A lease in seconds. Raises `ConfigError` for 0: a node would be lost immediately after each heartbeat."""
    lease_s = parse_duration(text, flag)
    if not lease_s:
        raise ConfigError(f"{flag} {text}: a lease must be longer than 0", remedy="write it like 5s")
    return lease_s


def _first_fault(error: ValidationError) -> str:
    """The first fault as `KEY: what is wrong`."""
    key, message = _key_and_fault(error)
    return f"{key}: {message}" if key else message


def _key_and_fault(error: ValidationError) -> tuple[str, str]:
    """The key of the first fault, empty where it concerns several, and what is wrong."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part + 1 if isinstance(part, int) else part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    elif first["type"] == "string_pattern_mismatch":
        message = f"{first['input']!r} is not a valid name: only letters, digits, _ and - are allowed"
    return key, message

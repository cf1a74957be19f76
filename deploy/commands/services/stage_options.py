"""The groups of options that stages share: models, machine, played networks, accelerator, endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.errors import ConfigError
from deploy.console_output import completion
from deploy.console_output.options import Bootstrap, GpuTolerance, Lease, ProbeOptions, Region
from deploy.services.identities import KeyFile
from deploy.services.settings import (
    Served,
    ServedModel,
)
from stages.models.compute_options import parse_threads
from stages.models.files.choice import parse_shapes, shape_words

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
    """The processor of an edge or a cloud worker, and its batches."""

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

"""Options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from bus.errors import ConfigError

Bootstrap = Annotated[
    str | None,
    typer.Option(
        "--bootstrap-servers",
        "-b",
        help="Kafka as host:port; by default KAFKA_BOOTSTRAP_SERVERS or else localhost:9092.",
    ),
]
BootstrapFromEnv = Annotated[
    str | None,
    typer.Option("--bootstrap-servers", "-b", envvar="KAFKA_BOOTSTRAP_SERVERS", help="Kafka, host:port."),
]
Lease = Annotated[str, typer.Option(envvar="DEEPAR_LEASE", help="Maximum silence before a process counts as lost: 5s.")]
Region = Annotated[int, typer.Option(min=0, envvar="DEEPAR_REGION", help="Region: a partition of the control topics.")]
HttpPort = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=65535,
        metavar="PORT",
        envvar="DEEPAR_HTTP_PORT",
        help="Port for /livez, /readyz and /metrics; off unless set.",
    ),
]
HttpHost = Annotated[str, typer.Option(envvar="DEEPAR_HTTP_HOST", help="Address that --http-port listens on.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Codecs = Annotated[bool, typer.Option("--codecs", help="Allow codecs on the links.")]
MinAgreement = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Minimum agreement of lossy codecs, like 0.995. Default: only lossless codecs."),
]

GpuTolerance = Annotated[
    float,
    typer.Option(
        min=0.0,
        envvar="DEEPAR_GPU_TOLERANCE",
        help="Largest difference between the results of GPU and CPU, relative to the largest value of the tensor.",
    ),
]


class Processor(StrEnum):
    """The processor that computes."""

    CPU = "cpu"
    GPU = "gpu"


def checked_agreement(min_agreement: float | None, *, codecs: bool) -> float | None:
    """The value of --min-agreement. Raises `ConfigError`."""
    if min_agreement is not None and not 0 < min_agreement <= 1:
        raise ConfigError(f"--min-agreement {min_agreement:g}: must be above 0 and at most 1")
    if min_agreement is not None and not codecs:
        raise ConfigError("--min-agreement is for --codecs", remedy="--codecs --min-agreement ...")
    return min_agreement


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Where a service serves its probes and metrics."""

    http_port: HttpPort = None
    http_host: HttpHost = "127.0.0.1"

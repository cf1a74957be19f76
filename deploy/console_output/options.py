"""Options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

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


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Where a service serves its probes and metrics."""

    http_port: HttpPort = None
    http_host: HttpHost = "127.0.0.1"

"""`deepar up`: the planner and all stages of one file in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bus.errors import ConfigError
from bus.port import Bus
from deploy.console_output.option_groups import with_option_groups
from deploy.console_output.options import Bootstrap, ProbeOptions
from deploy.services import wiring
from deploy.services.identities import MasterFile, master_of
from deploy.services.process import run_on_uvloop
from deploy.services.settings import (
    UpSettings,
    load_settings,
)


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

"""`deepar doctor`: look at this machine and the system around it, and say what to do about what is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bus.errors import DeeparError, UnknownTopicError
from bus.kafka import KafkaBus
from bus.kafka_connection import KafkaConnection
from bus.port import Bus
from deploy import identity_checks, machine_checks, region_checks, site_checks, size_checks
from deploy.machine_checks import Check
from deploy.process import EXIT_FAILED, run_on_uvloop

# Nothing here may import the runtime at its head: that it cannot be imported is one of the findings.


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A model whose operators must all have a kernel: a name, or a .tflite file; may be given again."
            " [default: lenet]",
        ),
    ] = None,
    bootstrap_servers: Annotated[
        str | None,
        typer.Option(
            "--bootstrap-servers", "-b", help="Kafka, host:port. Default: KAFKA_BOOTSTRAP_SERVERS, else localhost:9092."
        ),
    ] = None,
) -> None:
    """Check this machine, the broker, topics and sizes of records, planners, nodes and clocks; exit 1 if something is wrong.

    It listens to the nodes for some seconds, to hear who is alive and whose clock is wrong. Each finding says what to do.

    Example: `deepar doctor --model alexnet`
    """
    connection = KafkaConnection.from_env(bootstrap_servers=bootstrap_servers)
    with Console(stderr=True).status("looking at this machine, then at the system; some seconds"):
        checks = run_on_uvloop(examine(connection, models or ["lenet"]))
    if as_json:
        sys.stdout.write(json.dumps({"checks": [asdict(check) for check in checks]}) + "\n")
    else:
        console = Console(highlight=False)
        for check in checks:
            mark = "[green]ok  [/]" if check.ok else "[bold red]BAD [/]"
            console.print(f"{mark} {check.name:<10} {escape(check.detail)}", soft_wrap=True)
            if not check.ok and check.remedy:
                console.print(f"                [cyan]{escape(check.remedy)}[/]", soft_wrap=True)
    if not all(check.ok for check in checks):
        raise typer.Exit(EXIT_FAILED)


async def examine(connection: KafkaConnection, models: Sequence[str]) -> list[Check]:
    """Every check; those of the system need the broker and are left out where none answers."""
    checks = [
        machine_checks.python(),
        *await asyncio.to_thread(machine_checks.runtime, models),
        machine_checks.disk(),
        *identity_checks.key_files(os.environ),
    ]
    bus = KafkaBus(connection)
    try:
        async with bus:
            checks.append(Check("broker", True, f"Kafka at {connection.bootstrap_servers} answers"))
            checks += await size_checks.look(connection)
            checks += await site_checks.look(bus)
            for look in (region_checks.missing_topics, region_checks.regions):
                checks += await _look(look, bus)
    except DeeparError as error:
        checks.append(Check("broker", False, str(error), error.remedy or "deepar broker starts one here"))
    return checks


async def _look(look: Callable[[Bus], Awaitable[list[Check]]], bus: Bus) -> list[Check]:
    try:
        return await look(bus)
    except UnknownTopicError:
        return []  # `missing_topics` has told

"""`deepar doctor`: checks of this machine, the broker and the regions, each with a remedy."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bus.errors import DeeparError, UnknownTopicError
from bus.kafka.bus import KafkaBus
from bus.kafka.connection import KafkaConnection
from bus.port import Bus
from bus.text.json_text import json_text
from deploy.doctor import identity_checks, machine_checks, region_checks, site_checks, size_checks, topic_checks
from deploy.doctor.machine_checks import Check
from deploy.services.process import EXIT_FAILED, run_on_uvloop
from deploy.services.telemetry.log_setup import configure_logging

MARKS = {"ok": "[green]ok  [/]", "warning": "[bold yellow]WARN[/]", "failed": "[bold red]BAD [/]"}

# This module must not import the inference runtime at the top: a failing import is one of the things it reports.


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Model whose operators must all have a kernel: a name, or a .tflite file; repeatable."
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
    """Check this machine, the broker, topics and sizes of records, planners, nodes and clocks.

    Each check is ok, WARN (works, but needs attention) or BAD, and comes with a remedy. Exit 1 if any is BAD, else 0.
    The command listens for some seconds to find live nodes and wrong clocks.

    Example: `deepar doctor --model alexnet`
    """
    configure_logging("error")  # the checks say what the log would
    connection = KafkaConnection.from_env(bootstrap_servers=bootstrap_servers)
    with Console(emoji=False, stderr=True).status("checking this machine, then the system; takes some seconds"):
        checks = run_on_uvloop(examine(connection, models or ["lenet"]))
    if as_json:
        sys.stdout.write(json_text({"checks": [_as_json(check) for check in checks]}) + "\n")
    else:
        console = Console(emoji=False, highlight=False)
        for check in checks:
            console.print(f"{MARKS[check.state]} {check.name:<10} {escape(check.detail)}", soft_wrap=True)
            if check.state != "ok" and check.remedy:
                console.print(f"                [cyan]{escape(check.remedy)}[/]", soft_wrap=True)
    if not all(check.ok for check in checks):
        raise typer.Exit(EXIT_FAILED)


def _as_json(check: Check) -> dict[str, object]:
    return {
        "name": check.name,
        "ok": check.ok,
        "state": check.state,
        "detail": check.detail,
        "remedy": check.remedy,
    }


async def examine(connection: KafkaConnection, models: Sequence[str]) -> list[Check]:
    """Run every check; checks of the system are skipped if the broker does not answer."""
    checks = [
        machine_checks.python(),
        *await asyncio.to_thread(machine_checks.runtime, models),
        *await asyncio.to_thread(machine_checks.gpu, os.environ),
        machine_checks.disk(),
        *identity_checks.key_files(os.environ),
    ]
    bus = KafkaBus(connection)
    try:
        async with bus:
            checks += await site_checks.brokers(connection)
            checks += await size_checks.look(connection)
            checks += await site_checks.look(bus)
            for look in (topic_checks.missing, topic_checks.settings, region_checks.regions):
                checks += await _look(look, bus)
    except DeeparError as error:
        checks.append(Check("broker", False, str(error), error.remedy or "deepar broker starts one here"))
    return checks


async def _look(look: Callable[[Bus], Awaitable[list[Check]]], bus: Bus) -> list[Check]:
    try:
        return await look(bus)
    except UnknownTopicError:
        return []  # `topic_checks.missing` reports it

"""`deepar acls`: what every role may do on a broker with access control lists, printed, or set."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bus.errors import ConfigError
from bus.kafka.connection import KafkaConnection
from bus.text.json_text import json_text
from deploy.console_output.options import Bootstrap
from deploy.generated_docs import acls as lists
from deploy.generated_docs.acls import Entry
from deploy.services.process import run_on_uvloop


def acls(
    edges: Annotated[
        list[str] | None, typer.Option("--edge", help="An edge that there is; may be given again.")
    ] = None,
    users: Annotated[
        list[str] | None,
        typer.Option("--user", help="USER=ROLE, e.g. alice=tools or e1=edge:e1; may be given again."),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Set the lists of the --user's on the broker.")] = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print calls of Kafka's kafka-acls.sh for the --user's instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    bootstrap_servers: Bootstrap = None,
) -> None:
    """Print what each role needs on a broker with access control lists, from the table of topics; --apply sets it.

    Every edge is a role of its own.

    Example: `deepar acls --edge e1 --edge e2 --user e1=edge:e1 --user d1=device --apply`
    """
    granted = lists.for_users(_users(users or []), edges or [])
    if (apply or commands) and not granted:
        raise ConfigError("whose lists?", remedy="name users with --user USER=ROLE")
    if commands:
        connection = KafkaConnection.from_env(bootstrap_servers=bootstrap_servers)
        print("\n".join(lists.as_commands(granted, connection.bootstrap_servers)))
        return
    shown = lists.roles(edges or [])
    done = None
    if apply:
        done = run_on_uvloop(lists.apply(KafkaConnection.from_env(bootstrap_servers=bootstrap_servers), granted))
    if as_json:
        report = {"roles": _plain(shown)} | ({"users": _plain(granted)} if granted else {})
        sys.stdout.write(json_text(report | ({"applied": done} if apply else {})) + "\n")
        return
    console = Console(emoji=False, highlight=False)
    console.print(_table(granted or shown, "user" if granted else "role"))
    if apply:
        console.print(f"{done} entries are set; what was there before stays")


def _users(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        user, equals, role = pair.partition("=")
        if not (user and equals and role):
            raise ConfigError(f"--user {pair}: it is USER=ROLE")
        if user in found:
            raise ConfigError(f"--user {user} is given twice")
        found[user] = role
    return found


def _plain(granted: Mapping[str, Sequence[Entry]]) -> dict[str, list[dict[str, str]]]:
    return {
        who: [{"resource": e.resource.value, "name": e.name, "operation": e.operation.value} for e in entries]
        for who, entries in granted.items()
    }


def _table(granted: Mapping[str, Sequence[Entry]], who: str) -> Table:
    table = Table(who, "resource", "name", "may", title="what is allowed; everything else is refused")
    for name, entries in granted.items():
        merged: dict[tuple[str, str], list[str]] = {}
        for entry in entries:
            merged.setdefault((entry.resource.value, entry.name), []).append(entry.operation.value.lower())
        for index, ((resource, about), operations) in enumerate(merged.items()):
            table.add_row(name if index == 0 else "", resource.lower(), about, ", ".join(operations))
        table.add_section()
    return table

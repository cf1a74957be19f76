"""`deepar acls`: access control lists for every role, printed or set on the broker."""

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
from deploy.generated_docs.acls import AclEntry
from deploy.services.process import run_on_uvloop


def acls(
    edges: Annotated[list[str] | None, typer.Option("--edge", help="Name of an edge; repeatable.")] = None,
    users: Annotated[
        list[str] | None,
        typer.Option("--user", help="Role of a user as USER=ROLE, e.g. alice=tools or e1=edge:e1; repeatable."),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Set the lists of each --user on the broker.")] = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print kafka-acls.sh commands for each --user instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    bootstrap_servers: Bootstrap = None,
) -> None:
    """Print the access control lists that each role needs, derived from the table of topics. --apply sets them.

    Each edge has its own role.

    Example: `deepar acls --edge e1 --edge e2 --user e1=edge:e1 --user d1=device --apply`
    """
    granted = lists.for_users(_users(users or []), edges or [])
    if (apply or commands) and not granted:
        raise ConfigError("--apply and --commands need at least one user", remedy="add --user USER=ROLE")
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
        console.print(f"{done} entries are set; existing entries are unchanged")


def _users(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        user, equals, role = pair.partition("=")
        if not (user and equals and role):
            raise ConfigError(f"--user {pair}: must be USER=ROLE")
        if user in found:
            raise ConfigError(f"--user {user} is given twice")
        found[user] = role
    return found


def _plain(granted: Mapping[str, Sequence[AclEntry]]) -> dict[str, list[dict[str, str]]]:
    return {
        who: [{"resource": e.resource.value, "name": e.name, "operation": e.operation.value} for e in entries]
        for who, entries in granted.items()
    }


def _table(granted: Mapping[str, Sequence[AclEntry]], who: str) -> Table:
    table = Table(who, "resource", "name", "may", title="allowed operations; everything else is denied")
    for name, entries in granted.items():
        merged: dict[tuple[str, str], list[str]] = {}
        for entry in entries:
            merged.setdefault((entry.resource.value, entry.name), []).append(entry.operation.value.lower())
        for index, ((resource, about), operations) in enumerate(merged.items()):
            table.add_row(name if index == 0 else "", resource.lower(), about, ", ".join(operations))
        table.add_section()
    return table

"""`deepar identity`: a region's master secret, and the keys that are derived from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bus.errors import ConfigError
from bus.identity.keys import SPEAKING_ROLES, Master, Speaker, load_key, load_master, write_secret
from bus.text.json_text import json_text
from deploy.console_output.options import AsJson

app = typer.Typer(
    no_args_is_help=True,
    help="Create keys that prove which node sent a message. The planner of a region holds the master, each node its own key.",
)


@app.command("new-master")
def new_master(
    out: Annotated[Path, typer.Option(help="File to create, readable only by its owner.")] = Path("deepar.master"),
    frames: Annotated[
        bool, typer.Option("--frames", help="Require proofs for activations and results too (costs 0.5 ms per MB).")
    ] = False,
) -> None:
    """Create a master secret. It can sign as any node: give it only to the planner and to the administrator who creates keys.

    Example: `deepar identity new-master --out region0.master`
    """
    master = Master.new(frames=frames)
    write_secret(out, master.to_text())
    typer.echo(
        f"{out}: master {master.fingerprint}; start the planner with DEEPAR_IDENTITY_MASTER_FILE={out}", err=True
    )


@app.command("key")
def key(
    name: Annotated[str, typer.Argument(help="Name of the node, or any name for a load generator.")],
    role: Annotated[str, typer.Option(help=f"Role of the node: {', '.join(SPEAKING_ROLES)}.")],
    master: Annotated[
        Path, typer.Option(envvar="DEEPAR_IDENTITY_MASTER_FILE", help="Master secret of the region.")
    ] = Path("deepar.master"),
    out: Annotated[
        Path | None, typer.Option(help="File to create, readable only by its owner. [default: ROLE-NAME.key]")
    ] = None,
) -> None:
    """Create the key of one node. The same role and name give the same key; use each name for one role only.

    Example: `deepar identity key d1 --role device --master region0.master --out d1.key`
    """
    made = load_master(master).key(Speaker(role, name))
    file = out or Path(f"{role}-{name}.key")
    write_secret(file, made.to_text())
    typer.echo(
        f"{file}: {made.speaker}, of master {made.fingerprint}; start the node with DEEPAR_IDENTITY_KEY_FILE={file}",
        err=True,
    )


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="Key file or master file.")],
    as_json: AsJson = False,
) -> None:
    """Show the node and master fingerprint of a key file. The secret is not shown.

    Example: `deepar identity show d1.key`
    """
    found: dict[str, str | bool | None]
    try:
        one = load_key(file)
        found = {
            "kind": "key",
            "speaker": str(one.speaker),
            "master": one.fingerprint,
            "frames": one.frames is not None,
        }
    except ConfigError:
        secret = load_master(file)
        found = {"kind": "master", "speaker": None, "master": secret.fingerprint, "frames": secret.frames}
    if as_json:
        sys.stdout.write(json_text(found) + "\n")
    else:
        owner = f"{found['kind']} {found['speaker'] or ''}".strip()
        typer.echo(f"{owner}, master {found['master']}" + ", for frames too" * bool(found["frames"]))


__all__ = ["app"]

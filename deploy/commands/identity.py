"""`deepar identity`: a region's master secret, and the keys that are made of it."""

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
    help="Keys that prove which node a message is of. The region's planner holds the master, each node its own key.",
)


@app.command("new-master")
def new_master(
    out: Annotated[Path, typer.Option(help="The new file; only its owner may read it.")] = Path("deepar.master"),
    frames: Annotated[
        bool, typer.Option("--frames", help="Demand proofs of activations and results, too (half a millisecond a MB).")
    ] = False,
) -> None:
    """Make a master secret. Whoever holds it can speak as everybody: it belongs to the planner, and to whoever makes keys.

    Example: `deepar identity new-master --out region0.master`
    """
    master = Master.new(frames=frames)
    write_secret(out, master.to_text())
    typer.echo(
        f"{out}: master {master.fingerprint}; the planner takes it by DEEPAR_IDENTITY_MASTER_FILE={out}", err=True
    )


@app.command("key")
def key(
    name: Annotated[str, typer.Argument(help="The node's name; of a load generator any name.")],
    role: Annotated[str, typer.Option(help=f"{', '.join(SPEAKING_ROLES)}.")],
    master: Annotated[
        Path, typer.Option(envvar="DEEPAR_IDENTITY_MASTER_FILE", help="The region's master secret.")
    ] = Path("deepar.master"),
    out: Annotated[
        Path | None, typer.Option(help="The new file; only its owner may read it. [default: ROLE-NAME.key]")
    ] = None,
) -> None:
    """Make the key of one node. The same name gives the same key: keep one role a name.

    Example: `deepar identity key d1 --role device --master region0.master --out d1.key`
    """
    made = load_master(master).key(Speaker(role, name))
    file = out or Path(f"{role}-{name}.key")
    write_secret(file, made.to_text())
    typer.echo(
        f"{file}: {made.speaker}, of master {made.fingerprint}; it takes it by DEEPAR_IDENTITY_KEY_FILE={file}",
        err=True,
    )


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A key or a master.")],
    as_json: AsJson = False,
) -> None:
    """Say whose a file is, and of which master; never the secret.

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
        whose = f"{found['kind']} {found['speaker'] or ''}".strip()
        typer.echo(f"{whose}, master {found['master']}" + ", for frames too" * bool(found["frames"]))


__all__ = ["app"]

"""Loading of identity keys and masters from files, and the command line options that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bus.errors import ConfigError
from bus.identity.keys import Key, Master, Speaker, load_key, load_master

KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--identity-key",
        envvar="DEEPAR_IDENTITY_KEY_FILE",
        help="File with the identity key, if the region requires one (`deepar identity`).",
    ),
]
MasterFile = Annotated[
    Path | None,
    typer.Option(
        "--identity-master",
        envvar="DEEPAR_IDENTITY_MASTER_FILE",
        help="File with the master secret; every node must then prove its identity (`deepar identity`).",
    ),
]


def key_of(speaker: Speaker, file: Path | None) -> Key | None:
    """Load a key. Raises `ConfigError` if it belongs to another node."""
    if file is None:
        return None
    key = load_key(file)
    if key.speaker != speaker:
        raise ConfigError(
            f"{file} holds the key of {key.speaker}, but this process is {speaker}",
            remedy=f"create its key: deepar identity key {speaker.name} --role {speaker.role}",
        )
    return key


def submitter_of(file: Path | None) -> Key | None:
    """Load the key of a submitter: a load generator, or a device that submits its own tasks. Raises `ConfigError`."""
    if file is None:
        return None
    key = load_key(file)
    if key.speaker.role not in ("loadgen", "device"):
        raise ConfigError(
            f"{file} holds the key of {key.speaker}, which may not submit tasks",
            remedy="create one: deepar identity key NAME --role loadgen",
        )
    return key


def master_of(file: Path | None) -> Master | None:
    """Load the master in a file. Raises `ConfigError`."""
    return None if file is None else load_master(file)


__all__ = ["KeyFile", "MasterFile", "key_of", "master_of", "submitter_of"]

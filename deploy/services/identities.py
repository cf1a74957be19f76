"""The keys and masters of processes: from the files that flags, variables or `deepar up`'s file name."""

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
        help="The key that proves who speaks, where the region demands it (`deepar identity`).",
    ),
]
MasterFile = Annotated[
    Path | None,
    typer.Option(
        "--identity-master",
        envvar="DEEPAR_IDENTITY_MASTER_FILE",
        help="Demand that every node proves who it is, by keys of this master secret (`deepar identity`).",
    ),
]


def key_of(speaker: Speaker, file: Path | None) -> Key | None:
    """The key in a file. Raises `ConfigError` where it is another's."""
    if file is None:
        return None
    key = load_key(file)
    if key.speaker != speaker:
        raise ConfigError(
            f"{file} holds the key of {key.speaker}, and this is {speaker}",
            remedy=f"make its own: deepar identity key {speaker.name} --role {speaker.role}",
        )
    return key


def submitter_of(file: Path | None) -> Key | None:
    """The key of whoever submits tasks: a load generator's, or a device's, who may submit its own. Raises `ConfigError`."""
    if file is None:
        return None
    key = load_key(file)
    if key.speaker.role not in ("loadgen", "device"):
        raise ConfigError(
            f"{file} holds the key of {key.speaker}, who may submit no tasks",
            remedy="make one: deepar identity key NAME --role loadgen",
        )
    return key


def master_of(file: Path | None) -> Master | None:
    """The master in a file. Raises `ConfigError`."""
    return None if file is None else load_master(file)


__all__ = ["KeyFile", "MasterFile", "key_of", "master_of", "submitter_of"]

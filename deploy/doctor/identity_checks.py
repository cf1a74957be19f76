"""What `deepar doctor` looks at where proofs of identity are demanded: our key, and whether it is of the region's master."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from bus.errors import ConfigError
from bus.identity.keys import Key, load_key, load_master
from deploy.doctor.machine_checks import Check


def key_files(environment: Mapping[str, str]) -> list[Check]:
    """Of the key or master that the environment names: that it is one, of whom, and that nobody else can read it."""
    checks = []
    for variable, load in (("DEEPAR_IDENTITY_KEY_FILE", load_key), ("DEEPAR_IDENTITY_MASTER_FILE", load_master)):
        if not (name := environment.get(variable)):
            continue
        file = Path(name)
        try:
            found = load(file)
        except ConfigError as error:
            checks.append(Check("identity", False, f"{variable}: {error}", error.remedy or f"see {variable}"))
            continue
        said = f"{file}: of master {found.fingerprint}"
        node = environment.get("DEEPAR_NODE")
        if isinstance(found, Key):
            said = f"{file}: the key of {found.speaker}, of master {found.fingerprint}"
            if node and node != found.speaker.name:
                remedy = f"deepar identity key {node} --role {found.speaker.role}"
                checks.append(Check("identity", False, f"{said}, and DEEPAR_NODE is {node}", remedy))
                continue
        open_to_others = bool(file.stat().st_mode & 0o077)
        said += ", and others on this machine may read it" if open_to_others else ""
        checks.append(Check("identity", not open_to_others, said, f"chmod 600 {file}"))
    return checks


def own_key() -> Key | None:
    """The key that the environment names; whether it is one has been looked at already."""
    try:
        return load_key(Path(os.environ["DEEPAR_IDENTITY_KEY_FILE"]))
    except (KeyError, ConfigError):
        return None


def demanded_by_region(region: int, demanded: str | None) -> list[Check]:
    """Whether our key, where we have one, is of the master that a region demands (its fingerprint; None: no proofs)."""
    key = own_key()
    if demanded is None or key is None:
        return []
    if key.fingerprint != demanded:
        said = f"region {region} demands keys of master {demanded}, and ours is of {key.fingerprint}"
        return [Check("identity", False, said, "deepar identity key, with the region's master")]
    return [Check("identity", True, f"region {region} demands keys of master {demanded}, and ours is one")]

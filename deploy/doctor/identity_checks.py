"""Identity checks of `deepar doctor`: the local key files, and whether they match the master of each region."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from bus.errors import ConfigError
from bus.identity.keys import Key, load_key, load_master
from deploy.doctor.machine_checks import Check


def key_files(environment: Mapping[str, str]) -> list[Check]:
    """Check the key and master files named by the environment: validity, owner, and file permissions."""
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
        said += ", and other users of this machine can read it" if open_to_others else ""
        checks.append(Check("identity", not open_to_others, said, f"chmod 600 {file}"))
    return checks


def own_key() -> Key | None:
    """The key named by the environment, or None; `key_files` reports an invalid one."""
    try:
        return load_key(Path(os.environ["DEEPAR_IDENTITY_KEY_FILE"]))
    except (KeyError, ConfigError):
        return None


def demanded_by_region(region: int, demanded: str | None) -> list[Check]:
    """Check our key, if any, against the master fingerprint that a region requires (None: no proofs required)."""
    key = own_key()
    if demanded is None or key is None:
        return []
    if key.fingerprint != demanded:
        said = f"region {region} requires keys of master {demanded}, but ours is of {key.fingerprint}"
        return [Check("identity", False, said, "create a key with the region's master: deepar identity key")]
    return [Check("identity", True, f"region {region} requires keys of master {demanded}, and ours matches")]

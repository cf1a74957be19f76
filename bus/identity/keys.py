"""Who speaks: a record that claims a node carries a proof that its sender holds that node's key.

Kafka knows which user writes to a topic, and not for which node a message inside it speaks. So a region may demand a proof:
its planner holds a *master secret*, every sender a *key* derived from it for one speaker (`device:d1`), and every record on a
topic of `bus.identity.authorization` two headers more, the speaker and an HMAC-SHA-256 over what the record says and
where it stands:

    speaker's key   HMAC(master, "deepar identity 1" LF SPEAKER)
    record's proof  HMAC(speaker's key, "deepar record 1" LF SPEAKER LF TOPIC LF PARTITION LF LENGTH OF KEY LF KEY VALUE)

Neither a speaker nor a topic holds a line feed, and the key's length is told, so no two records have one text. The partition
is the region. A *fingerprint* names a master without telling anything of it; the region tells it to all (`EpochOpened`), so a
sender with no key, or with one of another master, learns it at once instead of being refused for ever.

A master may demand that frames are proven, too (`bus.identity.frame_keys`); its fingerprint is another then, so all
or none do it.

Secrets are in files, in no variable, no message, no `repr` and no error.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final

from bus.errors import ConfigError
from bus.identity.frame_keys import FrameKeys, rows_of
from bus.identity.proofs import (
    IDENTITY_HEADER,
    PROOF_HEADER,
    REMEMBERED_KEYS,
    SPEAKING_ROLES,
    WRONG_IDENTITY,
    Speaker,
    mac,
    proof_of,
    proven,
    refused,
)
from bus.port import Headers, Record

SECRET_BYTES: Final = 32
_MASTER_FILE = re.compile(r"deepar-master-1 ([0-9a-f]{64})( frames)?\s*")
_KEY_FILE = re.compile(
    r"deepar-key-1 ([a-z]+:\S+) ([0-9a-f]{64}) ([0-9a-f]{16})( frames)?((?:\n(?:reads|writes) \S+ [0-9a-f]{64})*)\s*"
)
_FRAME_LINE = re.compile(r"(reads|writes) (\S+) ([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Key:
    """What proves that a record is of `speaker`."""

    speaker: Speaker
    fingerprint: str  # of the master that it was derived from
    secret: bytes = field(repr=False)
    frames: FrameKeys | None = None  # where the master demands that frames are proven

    def headers(self, topic: str, partition: int, key: str | None, value: bytes) -> Headers:
        """The two headers of a record."""
        speaker = str(self.speaker).encode()
        proof = _proof(self.secret, speaker, topic, partition, key, value)
        return ((IDENTITY_HEADER, speaker), (PROOF_HEADER, proof))

    def to_text(self) -> str:
        """As it stands in a key file."""
        first = f"deepar-key-1 {self.speaker} {self.secret.hex()} {self.fingerprint}"
        lines = [first + " frames" * (self.frames is not None)]
        if self.frames is not None:
            lines += [f"reads {row} {secret.hex()}" for row, secret in self.frames.reads.items()]
            lines += [f"writes {row} {secret.hex()}" for row, secret in self.frames.writes.items()]
        return "\n".join(lines) + "\n"


class Master:
    """A region's master secret; only planners, and whoever makes keys, hold it."""

    def __init__(self, secret: bytes, *, frames: bool = False) -> None:
        """`frames`: its region demands that frames are proven, too."""
        if len(secret) != SECRET_BYTES:
            raise ConfigError(f"a master secret has {SECRET_BYTES} bytes")
        self._secret = secret
        self.frames = frames
        self.fingerprint = mac(secret, b"deepar fingerprint 1" + b" frames" * frames).hex()[:16]
        self._secret_of = lru_cache(REMEMBERED_KEYS)(self._derive)

    @classmethod
    def new(cls, *, frames: bool = False) -> Master:
        """A fresh one, from the operating system's randomness."""
        return cls(secrets.token_bytes(SECRET_BYTES), frames=frames)

    def key(self, speaker: Speaker) -> Key:
        """The key of a speaker."""
        frames = FrameKeys.of(self._secret, speaker) if self.frames and any(rows_of(speaker)) else None
        return Key(speaker, self.fingerprint, self._derive(str(speaker).encode()), frames)

    def speaker(self, record: Record) -> Speaker:
        """Who has sent a record. Raises `ProtocolError` (`wrong_identity`) where that is not proven."""
        claimed, proof = proof_of(record)
        secret = self._secret_of(claimed)
        expected = _proof(secret, claimed, record.topic, record.partition, record.key, record.value or b"")
        return proven(claimed, expected, proof)

    def to_text(self) -> str:
        """As it stands in a master file."""
        return f"deepar-master-1 {self._secret.hex()}{' frames' * self.frames}\n"

    def _derive(self, speaker: bytes) -> bytes:
        return mac(self._secret, b"deepar identity 1\n" + speaker)

    def __repr__(self) -> str:
        return f"<Master {self.fingerprint}>"


def _proof(secret: bytes, speaker: bytes, topic: str, partition: int, key: str | None, value: bytes) -> bytes:
    key_bytes = (key or "").encode()
    head = b"deepar record 1\n%b\n%b\n%d\n%d\n" % (speaker, topic.encode(), partition, len(key_bytes))
    return mac(secret, b"".join((head, key_bytes, value))).hex().encode()


# --- files -----------------------------------------------------------------------------------------------------------


def write_secret(path: Path, text: str) -> None:
    """A new file that only its owner may read. Raises `ConfigError`; a file that is there is never written over."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} is there already", remedy="name another file, or move that one away") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(text)


def load_master(path: Path) -> Master:
    """From a file. Raises `ConfigError`, which never shows what is in it."""
    text = _read(path)
    if (found := _MASTER_FILE.fullmatch(text)) is None:
        kind = "a key, not a master secret" if _KEY_FILE.fullmatch(text) else "no master secret"
        raise ConfigError(f"{path} holds {kind}", remedy="make one: deepar identity new-master")
    return Master(bytes.fromhex(found[1]), frames=found[2] is not None)


def load_key(path: Path) -> Key:
    """From a file. Raises `ConfigError`, which never shows what is in it."""
    text = _read(path)
    if (found := _KEY_FILE.fullmatch(text)) is None:
        kind = "a master secret, which is the planner's alone" if _MASTER_FILE.fullmatch(text) else "no key"
        raise ConfigError(f"{path} holds {kind}", remedy="make one: deepar identity key NAME --role ROLE")
    speaker = Speaker.parse(found[1])
    held: dict[str, dict[str, bytes]] = {"reads": {}, "writes": {}}
    for way, row, secret in _FRAME_LINE.findall(found[5]):
        held[way][row] = bytes.fromhex(secret)
    frames = FrameKeys(speaker, held["reads"], held["writes"]) if found[4] else None
    if (list(held["reads"]), list(held["writes"])) != (rows_of(speaker) if frames else ([], [])):
        raise ConfigError(f"{path} is not whole", remedy="copy all of it, or make it anew: deepar identity key")
    return Key(speaker, found[3], bytes.fromhex(found[2]), frames)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1024).decode("ascii")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} holds neither a key nor a master secret") from None


# --- what a region demands -------------------------------------------------------------------------------------------


def satisfy(demanded: str | None, key: Key | None, who: str) -> None:
    """Raises `ConfigError` where a region demands a proof that this sender cannot give (`demanded`: of which master)."""
    if demanded is None or (key is not None and key.fingerprint == demanded):
        return
    remedy = "DEEPAR_IDENTITY_KEY_FILE names the file with it; `deepar identity key` makes one"
    if key is None:
        raise ConfigError(f"the region demands a proof of identity, and {who} has no key", remedy=remedy)
    raise ConfigError(
        f"the region demands keys of the master {demanded}, and that of {key.speaker} is of {key.fingerprint}",
        remedy=remedy,
    )


__all__ = [
    "IDENTITY_HEADER",
    "PROOF_HEADER",
    "SPEAKING_ROLES",
    "WRONG_IDENTITY",
    "Key",
    "Master",
    "Speaker",
    "load_key",
    "load_master",
    "refused",
    "satisfy",
    "write_secret",
]

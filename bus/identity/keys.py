"""Identity keys: senders sign their control messages, and the planner verifies them.

Kafka authenticates the user that writes to a topic, but not the node that a message names. A region may therefore require
proofs. Its planner holds a *master secret*; each sender holds a *key*, derived from the master for one speaker
(`device:d1`). Every record on a signed topic (`bus.topics.SIGNED_TOPICS`) then carries two extra headers: the speaker,
and an HMAC-SHA-256 over the record's content and place:

    speaker's key   HMAC(master, "deepar identity 1" LF SPEAKER)
    record's proof  HMAC(speaker's key, "deepar record 1" LF SPEAKER LF TOPIC LF PARTITION LF LENGTH OF KEY LF KEY VALUE)

The signed text is unambiguous: speakers and topics contain no line feed, and the length of the key is included. The
partition is the region. A *fingerprint* identifies a master without revealing it. The planner publishes it
(`EpochOpened`), so a sender with a missing or wrong key fails at once with a clear error.

A master may also require proofs on frames (`bus.identity.frame_keys`). That changes its fingerprint, so either all senders
sign frames or none do.

Secrets are stored only in files: never in variables of the environment, messages, `repr` or errors.
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
    """The key with which `speaker` signs its records."""

    speaker: Speaker
    fingerprint: str  # of the master that it was derived from
    secret: bytes = field(repr=False)
    frames: FrameKeys | None = None  # set if the master requires proofs on frames

    def headers(self, topic: str, partition: int, key: str | None, value: bytes) -> Headers:
        """The two proof headers of a record."""
        speaker = str(self.speaker).encode()
        proof = _proof(self.secret, speaker, topic, partition, key, value)
        return ((IDENTITY_HEADER, speaker), (PROOF_HEADER, proof))

    def to_text(self) -> str:
        """The content of a key file."""
        first = f"deepar-key-1 {self.speaker} {self.secret.hex()} {self.fingerprint}"
        lines = [first + " frames" * (self.frames is not None)]
        if self.frames is not None:
            lines += [f"reads {row} {secret.hex()}" for row, secret in self.frames.reads.items()]
            lines += [f"writes {row} {secret.hex()}" for row, secret in self.frames.writes.items()]
        return "\n".join(lines) + "\n"


class Master:
    """A region's master secret, held by its planners and by the operator that issues keys."""

    def __init__(self, secret: bytes, *, frames: bool = False) -> None:
        """`frames`: the region also requires proofs on frames."""
        if len(secret) != SECRET_BYTES:
            raise ConfigError(f"a master secret has {SECRET_BYTES} bytes")
        self._secret = secret
        self.frames = frames
        self.fingerprint = mac(secret, b"deepar fingerprint 1" + b" frames" * frames).hex()[:16]
        self._secret_of = lru_cache(REMEMBERED_KEYS)(self._derive)

    @classmethod
    def new(cls, *, frames: bool = False) -> Master:
        """A new master from the operating system's random source."""
        return cls(secrets.token_bytes(SECRET_BYTES), frames=frames)

    def key(self, speaker: Speaker) -> Key:
        """The key of a speaker."""
        frames = FrameKeys.of(self._secret, speaker) if self.frames and any(rows_of(speaker)) else None
        return Key(speaker, self.fingerprint, self._derive(str(speaker).encode()), frames)

    def speaker(self, record: Record) -> Speaker:
        """The verified sender of a record. Raises `ProtocolError` (`wrong_identity`) if the proof is missing or wrong."""
        claimed, proof = proof_of(record)
        secret = self._secret_of(claimed)
        expected = _proof(secret, claimed, record.topic, record.partition, record.key, record.value or b"")
        return proven(claimed, expected, proof)

    def to_text(self) -> str:
        """The content of a master file."""
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
    """Write a new file that only its owner can read. Raises `ConfigError` if the file exists or cannot be written."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} is there already", remedy="name another file, or move that one away") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(text)


def load_master(path: Path) -> Master:
    """Load a master from a file. Raises `ConfigError`, which never shows the content."""
    text = _read(path)
    if (found := _MASTER_FILE.fullmatch(text)) is None:
        kind = "a key, not a master secret" if _KEY_FILE.fullmatch(text) else "no master secret"
        raise ConfigError(f"{path} holds {kind}", remedy="make one: deepar identity new-master")
    return Master(bytes.fromhex(found[1]), frames=found[2] is not None)


def load_key(path: Path) -> Key:
    """Load a key from a file. Raises `ConfigError`, which never shows the content."""
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
        raise ConfigError(f"{path} is incomplete", remedy="copy the whole file, or make it again: deepar identity key")
    return Key(speaker, found[3], bytes.fromhex(found[2]), frames)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1024).decode("ascii")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} holds neither a key nor a master secret") from None


# --- a region's requirement -------------------------------------------------------------------------------------------


def satisfy(demanded: str | None, key: Key | None, who: str) -> None:
    """Check that `key` comes from the master with fingerprint `demanded` (None: no proof required). Raises `ConfigError`."""
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

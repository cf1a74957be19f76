"""Proof headers: the parts shared by the proofs of control messages and of frames.

The speaker, the two headers, and the error raised for a record whose proof is missing or wrong.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Final

from bus import topics
from bus.errors import ConfigError, ProtocolError
from bus.port import Record

IDENTITY_HEADER: Final = "deepar_identity"
PROOF_HEADER: Final = "deepar_proof"
WRONG_IDENTITY: Final = "wrong_identity"
"""Dead-letter cause: the sender's proof is invalid, or the sender is not authorized for the node that it names."""

MAX_HEADER_BYTES: Final = 128  # a speaker takes at most 108, a proof 64
REMEMBERED_KEYS: Final = 4096  # derived keys that a planner caches: a few hundred bytes each
SPEAKING_ROLES: Final = tuple(
    dict.fromkeys(role for topic in topics.TABLE if topic.name in topics.SIGNED_TOPICS for role in topic.writers)
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True, slots=True, order=True)
class Speaker:
    """A sender that can hold a key. Raises `ConfigError` if the role or the name is invalid."""

    role: str  # device, edge, cloud or loadgen
    name: str  # of the node; a load generator may have any name

    def __post_init__(self) -> None:
        if self.role not in SPEAKING_ROLES:
            raise ConfigError(
                f"{self.role!r} is not a role that can hold a key: use one of {', '.join(SPEAKING_ROLES)}"
            )
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} is not a valid name: use at most 100 letters, digits, _ and -")

    @classmethod
    def parse(cls, text: str) -> Speaker:
        """Parse `device:d1`. Raises `ConfigError`."""
        role, colon, name = text.partition(":")
        if not colon:
            raise ConfigError(f"{text!r} is not a speaker: write ROLE:NAME")
        return cls(role, name)

    def __str__(self) -> str:
        return f"{self.role}:{self.name}"


def refused(why: str) -> ProtocolError:
    """The error for a record that is rejected for its sender's identity."""
    return ProtocolError(WRONG_IDENTITY, why)


def mac(secret: bytes, text: bytes) -> bytes:
    """HMAC-SHA-256."""
    return hmac.digest(secret, text, sha256)


def proof_of(record: Record) -> tuple[bytes, bytes]:
    """The contents of the two proof headers. Raises `ProtocolError` if one is missing, duplicated, empty or too long."""
    found = []
    for name in (IDENTITY_HEADER, PROOF_HEADER):
        contents = [content for header, content in record.headers if header == name]
        if len(contents) != 1 or not contents[0] or len(contents[0]) > MAX_HEADER_BYTES:
            raise refused(f"{'no' if not contents else 'a broken'} header {name}: the record is not signed")
        found.append(bytes(contents[0]))
    return found[0], found[1]


def proven(claimed: bytes, expected: bytes, proof: bytes) -> Speaker:
    """The claimed speaker, if its proof equals the expected one. Raises `ProtocolError`."""
    # The proof is compared first, so that the name of an unauthenticated sender is never parsed.
    if not hmac.compare_digest(expected, proof):
        raise refused(f"the proof is not that of {ascii(claimed.decode(errors='replace'))[1:-1]}")
    try:
        return _speaker_of(claimed)
    except (ConfigError, UnicodeDecodeError) as error:
        raise refused(str(error)) from None


@lru_cache(REMEMBERED_KEYS)
def _speaker_of(claimed: bytes) -> Speaker:
    return Speaker.parse(claimed.decode())


__all__ = [
    "IDENTITY_HEADER",
    "PROOF_HEADER",
    "REMEMBERED_KEYS",
    "SPEAKING_ROLES",
    "WRONG_IDENTITY",
    "Speaker",
    "mac",
    "proof_of",
    "proven",
    "refused",
]

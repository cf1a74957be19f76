"""Who speaks: a record that claims a node carries a proof that its sender holds that node's key.

Kafka knows which user writes to a topic, and not for which node a message inside it speaks. So a region may demand a proof:
its planner holds a *master secret*, every sender a *key* derived from it for one speaker (`device:d1`), and every record on a
topic of `bus.claims` two headers more, the speaker and an HMAC-SHA-256 over what the record says and where it stands:

    speaker's key   HMAC(master, "deepar identity 1" LF SPEAKER)
    record's proof  HMAC(speaker's key, "deepar record 1" LF SPEAKER LF TOPIC LF PARTITION LF LENGTH OF KEY LF KEY VALUE)

Neither a speaker nor a topic holds a line feed, and the key's length is told, so no two records have one text. The partition
is the region. A *fingerprint* names a master without telling anything of it; the region tells it to all (`EpochOpened`), so a
sender with no key, or with one of another master, learns it at once instead of being refused for ever.

Secrets are in files, in no variable, no message, no `repr` and no error.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Final

from bus import topics
from bus.errors import ConfigError, ProtocolError
from bus.port import Headers, Record

IDENTITY_HEADER: Final = "deepar_identity"
PROOF_HEADER: Final = "deepar_proof"
WRONG_IDENTITY: Final = "wrong_identity"
"""The cause of a dead letter whose sender is not, or may not speak as, whom it names."""

SECRET_BYTES: Final = 32
MAX_HEADER_BYTES: Final = 128  # a speaker takes at most 108, a proof 64
REMEMBERED_KEYS: Final = 4096  # of so many speakers a planner keeps the derived key: some hundred bytes each
SPEAKING_ROLES: Final = tuple(
    dict.fromkeys(role for topic in topics.TABLE if topic.name in topics.CLAIMED_TOPICS for role in topic.writers)
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_MASTER_FILE = re.compile(r"deepar-master-1 ([0-9a-f]{64})\s*")
_KEY_FILE = re.compile(r"deepar-key-1 ([a-z]+:\S+) ([0-9a-f]{64}) ([0-9a-f]{16})\s*")


@dataclass(frozen=True, slots=True, order=True)
class Speaker:
    """Who may hold a key. Raises `ConfigError` when built of what is no role or no name."""

    role: str  # device, edge, cloud or loadgen
    name: str  # of the node; of a load generator any name

    def __post_init__(self) -> None:
        if self.role not in SPEAKING_ROLES:
            raise ConfigError(f"{self.role!r} is no role that speaks: it is {', '.join(SPEAKING_ROLES)}")
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} is no name: letters, digits, _ and -, at most 100")

    @classmethod
    def parse(cls, text: str) -> Speaker:
        """From `device:d1`. Raises `ConfigError`."""
        role, colon, name = text.partition(":")
        if not colon:
            raise ConfigError(f"{text!r} is no speaker: ROLE:NAME")
        return cls(role, name)

    def __str__(self) -> str:
        return f"{self.role}:{self.name}"


@dataclass(frozen=True, slots=True)
class Key:
    """What proves that a record is of `speaker`."""

    speaker: Speaker
    fingerprint: str  # of the master that it was derived from
    secret: bytes = field(repr=False)

    def headers(self, topic: str, partition: int, key: str | None, value: bytes) -> Headers:
        """The two headers of a record."""
        speaker = str(self.speaker).encode()
        proof = _proof(self.secret, speaker, topic, partition, key, value)
        return ((IDENTITY_HEADER, speaker), (PROOF_HEADER, proof))

    def to_text(self) -> str:
        """As it stands in a key file."""
        return f"deepar-key-1 {self.speaker} {self.secret.hex()} {self.fingerprint}\n"


class Master:
    """A region's master secret; only planners, and whoever makes keys, hold it."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ConfigError(f"a master secret has {SECRET_BYTES} bytes")
        self._secret = secret
        self.fingerprint = _mac(secret, b"deepar fingerprint 1").hex()[:16]
        self._secret_of = lru_cache(REMEMBERED_KEYS)(self._derive)

    @classmethod
    def new(cls) -> Master:
        """A fresh one, from the operating system's randomness."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    def key(self, speaker: Speaker) -> Key:
        """The key of a speaker."""
        return Key(speaker, self.fingerprint, self._derive(str(speaker).encode()))

    def speaker(self, record: Record) -> Speaker:
        """Who has sent a record. Raises `ProtocolError` (`wrong_identity`) where that is not proven."""
        claimed, proof = _proof_of(record)
        expected = _proof(
            self._secret_of(claimed), claimed, record.topic, record.partition, record.key, record.value or b""
        )
        # The proof first: what a stranger calls itself is looked at by nobody.
        if not hmac.compare_digest(expected, proof):
            raise refused(f"the proof is not that of {_printable(claimed)}")
        try:
            return _speaker_of(claimed)
        except (ConfigError, UnicodeDecodeError) as error:
            raise refused(str(error)) from None

    def to_text(self) -> str:
        """As it stands in a master file."""
        return f"deepar-master-1 {self._secret.hex()}\n"

    def _derive(self, speaker: bytes) -> bytes:
        return _mac(self._secret, b"deepar identity 1\n" + speaker)

    def __repr__(self) -> str:
        return f"<Master {self.fingerprint}>"


@lru_cache(REMEMBERED_KEYS)
def _speaker_of(proven: bytes) -> Speaker:
    return Speaker.parse(proven.decode())


def refused(why: str) -> ProtocolError:
    """What is raised for a record that is not obeyed."""
    return ProtocolError(WRONG_IDENTITY, why)


def _mac(secret: bytes, text: bytes) -> bytes:
    return hmac.digest(secret, text, sha256)


def _proof(secret: bytes, speaker: bytes, topic: str, partition: int, key: str | None, value: bytes) -> bytes:
    key_bytes = (key or "").encode()
    head = b"deepar record 1\n%b\n%b\n%d\n%d\n" % (speaker, topic.encode(), partition, len(key_bytes))
    return _mac(secret, b"".join((head, key_bytes, value))).hex().encode()


def _proof_of(record: Record) -> tuple[bytes, bytes]:
    """The two headers. Raises `ProtocolError` where one is missing, twice there, or absurd."""
    found = []
    for name in (IDENTITY_HEADER, PROOF_HEADER):
        contents = [content for header, content in record.headers if header == name]
        if len(contents) != 1 or not contents[0] or len(contents[0]) > MAX_HEADER_BYTES:
            raise refused(f"{'no' if not contents else 'a broken'} header {name}: nobody answers for this record")
        found.append(bytes(contents[0]))
    return found[0], found[1]


def _printable(claimed: bytes) -> str:
    return ascii(claimed.decode(errors="replace"))[1:-1]


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
    return Master(bytes.fromhex(found[1]))


def load_key(path: Path) -> Key:
    """From a file. Raises `ConfigError`, which never shows what is in it."""
    text = _read(path)
    if (found := _KEY_FILE.fullmatch(text)) is None:
        kind = "a master secret, which is the planner's alone" if _MASTER_FILE.fullmatch(text) else "no key"
        raise ConfigError(f"{path} holds {kind}", remedy="make one: deepar identity key NAME --role ROLE")
    return Key(Speaker.parse(found[1]), found[3], bytes.fromhex(found[2]))


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

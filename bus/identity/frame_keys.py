"""Frame keys: how stages sign frames and verify the frames they receive.

They are used where the region's master also requires proofs on frames. The planner verifies control messages with the
master, from which it derives every key. Stages verify frames, but must not be able to sign as other stages. Each row of
data topics therefore has its own secret: readers of the row hold it and derive the keys of its writers; a writer holds
only its own key.

    secret of a row      HMAC(master, "deepar frames 1" LF ROW)
    writer's key         HMAC(secret of the row, SPEAKER)
    frame's proof        HMAC(writer's key, "deepar frame 1" LF SPEAKER LF TOPIC LF LENGTH OF KEY LF KEY VALUE)

A reader of a row could forge its writers' proofs, but the broker's access control lists prevent it from writing: in the
table of topics no role both reads and writes frames on one topic. Forging a frame takes a compromised reader and a
compromised writer of the same row.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from bus import topics
from bus.identity.proofs import IDENTITY_HEADER, PROOF_HEADER, Speaker, mac, proof_of, proven, refused
from bus.port import Headers, Record, RecordValue

ROWS: Final = tuple(topic for topic in topics.TABLE if topic.encoding is topics.Encoding.MSGPACK)


def rows_of(speaker: Speaker) -> tuple[list[str], list[str]]:
    """The rows that a speaker reads, and the rows that it writes."""
    return (
        [row.name for row in ROWS if speaker.role in row.readers],
        [row.name for row in ROWS if speaker.role in row.writers],
    )


@dataclass(frozen=True, slots=True)
class FrameKeys:
    """The keys with which one stage signs its frames and verifies the frames of others."""

    speaker: Speaker
    reads: Mapping[str, bytes] = field(repr=False)  # by row: the secret from which its writers' keys derive
    writes: Mapping[str, bytes] = field(repr=False)  # by row: this speaker's key

    @classmethod
    def of(cls, master_secret: bytes, speaker: Speaker) -> FrameKeys:
        """The keys of a speaker, derived from the master for the rows that its role reads and writes."""
        secrets = {row.name: mac(master_secret, f"deepar frames 1\n{row.name}".encode()) for row in ROWS}
        reads, writes = rows_of(speaker)
        return cls(
            speaker,
            {row: secrets[row] for row in reads},
            {row: mac(secrets[row], str(speaker).encode()) for row in writes},
        )

    def headers(self, topic: str, key: str | None, value: RecordValue) -> Headers:
        """The two proof headers of a frame; empty on topics where this speaker writes no frames."""
        if (secret := self.writes.get(_row(topic))) is None:
            return ()
        speaker = str(self.speaker).encode()
        return ((IDENTITY_HEADER, speaker), (PROOF_HEADER, _proof(secret, speaker, topic, key, value)))

    def signs(self, topic: str) -> bool:
        """Whether this speaker has a key for frames on a topic; older key files lack rows that were added since."""
        return _row(topic) in self.writes

    def sender(self, record: Record) -> Speaker:
        """The verified sender of a frame. Raises `ProtocolError` (`wrong_identity`) if the proof is missing or wrong."""
        claimed, proof = proof_of(record)
        secret = mac(self.reads[_row(record.topic)], claimed)
        speaker = proven(claimed, _proof(secret, claimed, record.topic, record.key, record.value or b""), proof)
        if speaker.role not in topics.row(record.topic).writers:
            raise refused(f"{speaker} may send no frames on {record.topic}")
        return speaker


@lru_cache(1024)
def _row(topic: str) -> str:
    try:
        return topics.row(topic).name
    except KeyError:  # not a topic of the table
        return ""


def _proof(secret: bytes, speaker: bytes, topic: str, key: str | None, value: RecordValue) -> bytes:
    key_bytes = (key or "").encode()
    made = hmac.new(secret, b"deepar frame 1\n%b\n%b\n%d\n" % (speaker, topic.encode(), len(key_bytes)), "sha256")
    made.update(key_bytes)
    made.update(value)  # hashed separately to avoid copying: it may be a megabyte
    return made.hexdigest().encode()


__all__ = ["ROWS", "FrameKeys", "rows_of"]

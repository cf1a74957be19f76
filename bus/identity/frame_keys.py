"""Who sends a frame, where a region's master demands that frames are proven, too.

Control messages are checked by the planner, which holds the master and can make every key. Frames are checked by whoever
gets them, and must not be a way to speak as others. So there is a secret for each row of data topics: who reads there holds
it, and can make the key of each of its writers; a writer holds only its own.

    secret of a row      HMAC(master, "deepar frames 1" LF ROW)
    writer's key         HMAC(secret of the row, SPEAKER)
    frame's proof        HMAC(writer's key, "deepar frame 1" LF SPEAKER LF TOPIC LF LENGTH OF KEY LF KEY VALUE)

Readers of a row could speak as its writers, and the broker's lists hinder them: in the table of topics nobody who reads
frames on a topic writes there. So it takes two that were taken over, a reader and a writer of one row.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from bus import topics
from bus.identity.proofs import IDENTITY_HEADER, PROOF_HEADER, Speaker, mac, proof_of, proven, refused
from bus.port import Headers, Payload, Record

ROWS: Final = tuple(topic for topic in topics.TABLE if topic.payload is topics.Payload.MSGPACK)


def rows_of(speaker: Speaker) -> tuple[list[str], list[str]]:
    """The rows that a speaker reads, and those that it writes."""
    return (
        [row.name for row in ROWS if speaker.role in row.readers],
        [row.name for row in ROWS if speaker.role in row.writers],
    )


@dataclass(frozen=True, slots=True)
class FrameKeys:
    """What a stage needs to prove its own frames and to check those of others."""

    speaker: Speaker
    reads: Mapping[str, bytes] = field(repr=False)  # by row: the secret that its writers' keys are made of
    writes: Mapping[str, bytes] = field(repr=False)  # by row: this speaker's key

    @classmethod
    def of(cls, master_secret: bytes, speaker: Speaker) -> FrameKeys:
        """What the master gives a speaker, as the table of topics says what its role reads and writes."""
        secrets = {row.name: mac(master_secret, f"deepar frames 1\n{row.name}".encode()) for row in ROWS}
        reads, writes = rows_of(speaker)
        return cls(
            speaker,
            {row: secrets[row] for row in reads},
            {row: mac(secrets[row], str(speaker).encode()) for row in writes},
        )

    def headers(self, topic: str, key: str | None, value: Payload) -> Headers:
        """The two headers of a frame; none for what is no frame."""
        if (secret := self.writes.get(_row(topic))) is None:
            return ()
        speaker = str(self.speaker).encode()
        return ((IDENTITY_HEADER, speaker), (PROOF_HEADER, _proof(secret, speaker, topic, key, value)))

    def sender(self, record: Record) -> Speaker:
        """Who has sent a frame that this stage reads. Raises `ProtocolError` (`wrong_identity`) where that is not proven."""
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
    except KeyError:  # none of ours
        return ""


def _proof(secret: bytes, speaker: bytes, topic: str, key: str | None, value: Payload) -> bytes:
    key_bytes = (key or "").encode()
    made = hmac.new(secret, b"deepar frame 1\n%b\n%b\n%d\n" % (speaker, topic.encode(), len(key_bytes)), "sha256")
    made.update(key_bytes)
    made.update(value)  # not joined with the rest: it may be a megabyte
    return made.hexdigest().encode()


__all__ = ["ROWS", "FrameKeys", "rows_of"]

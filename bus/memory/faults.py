"""What can go wrong on a `MemoryBus`, on request and repeatably."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

KINDS = (
    "lost_ack",
    "lost_post",
    "duplicate",
    "missing",
    "corrupt",
    "rebalance",
    "redelivery",
    "stale_commit",
    "late",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities, drawn from one seeded generator in the order in which things happen, so a run repeats exactly.

    Set `MemoryBroker.faults` to one of these to begin, and to None to heal.
    """

    random: Random  # seeded by the caller; used by nobody else
    lost_ack: float = 0.0  # a post: the record is written, but its sender is told that it failed
    lost_post: float = 0.0  # a post: the record is not written, and its sender is told that it failed
    duplicate: float = 0.0  # a post: the record is written twice, one behind the other
    missing: float = 0.0  # a post: its sender is told that it stands, and nobody ever reads it
    corrupt: float = 0.0  # a post: other bytes are written than were sent
    rebalance: float = 0.0  # a member's fetch: its group shares its partitions out anew
    redelivery: float = 0.0  # a member's fetch: one partition goes back to what was committed, without a rebalance
    stale_commit: float = 0.0  # a commit: it is ignored, and nobody is told
    late: float = 0.0  # a post: acknowledgement and delivery are late by up to `late_s`
    late_s: float = 0.0  # seconds
    damages: Callable[[str, str | None, bytes], bool] = lambda topic, key, data: True
    """Which records may go missing or be corrupted."""
    on_damage: Callable[[str, str, str | None, bytes], None] = lambda kind, topic, key, data: None
    """Told of each that did: `missing` or `corrupt`, its topic, its key, the bytes that were sent."""
    times: Counter[str] = field(default_factory=Counter)  # how often each kind struck

    def __post_init__(self) -> None:
        for name in KINDS:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a probability, not {getattr(self, name)}")
        if self.late_s < 0.0:
            raise ValueError(f"late_s is a time, not {self.late_s}")

    def strikes(self, kind: str) -> bool:
        """Whether a fault of this kind happens now. Draws only for faults that can happen at all."""
        probability = getattr(self, kind)
        if probability > 0.0 and self.random.random() < probability:
            self.times[kind] += 1
            return True
        return False

    def damaged(self, topic: str, key: str | None, data: bytes) -> bytes | None:
        """What is written instead of `data`; None: nothing is."""
        if not (self.missing or self.corrupt) or not self.damages(topic, key, data):
            return data
        if self.strikes("missing"):
            self.on_damage("missing", topic, key, data)
            return None
        if self.strikes("corrupt"):
            self.on_damage("corrupt", topic, key, data)
            return self._garbled(data)
        return data

    def _garbled(self, data: bytes) -> bytes:
        """Cut off, overwritten at its head, or with something behind it: what a reader can see.

        A bit that flips between a sender and a reader is found by the checksum of Kafka's batches, not by us.
        """
        match self.random.randrange(3):
            case 0:
                return data[: self.random.randrange(len(data))] if data else b"\xc1"
            case 1:
                return b"\xc1" * 8 + data[8:]
            case _:
                return data + b"\x00"

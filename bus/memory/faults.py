"""Fault injector of a `MemoryBus`, repeatable by its seed."""

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
    """Fault probabilities. All draws come from one seeded generator in event order, so a run repeats exactly.

    Assign to `MemoryBroker.faults` to inject faults; assign None to stop.
    """

    random: Random  # seeded by the caller, used only here
    lost_ack: float = 0.0  # a post: the record is written, but the sender gets an error
    lost_post: float = 0.0  # a post: the record is not written, and the sender gets an error
    duplicate: float = 0.0  # a post: the record is written twice in a row
    missing: float = 0.0  # a post: it is acknowledged, but the record is not written
    corrupt: float = 0.0  # a post: the record is written with corrupted bytes
    rebalance: float = 0.0  # a member's fetch: its group rebalances
    redelivery: float = 0.0  # a member's fetch: one partition returns to its committed offset, without a rebalance
    stale_commit: float = 0.0  # a commit: it is silently ignored
    late: float = 0.0  # a post: acknowledgement and delivery are delayed by up to `late_s`
    late_s: float = 0.0  # maximum delay
    damages: Callable[[str, str | None, bytes], bool] = lambda topic, key, data: True
    """Whether the record with this topic, key and bytes may go missing or be corrupted."""
    on_damage: Callable[[str, str, str | None, bytes], None] = lambda kind, topic, key, data: None
    """Called for each record that goes missing or is corrupted, with the kind, the topic, the key and the bytes sent."""
    times: Counter[str] = field(default_factory=Counter)  # injected faults by kind

    def __post_init__(self) -> None:
        for name in KINDS:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a probability, not {getattr(self, name)}")
        if self.late_s < 0.0:
            raise ValueError(f"late_s is a time, not {self.late_s}")

    def strikes(self, kind: str) -> bool:
        """Whether a fault of this kind happens now. Draws only if its probability is positive."""
        probability = getattr(self, kind)
        if probability > 0.0 and self.random.random() < probability:
            self.times[kind] += 1
            return True
        return False

    def damaged(self, topic: str, key: str | None, data: bytes) -> bytes | None:
        """The bytes to write instead of `data`; None: the record is lost."""
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
        """Truncated, overwritten at the start, or extended: damage that a decoder detects.

        Single flipped bits are not simulated: Kafka's batch checksums detect them.
        """
        match self.random.randrange(3):
            case 0:
                return data[: self.random.randrange(len(data))] if data else b"\xc1"
            case 1:
                return b"\xc1" * 8 + data[8:]
            case _:
                return data + b"\x00"

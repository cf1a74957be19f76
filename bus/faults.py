"""What can go wrong on a `MemoryBus`, on request and repeatably."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities, drawn from one seeded generator in the order in which things happen, so a run repeats exactly.

    Set `MemoryBroker.faults` to one of these to begin, and to None to heal.
    """

    random: Random  # seeded by the caller; used by nobody else
    lost_ack: float = 0.0  # a post: the record is written, but its sender is told that it failed
    lost_post: float = 0.0  # a post: the record is not written, and its sender is told that it failed
    duplicate: float = 0.0  # a post: the record is written twice, one behind the other
    rebalance: float = 0.0  # a member's fetch: its group shares its partitions out anew
    redelivery: float = 0.0  # a member's fetch: one partition goes back to what was committed, without a rebalance
    stale_commit: float = 0.0  # a commit: it is ignored, and nobody is told
    late: float = 0.0  # a post: acknowledgement and delivery are late by up to `late_s`
    late_s: float = 0.0  # seconds

    def __post_init__(self) -> None:
        for name in ("lost_ack", "lost_post", "duplicate", "rebalance", "redelivery", "stale_commit", "late"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a probability, not {getattr(self, name)}")
        if self.late_s < 0.0:
            raise ValueError(f"late_s is a time, not {self.late_s}")

    def strikes(self, probability: float) -> bool:
        """Whether a fault of this probability happens now. Draws only for faults that can happen at all."""
        return probability > 0.0 and self.random.random() < probability

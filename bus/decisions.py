"""The reading rule of the decision topic: which records count.

Several planners may write to a region's partition (an old one that was frozen, two that race for an epoch), but a reader
obeys one: the first `EpochOpened` of each higher epoch wins, and of the decisions only those of the open (epoch, nonce)
whose sequence number follows the last. Whoever reads the same partition from the same place draws the same conclusions.
"""

from __future__ import annotations

from dataclasses import dataclass

from bus import messages, topics
from bus.errors import ProtocolError
from bus.messages import Decision, EpochOpened, PlannerHeartbeat, PlannerLeft
from bus.port import Record

DecisionTopicMessage = Decision | EpochOpened | PlannerHeartbeat | PlannerLeft


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that does not count, and why."""

    reason: str  # stale_epoch, lost_race, out_of_sequence, or a ProtocolError's cause
    detail: str


class DecisionLog:
    """Applies the reading rule to the records of one region's partition, in order."""

    def __init__(self, *, epoch: int = 0, nonce: str = "", seq: int = 0) -> None:
        self.epoch = epoch  # the open epoch, 0 before the first
        self.nonce = nonce  # of the planner that opened it
        self.planner = ""  # its name, where its opening was read
        self.lease_s = 0.0  # silent for longer, and another may take over
        self.identity: str | None = None  # of which master it demands proofs, where it does
        self.left = False  # whether that planner has gone politely
        self.seq = seq  # of the last valid decision
        self.dropped = 0  # records that did not count

    @property
    def demanded(self) -> str | None:
        """Of which master the planner in charge demands proofs of identity; None where it demands none, or has left."""
        return None if self.left else self.identity

    def read(self, record: Record) -> DecisionTopicMessage | Dropped:
        """The record's message where it counts; `Dropped` where it does not."""
        try:
            message = messages.decode(topics.DECISIONS, record.value)
        except ProtocolError as error:
            return self._drop(error.cause, str(error))
        return self.accept(message)

    def accept(self, message: DecisionTopicMessage) -> DecisionTopicMessage | Dropped:
        """The same for a decoded message."""
        if isinstance(message, EpochOpened):
            if message.epoch <= self.epoch:
                return self._drop("lost_race", f"epoch {message.epoch} of {message.planner}: {self.epoch} is open")
            self.epoch, self.nonce = message.epoch, message.nonce
            self.planner, self.lease_s, self.left = message.planner, message.lease_s, False
            self.identity = message.identity
            return message
        if (message.epoch, message.nonce) != (self.epoch, self.nonce):
            return self._drop("stale_epoch", f"epoch {message.epoch} ({message.nonce}), {self.epoch} is open")
        if not isinstance(message, Decision):
            self.left = isinstance(message, PlannerLeft)
            return message
        if message.seq != self.seq + 1:
            return self._drop("out_of_sequence", f"sequence {message.seq} after {self.seq}")
        self.seq = message.seq
        return message

    def _drop(self, reason: str, detail: str) -> Dropped:
        self.dropped += 1
        return Dropped(reason, detail)

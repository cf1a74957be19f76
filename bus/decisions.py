"""The reading rule of the decision topic: which records count.

Several planners may write to a region's partition (an old one that was frozen, two that race for an epoch), but a reader
obeys one: the first `EpochOpened` of each higher epoch wins, and of the decisions only those of the open (epoch, nonce)
whose sequence number follows the last. Whoever reads the same partition from the same place draws the same conclusions.

A step that fits no single record comes as `DecisionPart`s and the `Decision` behind them. Parts change nothing: they are put
by, and when the decision stands, and all of its parts before it, it is given out with the changes of all of them.

A reader that must miss nothing says at which offset its first record stands; from there on offsets must follow each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from bus import messages, topics
from bus.errors import BusError, ConfigError, ProtocolError
from bus.messages import Change, Decision, DecisionPart, EpochOpened, PlannerHeartbeat, PlannerLeft
from bus.port import Record

DecisionTopicMessage = Decision | DecisionPart | EpochOpened | PlannerHeartbeat | PlannerLeft


LARGEST_HOLE = 1
"""So many offsets may be empty inside a log: the marker of a foreign transaction takes one."""


class DecisionsLostError(BusError):
    """Decisions are gone that this reader has not read: deleted by retention, by compaction, or with their topic."""

    def __init__(self, region: int, expected: int, found: int) -> None:
        what = f"region {region}: decisions from offset {expected} on are gone, the log goes on at {found}"
        if found < expected:
            what = f"region {region}: the decisions begin anew at offset {found}, {expected} was expected next"
        super().__init__(what, remedy="see how the topic is set: deepar doctor")


class DecisionUnreadableError(ConfigError):
    """The next decision of the planner in charge cannot be read here, so nothing that follows it could be obeyed."""

    def __init__(self, region: int, offset: int, planner: str, why: str) -> None:
        super().__init__(
            f"region {region}: the decision of {planner or 'the planner in charge'} at offset {offset} cannot be read: {why}",
            remedy="the planner is of a newer version: run the same version of deepar everywhere",
        )


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that does not count, and why."""

    reason: str  # stale_epoch, lost_race, out_of_sequence, or a ProtocolError's cause
    detail: str


class DecisionLog:
    """Applies the reading rule to the records of one region's partition, in order."""

    def __init__(
        self, *, epoch: int = 0, nonce: str = "", seq: int = 0, next_offset: int | None = None, joins: bool = False
    ) -> None:
        """`next_offset`: where the next record must stand; None: this reader may begin anywhere and miss some.

        `joins`: the log may begin in between (views, tools). Until an `EpochOpened` is read the highest epoch of any record
        is taken to be open, and its first decision to be the next.
        """
        self.epoch = epoch  # the open epoch, 0 before the first
        self.nonce = nonce  # of the planner that opened it
        self.planner = ""  # its name, where its opening was read
        self.lease_s = 0.0  # silent for longer, and another may take over
        self.identity: str | None = None  # of which master it demands proofs, where it does
        self.left = False  # whether that planner has gone politely
        self.seq = seq  # of the last valid decision
        self.dropped = 0  # records that did not count
        self._next_offset = next_offset
        self._joins = joins
        self._parts: list[DecisionPart] = []  # of the next decision, as far as they have come

    @property
    def demanded(self) -> str | None:
        """Of which master the planner in charge demands proofs of identity; None where it demands none, or has left."""
        return None if self.left else self.identity

    def read(self, record: Record) -> DecisionTopicMessage | Dropped:
        """The record's message where it counts, a decision with all its changes; `Dropped` where it does not.

        Where no record may be missed, raises `DecisionsLostError`, once for each gap, if records before this one are missing,
        and `DecisionUnreadableError` if this is the next decision and its changes are of no known kind.
        """
        expected = self._next_offset
        if expected is not None:
            self._next_offset = record.offset + 1
            if not 0 <= record.offset - expected <= LARGEST_HOLE:
                raise DecisionsLostError(record.partition, expected, record.offset)
        try:
            message = messages.decode(topics.DECISIONS, record.value)
        except ProtocolError as error:
            if expected is not None and self._is_next(record.value):
                raise DecisionUnreadableError(record.partition, record.offset, self.planner, str(error)) from error
            return self._drop(error.cause, str(error))
        return self.accept(message)

    def _is_next(self, payload: bytes | None) -> bool:
        """Whether a record that cannot be read is the next decision of the open epoch, or a part of it."""
        if not payload or len(payload) > messages.MAX_MESSAGE_BYTES:
            return False
        try:
            found = json.loads(payload)
        except (ValueError, RecursionError):
            return False
        if not isinstance(found, dict) or found.get("type") not in ("decision", "decision_part"):
            return False
        return (found.get("epoch"), found.get("nonce"), found.get("seq")) == (self.epoch, self.nonce, self.seq + 1)

    def accept(self, message: DecisionTopicMessage) -> DecisionTopicMessage | Dropped:
        """The same for a decoded message."""
        if isinstance(message, EpochOpened):
            if message.epoch <= self.epoch:
                return self._drop("lost_race", f"epoch {message.epoch} of {message.planner}: {self.epoch} is open")
            self.epoch, self.nonce = message.epoch, message.nonce
            self.planner, self.lease_s, self.left = message.planner, message.lease_s, False
            self.identity = message.identity
            self._parts.clear()
            self._joins = False
            return message
        if self._joins:
            self._join(message)
        if (message.epoch, message.nonce) != (self.epoch, self.nonce):
            return self._drop("stale_epoch", f"epoch {message.epoch} ({message.nonce}), {self.epoch} is open")
        if isinstance(message, PlannerHeartbeat | PlannerLeft):
            self.left = isinstance(message, PlannerLeft)
            return message
        if message.seq != self.seq + 1:
            return self._drop("out_of_sequence", f"sequence {message.seq} after {self.seq}")
        parts = self._parts
        if isinstance(message, DecisionPart):
            if message.part != len(parts) + 1:
                return self._drop(
                    "out_of_sequence", f"part {message.part} of decision {message.seq} after {len(parts)}"
                )
            parts.append(message)
            return message
        if (message.parts or 0) != len(parts):
            return self._drop("out_of_sequence", f"decision {message.seq} has {message.parts} parts, {len(parts)} came")
        self.seq = message.seq
        if not parts:
            return message
        changes: list[Change] = [change for part in parts for change in part.changes]
        parts.clear()
        return message.model_copy(update={"changes": (*changes, *message.changes)})

    def _join(self, message: Decision | DecisionPart | PlannerHeartbeat | PlannerLeft) -> None:
        """Take up the epoch of a record whose opening is not there to be read."""
        if message.epoch > self.epoch:
            self.epoch, self.nonce, self.seq = message.epoch, message.nonce, 0
            self._parts.clear()
        counts = (message.epoch, message.nonce) == (self.epoch, self.nonce)
        if counts and self.seq == 0 and isinstance(message, Decision | DecisionPart):
            begins = (message.part == 1) if isinstance(message, DecisionPart) else not message.parts
            self.seq = message.seq - 1 if begins else message.seq if isinstance(message, Decision) else 0

    def _drop(self, reason: str, detail: str) -> Dropped:
        self.dropped += 1
        return Dropped(reason, detail)

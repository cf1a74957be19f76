"""Reading rule of the decision topic: which records are valid.

Several planners may write to a region's partition: one that was frozen and deposed, or two that compete for an epoch. Readers
follow one of them. The first `EpochOpened` of each higher epoch wins. A decision is valid only if it has the (epoch,
nonce) of the open epoch and the next sequence number. All readers that start at the same offset accept the same records.

A step that is too large for one record is written as `DecisionPart` records followed by their `Decision`. The reader buffers
the parts and returns the decision with the changes of all parts. Parts without a decision have no effect.

A reader that must not miss a record passes the offset of its first record; later offsets must then be consecutive.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from bus import messages, topics
from bus.errors import BusError, ConfigError, ProtocolError
from bus.messages import Change, Decision, DecisionPart, EpochOpened, PlannerHeartbeat, PlannerLeft
from bus.port import Record

DecisionTopicMessage = Decision | DecisionPart | EpochOpened | PlannerHeartbeat | PlannerLeft


MAX_OFFSET_GAP = 1
"""Maximum number of consecutive unused offsets: the marker of another program's transaction uses one."""


class DecisionsLostError(BusError):
    """Decisions were deleted before this reader read them: by retention, by compaction, or with their topic."""

    def __init__(self, region: int, expected: int, found: int) -> None:
        what = f"region {region}: decisions from offset {expected} on were deleted; the log continues at {found}"
        if found < expected:
            what = f"region {region}: the log starts again at offset {found}; the next expected offset is {expected}"
        super().__init__(what, remedy="check the settings of the topic: deepar doctor")


class DecisionUnreadableError(ConfigError):
    """The next decision of the leading planner cannot be decoded, so this reader cannot apply later decisions either."""

    def __init__(self, region: int, offset: int, planner: str, why: str) -> None:
        super().__init__(
            f"region {region}: the decision of {planner or 'the leading planner'} at offset {offset} cannot be read: {why}",
            remedy="the planner runs a newer version: run the same version of deepar everywhere",
        )


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that was ignored, and the reason."""

    reason: str  # stale_epoch, lost_race, out_of_sequence, or a ProtocolError's cause
    detail: str


class DecisionLog:
    """Applies the reading rule to the records of one region's partition, in order."""

    def __init__(
        self, *, epoch: int = 0, nonce: str = "", seq: int = 0, next_offset: int | None = None, joins: bool = False
    ) -> None:
        """`next_offset`: offset of the next record; None: the reader may start anywhere and miss records.

        `joins`: the reader may start in the middle of an epoch (views, tools). Until it reads an `EpochOpened`, it takes the
        highest epoch of any record as open and that epoch's first decision as the next.
        """
        self.epoch = epoch  # the open epoch; 0 before the first
        self.nonce = nonce  # nonce of the planner that opened it
        self.planner = ""  # name of that planner; empty if its `EpochOpened` was not read
        self.lease_s = 0.0  # another planner may take over if this one is silent for longer
        self.identity: str | None = None  # fingerprint of the master whose proofs it requires; None: no proofs
        self.left = False  # whether that planner announced that it leaves
        self.seq = seq  # sequence number of the last valid decision
        self.dropped = 0  # number of ignored records
        self._next_offset = next_offset
        self._joins = joins
        self._parts: list[DecisionPart] = []  # parts of the next decision read so far

    @property
    def demanded(self) -> str | None:
        """Fingerprint of the master whose proofs the leading planner requires; None if it requires none or has left."""
        return None if self.left else self.identity

    def read(self, record: Record) -> DecisionTopicMessage | Dropped:
        """The message of a valid record (a decision with the changes of all its parts), `Dropped` for an ignored one.

        If the reader must not miss records, raises `DecisionsLostError`, once per gap, if records before this one are
        missing, and `DecisionUnreadableError` if this is the next decision and cannot be decoded.
        """
        expected = self._next_offset
        if expected is not None:
            self._next_offset = record.offset + 1
            if not 0 <= record.offset - expected <= MAX_OFFSET_GAP:
                raise DecisionsLostError(record.partition, expected, record.offset)
        try:
            message = messages.decode(topics.DECISIONS, record.value)
        except ProtocolError as error:
            if expected is not None and self._is_next(record.value):
                raise DecisionUnreadableError(record.partition, record.offset, self.planner, str(error)) from error
            return self._drop(error.cause, str(error))
        return self.accept(message)

    def _is_next(self, value: bytes | None) -> bool:
        """Whether a record that cannot be decoded is the next decision of the open epoch, or a part of it."""
        if not value or len(value) > messages.MAX_MESSAGE_BYTES:
            return False
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return False
        if not isinstance(found, dict) or found.get("type") not in ("decision", "decision_part"):
            return False
        return (found.get("epoch"), found.get("nonce"), found.get("seq")) == (self.epoch, self.nonce, self.seq + 1)

    def accept(self, message: DecisionTopicMessage) -> DecisionTopicMessage | Dropped:
        """Apply the reading rule to a decoded message."""
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
        """Adopt the epoch of a record whose `EpochOpened` was not read."""
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

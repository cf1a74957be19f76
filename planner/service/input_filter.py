"""Input filter: decodes the records of a region's nodes and rejects invalid and unauthorized ones.

If the region requires proofs of identity (`bus.identity.keys`), the filter verifies the sender of each record and checks it
against the table in `bus.identity.authorization`. Otherwise it accepts every record that can be decoded. Rejected records
never reach the core, so replaying the decisions needs neither the master secret nor the proofs.
"""

from __future__ import annotations

from typing import Any, Final

from bus import messages
from bus.dead_letter import DeadLetterLimiter
from bus.errors import ProtocolError
from bus.identity import authorization
from bus.identity.authorization import Parties
from bus.identity.keys import WRONG_IDENTITY, Master
from bus.messages import NodeAnnounced
from bus.port import Record
from planner.core.core import PlannerCore

MAX_ANNOUNCEMENT_BYTES: Final = 400_000
"""Size limit of a node's announcement: the decision that records it contains a copy, next to its other changes."""


class InputFilter:
    """Filter of one region. Without a `master` it accepts records without proof of identity."""

    def __init__(self, master: Master | None) -> None:
        self.master = master
        self.refused = 0  # unauthorized records: the proof of identity fails, or the sender may not send this message
        self.not_dead_lettered = 0  # unauthorized records beyond the rate limit of dead letters
        self._dead_letter_limiter = DeadLetterLimiter()

    def read(self, record: Record, core: PlannerCore) -> Any:
        """Decode a record. Raises `ProtocolError` if it is invalid or, with cause `wrong_identity`, unauthorized."""
        if self.master is None:
            return _decoded(record)
        try:
            speaker = self.master.speaker(record)
            message = _decoded(record)
            authorization.check(speaker, record, message, _parties(core, getattr(message, "task_id", None)))
        except ProtocolError as error:
            self.refused += error.cause == WRONG_IDENTITY
            raise
        return message

    def should_dead_letter(self, error: ProtocolError, now_s: float) -> bool:
        """Whether to dead-letter a rejected record: invalid ones always, unauthorized ones up to a rate limit."""
        if error.cause != WRONG_IDENTITY:
            return True
        allowed = self._dead_letter_limiter.take(now_s)
        self.not_dead_lettered += not allowed
        return allowed


def _decoded(record: Record) -> Any:
    message = messages.decode(record.topic, record.value)
    if isinstance(message, NodeAnnounced):
        # The size inside the decision counts; that of the record may differ.
        size_bytes = len(messages.encode(message))
        if size_bytes > MAX_ANNOUNCEMENT_BYTES:
            detail = (
                f"announcement of {message.node} takes {size_bytes:,} bytes; the limit is {MAX_ANNOUNCEMENT_BYTES:,}"
            )
            raise ProtocolError("oversized", detail)
    return message


def _parties(core: PlannerCore, task_id: str | None) -> Parties | None:
    """The nodes that take part in a live task; None for a task that is not live, because messages cannot change it."""
    task = core.tasks.get(task_id) if task_id is not None else None
    if task is None:
        return None
    placement = None if task.placed is None else task.placed.placement
    return Parties(
        device=task.submitted.device,
        attempt=task.attempt,
        edge=None if placement is None else placement.edge,
        cloud=placement is not None and placement.uses_cloud,
    )


__all__ = ["InputFilter"]

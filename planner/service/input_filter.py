"""Reads what the region's nodes say, and turns away what nobody may say: the way from a record to an event of the core.

Where the region demands proofs of identity (`bus.identity.keys`), a record is believed to be of whom its proof says,
and only as
far as the table of `bus.identity.authorization` lets that speaker go; without, every record that can be read is
believed. It is turned away
before the core sees it, so what is refused leaves no trace in the state, and a replay of the decisions, which never looks at
inputs again, needs neither the master secret nor the proofs.
"""

from __future__ import annotations

from typing import Any, Final

from bus import messages
from bus.dead_letter import Allowance
from bus.errors import ProtocolError
from bus.identity import authorization
from bus.identity.authorization import Parties
from bus.identity.keys import WRONG_IDENTITY, Master
from bus.messages import NodeAnnounced
from bus.port import Record
from planner.core.core import PlannerCore

MAX_ANNOUNCEMENT_BYTES: Final = 400_000
"""A node's announcement is copied into the decision that takes it in, beside what else follows from it."""


class InputFilter:
    """`master` None: everybody is believed."""

    def __init__(self, master: Master | None) -> None:
        self.master = master
        self.refused = 0  # records whose sender is not whom it names, or may not say what it says
        self.unkept = 0  # of these, without a dead letter
        self._allowance = Allowance()

    def read(self, record: Record, core: PlannerCore) -> Any:
        """The message of a record. Raises `ProtocolError`: broken, or (`wrong_identity`) not to be obeyed."""
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

    def keeps(self, error: ProtocolError, now_s: float) -> bool:
        """Whether this refusal is to become a dead letter and a line in the log; what is merely broken always is."""
        if error.cause != WRONG_IDENTITY:
            return True
        kept = self._allowance.take(now_s)
        self.unkept += not kept
        return kept


def _decoded(record: Record) -> Any:
    message = messages.decode(record.topic, record.value)
    if isinstance(message, NodeAnnounced):
        size_bytes = len(messages.encode(message))  # as it will stand in the decision, not as it came
        if size_bytes > MAX_ANNOUNCEMENT_BYTES:
            said = f"{message.node} announces {size_bytes:,} bytes, over {MAX_ANNOUNCEMENT_BYTES:,}"
            raise ProtocolError("oversized", said)
    return message


def _parties(core: PlannerCore, task_id: str | None) -> Parties | None:
    """Who takes part in a task at the moment; None: it is not live, and nothing said of it changes anything."""
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

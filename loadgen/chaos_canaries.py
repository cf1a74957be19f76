"""Planted bugs, to see that the simulation finds them: each breaks one promise in one line.

A canary is a context manager that replaces one method; nothing here is reachable from a service.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bus.decisions import DecisionLog, DecisionTopicMessage, Dropped
from bus.frames import Array, Assembler, Piece, to_tensors
from bus.messages import Decision, EpochOpened
from stages.device import Attempt, Device
from stages.fences import Fences
from stages.hop import Flow, Hop
from stages.offsets import OffsetLedger, Receipt
from stages.outlet import Outlet


@dataclass(frozen=True, slots=True)
class Canary:
    """One planted bug."""

    name: str
    what: str  # in words
    within: int  # seeds, counted from 0, within which it must be caught
    owner: type
    method: str
    broken: Callable[..., Any]

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """The bug is there."""
        sound = self.owner.__dict__[self.method]
        setattr(self.owner, self.method, self.broken)
        try:
            yield
        finally:
            setattr(self.owner, self.method, sound)


def _no_dedup(self: Attempt, sample: int, outputs: list[Array]) -> None:
    self._missing.add(sample)
    _sound_result(self, sample, outputs)


_sound_result = Attempt._result


def _commit_before_publish(self: Receipt) -> None:
    """Nothing holds a record but its arrival."""


def _keep_offsets(self: OffsetLedger, partitions: Any) -> None:
    """What another member got is still believed to be ours."""


def _ignore_epoch(self: DecisionLog, message: DecisionTopicMessage) -> DecisionTopicMessage | Dropped:
    if isinstance(message, EpochOpened):
        self.epoch, self.nonce = message.epoch, message.nonce
        self.planner, self.lease_s, self.left = message.planner, message.lease_s, False
    elif isinstance(message, Decision):
        self.seq = message.seq
    return message


def _never_fenced(self: Fences, task_id: str, attempt: int) -> bool:
    return False


def _trust_order(self: Assembler, piece: Piece) -> list[Array] | None:
    """Whatever comes next is the next chunk."""
    tensors, buffer, filled = self._open.pop(piece.sample, (piece.tensors, bytearray(piece.size_bytes), 0))
    end = filled + piece.data.nbytes
    buffer[filled:end] = piece.data
    if end < piece.size_bytes:
        self._open[piece.sample] = (tensors, buffer, end)
        return None
    return to_tensors(tensors, memoryview(bytes(buffer[: piece.size_bytes])))


def _never_again(self: Outlet) -> None:
    """What was not acknowledged is taken for sent."""
    self._sent.popleft()


def _hold_on(self: Flow) -> None:
    """What was let go of keeps its records open."""
    self.closed = True


def _keep_flows(self: Hop, decision: Any, fenced: Any) -> None:
    """Decisions are not followed."""


def _forget_starts(self: Device, start: Any, region: int) -> None:
    """A start while another attempt runs is overlooked."""
    known = self.tasks.get(start.task_id)
    if known is None or known.started_s is None:
        _sound_start(self, start, region)


_sound_start = Device._start


CANARIES = (
    Canary("no dedup", "a device shows every result that comes", 20, Attempt, "_result", _no_dedup),
    Canary(
        "commit before publish", "a record counts as done when it was read", 60, Receipt, "hold", _commit_before_publish
    ),
    Canary(
        "offsets kept", "a rebalance leaves the ledger of offsets as it was", 60, OffsetLedger, "forget", _keep_offsets
    ),
    Canary("ignored epoch", "decisions of deposed planners count", 20, DecisionLog, "accept", _ignore_epoch),
    Canary("ignored fences", "no attempt is ever fenced", 5, Fences, "fenced", _never_fenced),
    Canary("chunk order trusted", "chunks are put together as they come", 20, Assembler, "add", _trust_order),
    Canary("never sent again", "a failed acknowledgement is overlooked", 20, Outlet, "_send_again", _never_again),
    Canary("receipts leaked", "what a fenced attempt held stays open", 20, Flow, "_let_go", _hold_on),
    Canary("flows kept", "a hop does not follow the decisions", 5, Hop, "on_decision", _keep_flows),
    Canary("starts forgotten", "a second attempt is not begun", 20, Device, "_start", _forget_starts),
)
"""What is planted, and how soon it must be caught."""

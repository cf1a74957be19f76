"""Reservations of the tasks of a region, derived from its decisions, to name the task that another one waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bus.messages import Ended, Moved, Overran, Placed, Retried, Start

_SAME_S = 1e-6  # a start that was put to another task's end stands at exactly that instant
_NAMED = 3  # maximum number of awaited tasks that are named


@dataclass(slots=True)
class _Holding:
    """The reservation of one task."""

    placed: Placed
    start_s: float
    end_s: float  # predicted; ledger time, as all here


class Held:
    """Follows the decisions of one region, as far back as they were read: what is reserved, by whom, until when."""

    def __init__(self) -> None:
        self._holdings: dict[str, _Holding] = {}

    def note(self, change: Any) -> None:
        """Take in one change, in order."""
        if isinstance(change, Placed):
            self._holdings[change.task_id] = _Holding(change, change.start_s, change.start_s + change.delay_s)
            return
        if isinstance(change, Moved):
            for task_id, start_s in zip(change.task_ids, change.starts_s, strict=True):
                if (moved := self._holdings.get(task_id)) is not None:
                    moved.start_s, moved.end_s = start_s, start_s + moved.placed.delay_s
            return
        holding = self._holdings.get(getattr(change, "task_id", ""))
        match change:
            case Start() if holding:
                holding.start_s, holding.end_s = change.at_s, change.at_s + holding.placed.delay_s
            case Overran() if holding:
                holding.end_s = change.to_s
            case Retried() | Ended():
                self._holdings.pop(change.task_id, None)
            case _:
                pass

    def placed(self, task_id: str) -> Placed | None:
        """Where a task was put, if that was read."""
        holding = self._holdings.get(task_id)
        return holding.placed if holding else None

    def start_s(self, task_id: str) -> float | None:
        """When a task starts or started, if that was read; ledger time."""
        holding = self._holdings.get(task_id)
        return holding.start_s if holding else None

    def waits_for(self, task_id: str) -> str:
        """`t3 (slot of e1), t4 (d2)`: whose end a task's start was put to, and what it shares with them; or nothing."""
        own = self._holdings[task_id]
        found = []
        for other_id, other in self._holdings.items():
            shared = _shared(own.placed, other.placed)
            if other_id != task_id and shared and abs(other.end_s - own.start_s) <= _SAME_S:
                found.append(f"{other_id} ({shared})")
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return ", ".join(found[:_NAMED]) + more


def _shared(one: Placed, other: Placed) -> str:
    """What two placements both take, in words."""
    if one.device == other.device and one.placement.cut1 and other.placement.cut1:
        return one.device
    a, b = one.placement, other.placement
    if a.edge is None or a.edge != b.edge:
        return ""
    both = [
        name
        for name, shared in (
            ("slot", a.uses_slot and b.uses_slot),
            ("link 1", a.link1_bps and b.link1_bps),
            ("link 2", a.link2_bps and b.link2_bps),
        )
        if shared
    ]
    return f"{', '.join(both)} of {a.edge}" if both else ""

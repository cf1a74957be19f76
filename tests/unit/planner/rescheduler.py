"""The rescheduler written down as it reads, to compare the planner with: slow, and meant to be obvious.

Every scheduled task, in order of (start, sequence), is put at the first instant at which what it needs is free beside what
runs and what was put before it. It reads reservations and capacities, never a timeline or a queue.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.search.ledger.accounts import EdgeAccount
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import MOVES_BORNE, Reservation

NEVER = float("inf")


@dataclass(frozen=True)
class Held:
    """What one task holds, and when."""

    r: Reservation
    begin: float
    end: float


def first_instants(ledger: Ledger, now: float) -> list[tuple[str, float | None]]:
    """Each scheduled task that is due, moves, or fits nowhere any more (None), and the start that it gets."""
    reservations = list(ledger.reservations.values())
    held = [Held(r, -NEVER, r.end_s) for r in reservations if r.running]
    changed: list[tuple[str, float | None]] = []
    turns: dict[str | None, float] = {}  # edge: the start of the last task so far that no other is put before
    for r in sorted((r for r in reservations if not r.running), key=lambda r: (r.start_s, r.seq)):
        start = first_instant(ledger, r, held, max(now, turns.get(r.edge, now)))
        if start is not None and r.edge is not None and r.moves >= MOVES_BORNE:
            turns[r.edge] = max(start, turns.get(r.edge, start))
        if start is not None:
            held.append(Held(r, start, start + r.length_s))
        if start != r.start_s or start <= now:
            changed.append((r.task_id, start))
    return changed


def first_instant(ledger: Ledger, r: Reservation, held: list[Held], now: float) -> float | None:
    """Now or an end: nothing becomes free at another instant."""
    for start in sorted({now, *(one.end for one in held if one.end > now)}):
        if fits(ledger, r, held, start):
            return start
    return None


def fits(ledger: Ledger, r: Reservation, held: list[Held], start: float) -> bool:
    """Whether all that `r` needs is free during [start, start + its length)."""
    end = start + r.length_s
    beside = [one for one in held if one.begin < end and one.end > start]
    mine = [] if r.sender is None else [one for one in beside if one.r.sender == r.sender]
    if r.computes and any(one.r.computes for one in mine):
        return False
    own_bps = ledger.own_links.get(r.sender or "", NEVER)
    if r.link1_bps and not all(_own_room(own_bps, r, mine, at_s) for at_s in _instants(mine, start)):
        return False
    if r.edge is None:
        return True
    here = [one for one in beside if one.r.edge == r.edge]
    return all(_room(ledger.edges[r.edge], r, here, at_s) for at_s in _instants(here, start))


def _instants(beside: list[Held], start: float) -> set[float]:
    return {start, *(max(start, one.begin) for one in beside)}


def _own_room(own_bps: float, r: Reservation, mine: list[Held], at_s: float) -> bool:
    return r.link1_bps + sum(one.r.link1_bps for one in mine if one.begin <= at_s < one.end) <= own_bps


def _room(edge: EdgeAccount, r: Reservation, here: list[Held], at_s: float) -> bool:
    others = [one.r for one in here if one.begin <= at_s < one.end]
    return (
        r.slots + sum(other.slots for other in others) <= edge.slots
        and r.link1_bps + sum(other.link1_bps for other in others) <= edge.link1_capacity_bps
        and r.link2_bps + sum(other.link2_bps for other in others) <= edge.link2_capacity_bps
    )

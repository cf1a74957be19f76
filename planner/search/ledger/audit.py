"""A check of the whole ledger, for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from bus.errors import InvariantError
from planner.search.ledger.accounts import SessionSums
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import FOREVER, LOAD_UNITS, Amounts, Reservation, bookable
from planner.search.ledger.timeline import Timeline


def audit(ledger: Ledger, now: float) -> None:
    """Check (8)-(10), one computing task per device, and the limits of own links at every instant from `now` on.

    The check counts the reservations and compares the result with the timelines. Raises `InvariantError`.
    """
    for account in ledger.edges.values():
        held = [(r, (r.slots, r.link1_bps, r.link2_bps)) for r in account.reservations.values()]
        capacity = (account.slots, account.link1_capacity_bps, account.link2_capacity_bps)
        _audit(f"edge {account.name}", account.timeline, held, capacity, now)
        _audit_sessions(
            f"edge {account.name}",
            account.sessions,
            [(r.load.edge, r.link1_bps, r.link2_bps) for r, _ in held if r.load is not None],
            (LOAD_UNITS * account.slots, account.link1_capacity_bps, account.link2_capacity_bps),
        )
    for device in ledger.devices.values():
        held = [(r, (int(r.computes), r.link1_bps, 0)) for r in device.reservations.values()]
        _audit(f"device {device.name}", device.timeline, held, (1, device.link1_capacity_bps, 0), now)
        loads = [(r.load.device, r.link1_bps, 0) for r, _ in held if r.load is not None]
        _audit_sessions(f"device {device.name}", device.sessions, loads, (LOAD_UNITS, device.link1_capacity_bps, 0))
    _audit_entries(ledger)


def _audit_entries(ledger: Ledger) -> None:
    """Check that accounts, queues and counts list exactly the reservations of the ledger."""
    for task_id, r in ledger.reservations.items():
        holders: Iterable[bool] = (
            r.edge is None or ledger.edges[r.edge].reservations.get(task_id) is r,
            r.device is None or ledger.devices[r.device].reservations.get(task_id) is r,
        )
        if not all(holders):
            raise InvariantError(f"{r} is missing from the account of its edge or device")
        queued = [
            any(item[2] is r for item in account.queue)
            for account in (ledger.edges.get(r.edge or ""), ledger.devices.get(r.device or ""))
            if account is not None
        ]
        if r.edge is not None and ((r.start_s, r.seq, r) in ledger.edges[r.edge].first_served) != r.first_served:
            raise InvariantError(f"{r}: its entry in the edge's first-served list contradicts its {r.moves} moves")
        if any(known == r.running for known in queued):
            raise InvariantError(f"{r}: its entry in a queue contradicts its state")
    if ledger.held_by != Counter(r.sender for r in ledger.reservations.values() if r.sender is not None):
        raise InvariantError("the number of reservations of a device differs from those that the ledger lists")
    if ledger.alone.keys() != {name for name, r in ledger.reservations.items() if r.edge is None}:
        raise InvariantError("the ledger's list of reservations without an edge is wrong")
    booked = sum(len(account.reservations) for account in ledger.edges.values())
    if booked != sum(r.edge is not None for r in ledger.reservations.values()):
        raise InvariantError("an edge has a reservation that the ledger does not list")


def _audit(
    name: str, timeline: Timeline, held: Sequence[tuple[Reservation, Amounts]], capacity: Amounts, now: float
) -> None:
    running = [(r, amounts) for r, amounts in held if r.running]  # includes tasks past their predicted end
    if any(amount > limit for amount, limit in zip(_sum(running), capacity, strict=True)):
        raise InvariantError(f"running tasks exceed the capacity of {name}: {running}")
    for at_s in _instants([r for r, _ in held], timeline.times, now):
        live = [(r, amounts) for r, amounts in held if r.start_s <= at_s < r.end_s]
        used = _sum(live)
        for number, amount, limit in zip(("(8)", "(9)", "(10)"), used, capacity, strict=True):
            if amount > limit:
                raise InvariantError(f"{number} is violated on {name} at {at_s}: {amount} > {limit}, {live}")
        free = timeline.at(at_s)
        if free != tuple(limit - amount for amount, limit in zip(used, capacity, strict=True)):
            raise InvariantError(f"{name} at {at_s}: its timeline has {free} free, but its reservations use {used}")


def _audit_sessions(name: str, sums: SessionSums, held: Sequence[Amounts], capacity: Amounts) -> None:
    used = sum(h[0] for h in held), sum(h[1] for h in held), sum(h[2] for h in held)
    if used != (sums.units, sums.link1_bps, sums.link2_bps):
        raise InvariantError(f"the sessions of {name} hold {used}, but their sums differ")
    if any(amount > bookable(limit) for amount, limit in zip(used, capacity, strict=True)):
        raise InvariantError(f"the sessions of {name} hold {used}, more than they may of {capacity}")


def _sum(held: Sequence[tuple[Reservation, Amounts]]) -> Amounts:
    return sum(a[0] for _, a in held), sum(a[1] for _, a in held), sum(a[2] for _, a in held)


def _instants(reservations: Iterable[Reservation], times: Iterable[float], now: float) -> Iterator[float]:
    instants = {now}
    for r in reservations:
        instants.update((r.start_s, r.end_s))
    instants.update(times)
    yield from sorted(at_s for at_s in instants if now <= at_s < FOREVER)

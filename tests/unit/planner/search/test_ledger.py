"""Reservations over time."""

import random

import pytest

from bus.errors import InvariantError
from planner.search.ledger.audit import audit
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import FOREVER, Reservation
from planner.search.ledger.timeline import LONG_AGO, Timeline


def reservation(
    task_id: str = "t", seq: int = 1, start: float = 1.0, length: float = 2.0, bps: int = 10
) -> Reservation:
    return Reservation(task_id, seq, "e1", None, start, length, 1, bps, bps)


def test_a_timeline_equals_counting_at_every_instant_and_leaves_nothing_behind() -> None:
    rng = random.Random(7)
    timeline = Timeline(50, 1000, 1000)
    held: list[Reservation] = []
    for i in range(400):
        if held and rng.random() < 0.5:
            timeline.give(held.pop(rng.randrange(len(held))))
        else:
            r = reservation(f"t{i}", i, rng.randrange(20) / 4, rng.randrange(1, 20) / 4, rng.randrange(1, 20))
            held.append(r)
            timeline.take(r)
        for step in range(48):
            at_s = step / 4 + 0.1
            live = [r for r in held if r.start_s <= at_s < r.end_s]
            assert timeline.fits(at_s, at_s + 0.01, 50 - len(live), 1000 - sum(r.link1_bps for r in live), 0)
            assert not timeline.fits(at_s, at_s + 0.01, 51 - len(live), 0, 0)
            assert not timeline.fits(at_s, at_s + 0.01, 0, 1001 - sum(r.link1_bps for r in live), 0)
    for r in held:
        timeline.give(r)
    assert (timeline.times, timeline.slots, timeline.free1) == ([LONG_AGO], [50], [1000])


def test_fits_looks_at_the_whole_interval() -> None:
    timeline = Timeline(1, 100, 100)
    timeline.take(reservation(start=5.0, length=1.0, bps=60))
    assert timeline.fits(0.0, 5.0, 1, 100, 100)
    assert not timeline.fits(0.0, 5.001, 1, 0, 0)
    assert timeline.fits(0.0, 9.0, 0, 40, 40)
    assert not timeline.fits(0.0, 9.0, 0, 41, 0)
    assert timeline.fits(6.0, FOREVER, 1, 100, 100)


def test_the_past_is_forgotten() -> None:
    timeline = Timeline(9, 100, 100)
    for i in range(20):
        timeline.take(reservation(f"t{i}", i, float(i), 0.5))
    timeline.forget_before(15.2)
    assert len(timeline.times) <= 10
    assert timeline.fits(15.2, 15.3, 8, 90, 90)
    assert not timeline.fits(15.2, 15.3, 9, 0, 0)


def test_nothing_is_released_twice() -> None:
    ledger = Ledger()
    ledger.open_edge("e1", 1, 100, 100)
    ledger.reserve(reservation(), 0.0)
    ledger.release("t")
    with pytest.raises(InvariantError, match="no reservation to release"):
        ledger.release("t")


def test_nobody_reserves_twice_or_where_no_edge_is() -> None:
    ledger = Ledger()
    with pytest.raises(InvariantError, match="not in the ledger"):
        ledger.reserve(reservation(), 0.0)
    assert not ledger.reservations
    ledger.open_edge("e1", 1, 100, 100)
    ledger.reserve(reservation(), 0.0)
    with pytest.raises(InvariantError, match="twice"):
        ledger.reserve(reservation(start=7.0), 0.0)


def test_an_edge_is_not_closed_while_anything_is_reserved_there() -> None:
    ledger = Ledger()
    ledger.open_edge("e1", 1, 100, 100)
    ledger.reserve(reservation(), 0.0)
    with pytest.raises(InvariantError, match="removed but still has reservations"):
        ledger.close_edge("e1")


@pytest.mark.parametrize("amount", [(2, 20, 20, "(8)"), (1, 101, 20, "(9)"), (1, 20, 101, "(10)")])
def test_the_audit_sees_each_constraint_broken_later_on(amount: tuple[int, int, int, str]) -> None:
    slots, link1, link2, number = amount
    ledger = Ledger()
    ledger.open_edge("e1", 1, 100, 100)
    r = Reservation("t", 1, "e1", None, 5.0, 1.0, slots, link1, link2)
    ledger.reserve(r, 0.0)
    with pytest.raises(InvariantError) as caught:
        audit(ledger, 0.0)
    assert number in str(caught.value)
    audit(ledger, 6.0)

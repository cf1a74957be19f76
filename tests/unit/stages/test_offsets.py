"""An offset is committed when everything that came out of its record, and of all before it, is done."""

from __future__ import annotations

import pytest

from bus.errors import InvariantError
from bus.port import Record
from stages.offsets import OffsetLedger

PARTITION = ("t", 0)


def record(offset: int) -> Record:
    return Record("t", 0, offset, 0, None, b"")


def test_the_oldest_open_record_holds_the_offset() -> None:
    ledger = OffsetLedger()
    receipts = [ledger.open(record(offset)) for offset in (5, 6, 7)]
    receipts[1].release()
    assert ledger.committable() == {PARTITION: 5}
    receipts[0].hold()
    receipts[0].release()
    assert ledger.committable() == {PARTITION: 5}
    receipts[0].release()
    assert ledger.committable() == {PARTITION: 7}
    receipts[2].release()
    assert ledger.committable() == {PARTITION: 8}


def test_what_was_committed_is_not_committed_again() -> None:
    ledger = OffsetLedger()
    ledger.open(record(5)).release()
    ledger.committed(ledger.committable())
    assert ledger.committable() == {}


def test_a_receipt_from_before_a_rebalance_closes_nothing_after_it() -> None:
    ledger = OffsetLedger()
    old = ledger.open(record(5))
    ledger.forget(frozenset({PARTITION}))
    assert ledger.committable() == {}
    ledger.open(record(5))
    old.release()
    assert ledger.committable() == {PARTITION: 5}


def test_a_receipt_that_is_released_twice_is_a_bug() -> None:
    receipt = OffsetLedger().open(record(5))
    receipt.release()
    with pytest.raises(InvariantError, match="record at offset 5"):
        receipt.release()

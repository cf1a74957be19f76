"""The reading rule: all readers of the same log follow the same planner."""

from __future__ import annotations

import json

import pytest

from bus import messages
from bus.decisions import DecisionLog, DecisionsLostError, DecisionUnreadableError, Dropped
from bus.messages import Decision, DecisionPart, EpochOpened, NodeLost, PlannerHeartbeat, PlannerLeft
from bus.port import Record


def opened(epoch: int, nonce: str) -> EpochOpened:
    return EpochOpened(region=0, epoch=epoch, nonce=nonce, planner=f"p-{nonce}", lease_s=5.0)


def decision(epoch: int, nonce: str, seq: int) -> Decision:
    return Decision(region=0, epoch=epoch, nonce=nonce, seq=seq, now_s=0.0, inputs={}, changes=(), ledger_hash="h")


def test_decisions_of_the_open_epoch_count_in_sequence() -> None:
    log = DecisionLog()
    assert isinstance(log.accept(opened(1, "a")), EpochOpened)
    assert log.accept(decision(1, "a", 1)) == decision(1, "a", 1)
    assert log.accept(decision(1, "a", 1)) == Dropped("out_of_sequence", "sequence 1 after 1")
    assert isinstance(log.accept(decision(1, "a", 3)), Dropped)
    assert log.accept(decision(1, "a", 2)) == decision(1, "a", 2)
    assert (log.seq, log.dropped) == (2, 2)


def test_the_first_to_open_an_epoch_wins_and_the_rest_is_dropped() -> None:
    log = DecisionLog()
    log.accept(opened(1, "a"))
    log.accept(decision(1, "a", 1))
    assert isinstance(log.accept(opened(2, "b")), EpochOpened)
    assert isinstance(log.accept(opened(2, "c")), Dropped)
    assert isinstance(log.accept(decision(1, "a", 2)), Dropped)
    assert isinstance(log.accept(decision(2, "c", 2)), Dropped)
    assert isinstance(log.accept(PlannerHeartbeat(region=0, epoch=1, nonce="a")), Dropped)
    assert log.accept(decision(2, "b", 2)) == decision(2, "b", 2)
    assert log.planner == "p-b"


def lost(*names: str) -> tuple[NodeLost, ...]:
    return tuple(NodeLost(node=name, incarnation="i", cause="left") for name in names)


def part(number: int, *names: str, epoch: int = 1, nonce: str = "a", seq: int = 1) -> DecisionPart:
    return DecisionPart(region=0, epoch=epoch, nonce=nonce, seq=seq, part=number, changes=lost(*names))


def last(parts: int | None, *names: str, epoch: int = 1, nonce: str = "a", seq: int = 1) -> Decision:
    return decision(epoch, nonce, seq).model_copy(update={"parts": parts, "changes": lost(*names)})


def test_a_decision_in_parts_comes_whole_with_its_last_record() -> None:
    log = DecisionLog()
    log.accept(opened(1, "a"))
    assert log.accept(part(1, "x", "y")) == part(1, "x", "y")
    log.accept(PlannerHeartbeat(region=0, epoch=1, nonce="a"))
    log.accept(part(2, "z"))
    assert log.seq == 0
    whole = log.accept(last(2, "v"))
    assert isinstance(whole, Decision)
    assert whole.changes == lost("x", "y", "z", "v")
    assert log.accept(last(None, "w", seq=2)) == last(None, "w", seq=2)


def test_a_decision_without_all_of_its_parts_is_dropped_and_so_are_parts_out_of_order() -> None:
    log = DecisionLog()
    log.accept(opened(1, "a"))
    assert isinstance(log.accept(last(1)), Dropped)
    assert isinstance(log.accept(part(2, "x")), Dropped)
    assert isinstance(log.accept(part(1, "x", seq=2)), Dropped)
    log.accept(part(1, "x"))
    assert isinstance(log.accept(part(1, "x")), Dropped)  # twice
    assert isinstance(log.accept(last(2)), Dropped)
    assert isinstance(log.accept(last(None)), Dropped)
    whole = log.accept(last(1, "y"))
    assert isinstance(whole, Decision)
    assert whole.changes == lost("x", "y")


def test_parts_of_a_planner_that_did_not_finish_are_forgotten_with_its_epoch() -> None:
    log = DecisionLog()
    log.accept(opened(1, "a"))
    log.accept(part(1, "x"))
    log.accept(PlannerLeft(region=0, epoch=1, nonce="a"))
    log.accept(opened(2, "b"))
    assert isinstance(log.accept(part(2, "y")), Dropped)  # of the old epoch
    assert log.accept(last(None, "z", epoch=2, nonce="b")) == last(None, "z", epoch=2, nonce="b")


def test_a_planner_that_leaves_says_so_until_the_next_epoch() -> None:
    log = DecisionLog()
    log.accept(opened(1, "a"))
    log.accept(PlannerLeft(region=0, epoch=1, nonce="a"))
    assert log.left
    log.accept(opened(2, "b"))
    assert not log.left


def test_garbage_on_the_topic_is_dropped_with_its_cause() -> None:
    log = DecisionLog()
    record = Record("deepar.decisions", 0, 0, 0, "0", b"garbage")
    assert isinstance(dropped := log.read(record), Dropped)
    assert dropped.reason == "undecodable"
    good = Record("deepar.decisions", 0, 1, 0, "0", messages.encode(opened(1, "a")))
    assert log.read(good) == opened(1, "a")


def test_a_log_that_begins_in_between_is_joined_at_its_newest_epoch() -> None:
    log = DecisionLog(joins=True)
    log.accept(PlannerHeartbeat(region=0, epoch=4, nonce="a"))
    assert isinstance(log.accept(PlannerHeartbeat(region=0, epoch=7, nonce="b")), PlannerHeartbeat)
    assert isinstance(log.accept(decision(4, "a", 12)), Dropped)
    assert log.accept(decision(7, "b", 90)) == decision(7, "b", 90)
    assert isinstance(log.accept(decision(7, "b", 92)), Dropped)
    assert log.accept(decision(7, "b", 91)) == decision(7, "b", 91)
    assert (log.epoch, log.nonce, log.seq) == (7, "b", 91)
    log.accept(opened(8, "c"))
    assert isinstance(log.accept(PlannerHeartbeat(region=0, epoch=9, nonce="d")), Dropped), "9 was never opened"


def test_a_log_that_begins_in_the_midst_of_a_decision_goes_on_with_the_next() -> None:
    log = DecisionLog(joins=True)
    assert isinstance(log.accept(part(2, "z", seq=5)), Dropped)
    assert isinstance(log.accept(last(2, "w", seq=5)), Dropped)
    assert isinstance(log.accept(part(1, "x", seq=6)), DecisionPart)
    assert log.accept(last(1, "y", seq=6)) == last(1, "x", "y", seq=6)


def record(offset: int, message: Decision | EpochOpened | bytes) -> Record:
    payload = message if isinstance(message, bytes) else messages.encode(message)
    return Record("deepar.decisions", 0, offset, 0, "0", payload)


@pytest.mark.parametrize(
    ("begin", "found", "lost"), [(0, 1, False), (0, 2, True), (5, 5, False), (5, 4, True), (5, 900, True)]
)
def test_a_reader_that_must_miss_nothing_is_told_of_a_gap_once(begin: int, found: int, lost: bool) -> None:
    log = DecisionLog(next_offset=begin)
    if lost:
        with pytest.raises(DecisionsLostError, match=f"{begin}.*{found}|{found}.*{begin}"):
            log.read(record(found, opened(1, "a")))
    else:
        log.read(record(found, opened(1, "a")))
    log.read(record(found + 1, decision(1, "a", 1)))


def of_tomorrow(epoch: int, nonce: str, seq: int, **changed: object) -> bytes:
    """A decision with a change that only a newer version knows."""
    fields = json.loads(messages.encode(decision(epoch, nonce, seq))) | {"changes": [{"type": "teleported"}]} | changed
    return json.dumps(fields).encode()


def test_a_decision_of_a_newer_version_is_an_error_and_not_silence() -> None:
    """A reader that skipped it would silently drop every later decision as out of sequence."""
    log = DecisionLog(next_offset=0)
    log.read(record(0, opened(1, "a")))
    log.read(record(1, decision(1, "a", 1)))
    with pytest.raises(DecisionUnreadableError, match=r"p-a at offset 2 .*teleported") as error:
        log.read(record(2, of_tomorrow(1, "a", 2)))
    assert "same version" in (error.value.remedy or "")


@pytest.mark.parametrize(
    "stray",
    [
        of_tomorrow(1, "b", 2),
        of_tomorrow(2, "a", 2),
        of_tomorrow(1, "a", 3),
        of_tomorrow(1, "a", 1),
        of_tomorrow(1, "a", 2, type="letter"),
        b"[" * 100_000,
        b"\xff\xfe",
        b"2",
    ],
)
def test_what_is_no_next_decision_is_dropped_whatever_is_in_it(stray: bytes) -> None:
    log = DecisionLog(next_offset=0)
    log.read(record(0, opened(1, "a")))
    log.read(record(1, decision(1, "a", 1)))
    assert isinstance(log.read(record(2, stray)), Dropped)
    assert log.read(record(3, decision(1, "a", 2))) == decision(1, "a", 2)


def test_views_skip_what_they_cannot_read() -> None:
    log = DecisionLog(joins=True)
    log.read(record(0, opened(1, "a")))
    assert isinstance(log.read(record(1, of_tomorrow(1, "a", 1))), Dropped)

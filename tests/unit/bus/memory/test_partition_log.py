"""One partition in memory: offsets that never change, retention, compaction."""

from __future__ import annotations

from bus.memory.partition_log import PartitionLog, held_bytes
from bus.port import Record
from bus.topics import TopicSpec


def log_of(*values: tuple[str | None, bytes | None], compacted: bool = False) -> PartitionLog:
    log = PartitionLog(TopicSpec("t", 1, compacted), 0)
    for key, value in values:
        log.append(Record("t", 0, log.end, 0, key, value))
        log.reveal(log.end)
    return log


def offsets(log: PartitionLog, offset: int = 0, limit: int = 1000) -> list[int]:
    return [record.offset for record in log.read(offset, limit)]


def test_reading_is_bounded_and_in_order() -> None:
    log = log_of(*[("k", b"%d" % number) for number in range(10)])
    assert offsets(log, 3, 4) == [3, 4, 5, 6]
    assert offsets(log, 10) == []
    assert offsets(log, 11) == list(range(10))  # out of range: the earliest
    assert [record.value for record in log.read(9, 5)] == [b"9"]


def test_only_what_is_delivered_is_read() -> None:
    log = log_of(("k", b"seen"))
    log.append(Record("t", 0, log.end, 0, "k", b"not yet"))
    assert (offsets(log), log.end, log.visible) == ([0], 2, 1)
    log.reveal(2)
    assert offsets(log) == [0, 1]


def test_retention_drops_the_oldest_and_no_more_than_it_may() -> None:
    log = log_of(*[("k", bytes(1000)) for _ in range(10)])
    each = held_bytes(log.read(0, 1)[0])
    log.drop_before(4, spare_bytes=0)
    assert (log.start, offsets(log)) == (4, [4, 5, 6, 7, 8, 9])
    assert log.bytes_held == 6 * each
    log.drop_before(10, spare_bytes=2 * each)
    assert offsets(log) == [8, 9]
    assert log.next_offset(3) == 8  # a reader that was behind goes on at the earliest
    log.drop_before(10, spare_bytes=0)
    assert (log.start, log.end, offsets(log)) == (10, 10, [])
    log.append(Record("t", 0, log.end, 0, "k", b"next"))
    log.reveal(log.end)
    assert offsets(log, 10) == [10]


def test_compaction_keeps_the_last_of_each_key_and_every_offset() -> None:
    log = log_of(*[(f"k{number % 3}", b"%d" % number) for number in range(200)], compacted=True)
    log.compact()
    assert offsets(log) == [197, 198, 199]
    assert [record.value for record in log.read(0, 10)] == [b"197", b"198", b"199"]
    assert offsets(log, 198, 1) == [198]
    assert offsets(log, 50, 1) == [197]  # into a gap: what comes after it
    assert log.end == 200
    assert log.bytes_held == sum(map(held_bytes, log.read(0, 10)))


def test_compaction_waits_until_it_pays() -> None:
    log = log_of(*[("k", b"v") for _ in range(20)], compacted=True)
    log.compact()
    assert len(offsets(log)) == 20


def test_a_tombstone_ends_a_key_and_then_itself() -> None:
    values: list[tuple[str | None, bytes | None]] = [("gone", b"1"), ("gone", None)]
    log = log_of(*values, *[("k", b"v") for _ in range(200)], compacted=True)
    log.compact()
    assert [record.key for record in log.read(0, 10)] == ["k"]
    log.append(Record("t", 0, log.end, 0, "gone", b"back"))
    log.reveal(log.end)
    assert [record.value for record in log.read(0, 10)] == [b"v", b"back"]


def test_the_tail_that_compaction_took_is_no_lag() -> None:
    log = log_of(*[("k", b"v") for _ in range(200)], ("k", None), compacted=True)
    log.compact()
    assert log.next_offset(150) == 150  # there is still something behind it
    position = log.read(0, 10)[-1].offset + 1
    assert position == log.end

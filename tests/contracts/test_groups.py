"""Members of a group: who reads what, and what is read again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable

import pytest

from bus.port import Member, TopicPartition
from tests.contracts.place import AnyBus, Place, filled, numbered, read, until, values


class Log:
    """What a member's callbacks were told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, tuple[int, ...]]] = []

    async def assigned(self, partitions: frozenset[TopicPartition]) -> None:
        self.lines.append(("assigned", tuple(sorted(number for _, number in partitions))))

    async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        self.lines.append(("revoked", tuple(sorted(number for _, number in partitions))))


async def join(bus: AnyBus, topic: str, group: str, log: Log | None = None) -> Member:
    log = log or Log()
    return await bus.join([topic], group=group, on_assigned=log.assigned, on_revoked=log.revoked)


def held(*members: Member) -> list[list[int]]:
    return [sorted(number for _, number in member.assignment()) for member in members]


async def test_a_member_alone_reads_everything_from_the_start(place: Place) -> None:
    topic = await filled(place, 3, 4)
    log = Log()
    member = await join(place.bus, topic, place.group(), log)
    records = await read(member, 12)
    assert {(record.partition, record.offset) for record in records} == set(itertools.product(range(3), range(4)))
    assert held(member) == [[0, 1, 2]]
    assert log.lines == [("assigned", (0, 1, 2))]
    assert await member.lag() == 0


async def test_members_share_and_what_was_committed_is_not_repeated(place: Place) -> None:
    topic = await filled(place, 4, 5)
    group = place.group()
    other = await place.another()
    first_log, second_log = Log(), Log()
    first = await join(place.bus, topic, group, first_log)
    await read(first, 20)
    await first.commit({(topic, number): 5 for number in range(4)})
    second = await join(other, topic, group, second_log)
    await until(lambda: all(len(member.assignment()) == 2 for member in (first, second)) and bool(second_log.lines))
    assert sorted(itertools.chain(*held(first, second))) == [0, 1, 2, 3]
    assert first_log.lines[:2] == [("assigned", (0, 1, 2, 3)), ("revoked", (0, 1, 2, 3))]
    assert second_log.lines[-1] == ("assigned", tuple(held(second)[0]))
    for number in range(4):
        await place.bus.send(topic, b"new", partition=number)
    got = await asyncio.gather(read(first, 2), read(second, 2))
    assert values(got[0]) == values(got[1]) == [b"new", b"new"]
    assert {record.partition for record in got[0]} == set(held(first)[0])


async def test_what_was_not_committed_comes_again_to_who_takes_over(place: Place) -> None:
    topic = await filled(place, 1, 10)
    group = place.group()
    other = await place.another()
    first = await join(place.bus, topic, group)
    assert values(await read(first, 8)) == numbered(8)
    await first.commit({(topic, 0): 3})
    await first.close()
    second = await join(other, topic, group)
    assert values(await read(second, 7)) == numbered(7, 3)


async def test_a_commit_while_letting_go_counts(place: Place) -> None:
    topic = await filled(place, 2, 6)
    group = place.group()
    other = await place.another()
    revoked = asyncio.Event()

    async def let_go(partitions: frozenset[TopicPartition]) -> None:
        await first.commit(dict.fromkeys(partitions, 6))
        revoked.set()

    first = await place.bus.join([topic], group=group, on_revoked=let_go)
    await read(first, 12)
    second = await join(other, topic, group)
    await until(lambda: len(second.assignment()) == 1 and len(first.assignment()) == 1)
    assert revoked.is_set()
    await place.bus.send(topic, b"new", partition=held(second)[0][0])
    assert values(await read(second, 1)) == [b"new"]


async def test_a_commit_for_a_partition_of_somebody_else_is_ignored(place: Place) -> None:
    topic = await filled(place, 2, 5)
    group = place.group()
    other = await place.another()
    first = await join(place.bus, topic, group)
    await read(first, 10)
    second = await join(other, topic, group)
    await until(lambda: len(second.assignment()) == 1 and len(first.assignment()) == 1)
    lost, kept = held(second)[0][0], held(first)[0][0]
    await first.commit({(topic, lost): 5, (topic, kept): 5})
    await first.close()
    await second.close()
    third = await join(place.bus, topic, group)
    records = await read(third, 5)
    assert {record.partition for record in records} == {lost}
    assert values(records) == numbered(5)


async def test_groups_do_not_disturb_one_another(place: Place) -> None:
    topic = await filled(place, 1, 5)
    first, second = [await join(place.bus, topic, place.group()) for _ in range(2)]
    await read(first, 5)
    await first.commit({(topic, 0): 5})
    assert values(await read(second, 5)) == numbered(5)


async def test_after_a_crash_everything_is_read_at_least_once(place: Place) -> None:
    topic = await filled(place, 2, 10)
    group = place.group()
    other = await place.another()
    crashing = await join(other, topic, group)
    done = await read(crashing, 12)
    await crashing.commit({(topic, 0): 2, (topic, 1): 2})
    await place.crash(other)
    heir = await join(place.bus, topic, group)
    again = await read(heir, 16)
    assert {(record.partition, record.offset) for record in done + again} == set(itertools.product(range(2), range(10)))
    assert min(record.offset for record in again) == 2


async def test_a_member_may_go_back_within_its_partitions(place: Place) -> None:
    topic = await filled(place, 1, 6)
    member = await join(place.bus, topic, place.group())
    await read(member, 6)
    await member.seek((topic, 0), 2)
    assert values(await read(member, 4)) == numbered(4, 2)


async def test_nothing_is_read_before_the_assignment_was_told(place: Place) -> None:
    topic = await filled(place, 1, 6)
    events: list[str] = []

    async def assigned(partitions: frozenset[TopicPartition]) -> None:
        await asyncio.sleep(0.3)
        await member.seek((topic, 0), 4)
        events.append("assigned")

    member = await place.bus.join([topic], group=place.group(), on_assigned=assigned)
    records = await read(member, 2)
    events.append("read")
    assert events == ["assigned", "read"]
    assert values(records) == numbered(2, 4)


async def test_an_error_in_a_callback_reaches_the_caller(place: Place) -> None:
    topic = await place.topic(1)

    async def assigned(partitions: frozenset[TopicPartition]) -> None:
        raise RuntimeError("planned")

    member = await place.bus.join([topic], group=place.group(), on_assigned=assigned)

    async def fetch_for_ever() -> None:
        while True:
            await member.fetch(timeout_s=0.5)

    with pytest.raises(RuntimeError, match="planned"):
        async with asyncio.timeout(15):
            await fetch_for_ever()


async def test_members_come_and_go_and_nothing_is_lost(place: Place) -> None:
    topic = await place.topic(4)
    group = place.group()
    seen: set[tuple[int, int]] = set()
    stop = asyncio.Event()

    async def consume(bus: AnyBus, turns: int) -> None:
        member = await join(bus, topic, group)
        while not stop.is_set() and turns:
            turns -= 1
            done: dict[TopicPartition, int] = {}
            for record in await member.fetch(max_records=20, timeout_s=0.1):
                seen.add((record.partition, record.offset))
                done[record.topic, record.partition] = record.offset + 1
            await member.commit(done)
        await member.close()

    async def produce() -> None:
        for number in range(400):
            await (await place.bus.post(topic, b"%d" % number, partition=number % 4))

    lasting = asyncio.create_task(consume(place.bus, 10**9))
    passing: list[Awaitable[None]] = [consume(await place.another(), turns) for turns in (5, 9)]
    await asyncio.gather(produce(), *passing)
    await until(lambda: len(seen) == 400, limit_s=30)
    stop.set()
    await lasting
    assert seen == set(itertools.product(range(4), range(100)))

"""The contract of the bus port: every test runs on `MemoryBus` and on `KafkaBus`.

Each test has topics and groups of its own, so that one broker serves them all.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import pytest

from bus.errors import BusError, BusUnavailableError, MessageTooLargeError, UnknownTopicError
from bus.kafka import KafkaBus, KafkaConnection
from bus.memory import MemoryBroker, MemoryBus
from bus.port import Bus, Member, Reader, Record, TopicPartition
from bus.topics import TopicSpec, partition_of
from tests.kafka_broker import OwnBroker

AnyBus = MemoryBus | KafkaBus
_numbers = itertools.count(1)

pytestmark = pytest.mark.live


class Place:
    """Somewhere to connect to: makes buses that share a broker, and topics with names of their own."""

    def __init__(self, connect: Callable[[], AnyBus]) -> None:
        self._connect = connect
        self._stack = AsyncExitStack()
        self.bus: AnyBus = connect()

    async def another(self) -> AnyBus:
        """One more connection, closed after the test."""
        return await self._stack.enter_async_context(self._connect())

    async def topic(self, partitions: int = 1, *, compacted: bool = False, retention_bytes: int = -1) -> str:
        name = f"contract.t{next(_numbers)}.n{id(self)}"
        await self.bus.create_topics([TopicSpec(name, partitions, compacted, retention_bytes=retention_bytes)])
        return name

    def group(self) -> str:
        return f"contract-g{next(_numbers)}-{id(self)}"

    async def leave(self, bus: AnyBus) -> None:
        """Close a connection in the middle of a test."""
        await bus.__aexit__(None, None, None)

    async def crash(self, bus: AnyBus) -> None:
        """The process of this bus is gone without a word."""
        if isinstance(bus, MemoryBus):
            bus.kill()
        else:
            await bus.abandon()

    async def __aenter__(self) -> Place:
        await self._stack.__aenter__()
        await self._stack.enter_async_context(self.bus)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.__aexit__(None, None, None)


@pytest.fixture(params=["memory", "kafka"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    if request.param == "memory":
        broker = MemoryBroker(session_timeout_s=0.2)
        connect: Callable[[], AnyBus] = lambda: MemoryBus(broker)  # noqa: E731
    else:
        connection = KafkaConnection(bootstrap_servers=request.getfixturevalue("kafka").bootstrap)
        connect = lambda: KafkaBus(connection)  # noqa: E731
    async with Place(connect) as place:
        yield place


async def read(reader: Reader, count: int, *, limit_s: float = 20.0) -> list[Record]:
    """The next `count` records, no more; fails when they do not come."""
    records: list[Record] = []
    async with asyncio.timeout(limit_s):
        while len(records) < count:
            records += await reader.fetch(max_records=count - len(records), timeout_s=0.5)
    return records


async def post_all(bus: Bus, topic: str, values: list[bytes], partition: int = 0) -> None:
    await asyncio.gather(*[await bus.post(topic, value, partition=partition) for value in values])


async def until(true: Callable[[], bool], *, limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not true():
            await asyncio.sleep(0.02)


def values(records: list[Record]) -> list[bytes | None]:
    return [record.value for record in records]


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(start, start + count)]


# --- topics ----------------------------------------------------------------------------------------------------------


async def test_without_sites_every_topic_is_here(place: Place) -> None:
    assert place.bus.beside("contract.one", "contract.other") is place.bus


async def test_a_topic_that_exists_stays_as_it_is(place: Place) -> None:
    topic = await place.topic(3)
    await place.bus.send(topic, b"here", partition=2)
    await place.bus.create_topics([TopicSpec(topic, 5)])
    assert await place.bus.partitions(topic) == 3
    assert await place.bus.end_offsets(topic) == {0: 0, 1: 0, 2: 1}


@pytest.mark.parametrize("what", ["partitions", "end_offsets", "post", "reader", "join"])
async def test_an_unknown_topic_is_an_error(place: Place, what: str) -> None:
    async def asked() -> object:
        match what:
            case "partitions":
                return await place.bus.partitions("contract.nowhere")
            case "end_offsets":
                return await place.bus.end_offsets("contract.nowhere")
            case "post":
                return await place.bus.post("contract.nowhere", b"x")
            case "reader":
                return await place.bus.reader([("contract.nowhere", 0)], start="start")
            case _:
                return await place.bus.join(["contract.nowhere"], group=place.group())

    with pytest.raises(UnknownTopicError, match=r"contract\.nowhere"):
        await asked()


async def test_a_partition_that_is_not_there_is_an_error(place: Place) -> None:
    topic = await place.topic(2)
    with pytest.raises(BusError, match="2 partitions"):
        await place.bus.post(topic, b"x", partition=2)
    with pytest.raises(BusError, match="2 partitions"):
        await place.bus.reader([(topic, 5)], start="start")


# --- posting ---------------------------------------------------------------------------------------------------------


async def test_records_come_back_as_they_were_sent(place: Place) -> None:
    topic = await place.topic()
    headers = (("ce_type", b"frame"), ("empty", b""), ("ce_type", b"again"))
    whole = bytes(range(256)) * 40
    buffer = bytearray(b"changed later")
    positions = [
        await place.bus.send(topic, whole, key="task-7", headers=headers),
        await place.bus.send(topic, memoryview(whole)[3:9]),
        await place.bus.send(topic, b"", key="ключ"),
    ]
    waiting = await place.bus.post(topic, buffer)
    buffer[:] = b"CHANGED LATER"
    positions.append(await waiting)
    assert [(position.topic, position.partition, position.offset) for position in positions] == [
        (topic, 0, offset) for offset in range(4)
    ]
    reader = await place.bus.reader([(topic, 0)], start="start")
    records = await read(reader, 4)
    assert values(records) == [whole, whole[3:9], b"", b"changed later"]
    assert [record.key for record in records] == ["task-7", None, "ключ", None]
    assert [record.headers for record in records] == [headers, (), (), ()]
    assert [record.offset for record in records] == [0, 1, 2, 3]
    assert all(isinstance(record.value, bytes) for record in records)
    assert all(record.timestamp_ms >= 0 for record in records)


async def test_what_one_task_posts_stays_in_order(place: Place) -> None:
    topic = await place.topic()
    sent = numbered(1000)
    await post_all(place.bus, topic, sent)
    reader = await place.bus.reader([(topic, 0)], start="start")
    records = await read(reader, 1000)
    assert values(records) == sent
    assert [record.offset for record in records] == list(range(1000))


async def test_each_of_many_posters_keeps_its_order(place: Place) -> None:
    topic = await place.topic(2)
    big = b"." * 30_000  # many batches, so that posts wait for one another

    async def poster(name: int) -> None:
        acknowledgements = [
            await place.bus.post(topic, b"%d %d " % (name, number) + big, partition=name % 2) for number in range(60)
        ]
        offsets = [(await acknowledgement).offset for acknowledgement in acknowledgements]
        assert offsets == sorted(offsets)

    await asyncio.gather(*map(poster, range(6)))
    reader = await place.bus.reader([(topic, 0), (topic, 1)], start="start")
    seen: dict[int, list[int]] = {}
    for record in await read(reader, 360):
        assert record.value is not None
        name, number = map(int, record.value.split()[:2])
        assert record.partition == name % 2
        seen.setdefault(name, []).append(number)
    assert seen == {name: list(range(60)) for name in range(6)}


async def test_a_key_decides_the_partition(place: Place) -> None:
    topic = await place.topic(5)
    keys = [f"task-{number}" for number in range(40)]
    for round_ in range(2):
        for key in keys:
            position = await place.bus.send(topic, b"%d" % round_, key=key)
            assert position.partition == partition_of(key, 5)
    ends = await place.bus.end_offsets(topic)
    assert sum(ends.values()) == 80
    assert all(ends.values())


async def test_a_named_partition_wins_over_the_key(place: Place) -> None:
    topic = await place.topic(5)
    elsewhere = (partition_of("task", 5) + 1) % 5
    assert (await place.bus.send(topic, b"x", key="task", partition=elsewhere)).partition == elsewhere


async def test_records_without_a_key_use_every_partition(place: Place) -> None:
    topic = await place.topic(3)
    await asyncio.gather(*[await place.bus.post(topic, b"x") for _ in range(30)])
    assert all((await place.bus.end_offsets(topic)).values())


async def test_a_record_that_is_too_large_is_refused_and_the_rest_goes_on(place: Place) -> None:
    topic = await place.topic()
    largest = bytes(1_040_000)  # what a frame may be
    await place.bus.send(topic, largest, key="k" * 100, headers=(("plan", b"p" * 100),))
    with pytest.raises(MessageTooLargeError) as refused:
        await place.bus.send(topic, bytes(1_048_600))
    assert refused.value.topic == topic
    assert refused.value.size_bytes > refused.value.limit_bytes
    await place.bus.send(topic, b"small")
    reader = await place.bus.reader([(topic, 0)], start="start")
    assert values(await read(reader, 2)) == [largest, b"small"]


async def test_headers_count_towards_the_size(place: Place) -> None:
    topic = await place.topic()
    with pytest.raises(MessageTooLargeError):
        await place.bus.send(topic, bytes(600_000), headers=(("other", bytes(600_000)),))


async def test_tombstones_and_compacted_topics(place: Place) -> None:
    topic = await place.topic(compacted=True)
    await place.bus.send(topic, b"one", key="a")
    await place.bus.send(topic, None, key="a")
    await place.bus.send(topic, b"two", key="b")
    with pytest.raises(BusError):
        await place.bus.send(topic, b"no key")
    position = await place.bus.send(topic, b"three", key="b")  # the sender has survived that
    assert position.offset == 3
    reader = await place.bus.reader([(topic, 0)], start="start")
    latest: dict[str | None, bytes | None] = {record.key: record.value for record in await read(reader, 4)}
    assert latest == {"a": None, "b": b"three"}


# --- readers ---------------------------------------------------------------------------------------------------------


async def test_readers_start_where_they_are_told(place: Place) -> None:
    topic = await place.topic(2)
    await post_all(place.bus, topic, numbered(10))
    at_start = await place.bus.reader([(topic, 0)], start="start")
    at_end = await place.bus.reader([(topic, 0), (topic, 1)], start="end")
    at_seven = await place.bus.reader([(topic, 0)], start={(topic, 0): 7})
    assert [reader.position((topic, 0)) for reader in (at_start, at_end, at_seven)] == [0, 10, 7]
    await post_all(place.bus, topic, numbered(2, 10))
    assert values(await read(at_start, 12)) == numbered(12)
    assert values(await read(at_end, 2)) == numbered(2, 10)
    assert values(await read(at_seven, 5)) == numbered(5, 7)
    assert at_seven.position((topic, 0)) == 12


async def test_an_offset_that_is_not_there_means_the_earliest(place: Place) -> None:
    topic = await place.topic()
    await post_all(place.bus, topic, numbered(3))
    reader = await place.bus.reader([(topic, 0)], start={(topic, 0): 77})
    assert values(await read(reader, 3)) == numbered(3)
    assert reader.position((topic, 0)) == 3


async def test_replay_from_an_offset(place: Place) -> None:
    topic = await place.topic()
    await post_all(place.bus, topic, numbered(20))
    reader = await place.bus.reader([(topic, 0)], start="start")
    await read(reader, 15)
    for offset in (5, 18, 0):
        await reader.seek((topic, 0), offset)
        assert reader.position((topic, 0)) == offset
        assert values(await read(reader, 2)) == numbered(2, offset)
    with pytest.raises(BusError):
        await reader.seek(("elsewhere", 0), 0)
    with pytest.raises(BusError):
        reader.position((topic, 1))


async def test_max_records_bounds_a_fetch_and_nothing_is_skipped(place: Place) -> None:
    topic = await place.topic(2)
    await post_all(place.bus, topic, numbered(30), 0)
    await post_all(place.bus, topic, numbered(30), 1)
    reader = await place.bus.reader([(topic, 0), (topic, 1)], start="start")
    seen: dict[int, list[int]] = {0: [], 1: []}
    async with asyncio.timeout(20):
        while sum(map(len, seen.values())) < 60:
            fetched = await reader.fetch(max_records=7, timeout_s=0.5)
            assert len(fetched) <= 7
            for record in fetched:
                seen[record.partition].append(record.offset)
    assert seen == {0: list(range(30)), 1: list(range(30))}


async def test_a_fetch_without_records_ends_in_time(place: Place) -> None:
    topic = await place.topic()
    reader = await place.bus.reader([(topic, 0)], start="start")
    started = asyncio.get_running_loop().time()
    assert await reader.fetch(timeout_s=0.2) == []
    assert 0.15 < asyncio.get_running_loop().time() - started < 3.0
    assert await reader.fetch(timeout_s=0.0) == []


async def test_a_waiting_fetch_returns_when_something_comes(place: Place) -> None:
    topic = await place.topic()
    reader = await place.bus.reader([(topic, 0)], start="start")
    fetch = asyncio.create_task(reader.fetch(timeout_s=10.0))
    await asyncio.sleep(0.05)
    await place.bus.send(topic, b"now")
    async with asyncio.timeout(5):
        assert values(await fetch) == [b"now"]


async def test_a_cancelled_fetch_takes_nothing_away(place: Place) -> None:
    topic = await place.topic()
    reader = await place.bus.reader([(topic, 0)], start="start")
    got: list[Record] = []
    for number in range(20):
        fetch = asyncio.create_task(reader.fetch(timeout_s=10.0))
        await asyncio.sleep(0.003 if number % 2 else 0)
        await place.bus.send(topic, b"%d" % number)
        await asyncio.sleep(0.001 * (number % 4))
        fetch.cancel()
        await asyncio.wait([fetch])
        if not fetch.cancelled():  # it had its records already
            got += fetch.result()
    assert values(got + await read(reader, 20 - len(got))) == numbered(20)


async def test_lag_counts_what_is_still_to_read(place: Place) -> None:
    topic = await place.topic(2)
    await post_all(place.bus, topic, numbered(6), 0)
    await post_all(place.bus, topic, numbered(4), 1)
    reader = await place.bus.reader([(topic, 0), (topic, 1)], start={(topic, 0): 2, (topic, 1): 0})
    assert await reader.lag() == 8
    await read(reader, 3)
    assert await reader.lag() == 5
    await read(reader, 5)
    assert await reader.lag() == 0
    await place.bus.send(topic, b"new", partition=1)
    assert await reader.lag() == 1


async def test_readers_do_not_disturb_one_another(place: Place) -> None:
    topic = await place.topic()
    await post_all(place.bus, topic, numbered(5))
    other = await place.another()
    first, second = [await bus.reader([(topic, 0)], start="start") for bus in (place.bus, other)]
    assert values(await read(first, 5)) == values(await read(second, 5)) == numbered(5)


async def test_closing_ends_a_fetch_that_waits(place: Place) -> None:
    topic = await place.topic()
    reader = await place.bus.reader([(topic, 0)], start="start")
    member = await place.bus.join([topic], group=place.group())
    fetches = [asyncio.create_task(each.fetch(timeout_s=30.0)) for each in (reader, member)]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(10):
        await reader.close()
        await member.close()
        assert await asyncio.gather(*fetches) == [[], []]
    with pytest.raises(BusError):
        await reader.fetch()
    await reader.close()


async def test_a_bus_that_is_not_open_says_so(place: Place) -> None:
    topic = await place.topic()
    other = await place.another()
    await other.send(topic, b"open")
    await place.leave(other)
    with pytest.raises(BusError, match="not open"):
        await other.send(topic, b"closed")


async def test_leaving_flushes(place: Place) -> None:
    topic = await place.topic()
    other = await place.another()
    waiting = [await other.post(topic, value) for value in numbered(100)]
    await place.leave(other)
    assert [position.offset for position in await asyncio.gather(*waiting)] == list(range(100))


# --- groups ----------------------------------------------------------------------------------------------------------


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
    topic = await place.topic(3)
    for number in range(3):
        await post_all(place.bus, topic, numbered(4), number)
    log = Log()
    member = await join(place.bus, topic, place.group(), log)
    records = await read(member, 12)
    assert {(record.partition, record.offset) for record in records} == set(itertools.product(range(3), range(4)))
    assert held(member) == [[0, 1, 2]]
    assert log.lines == [("assigned", (0, 1, 2))]
    assert await member.lag() == 0


async def test_members_share_and_what_was_committed_is_not_repeated(place: Place) -> None:
    topic = await place.topic(4)
    group = place.group()
    other = await place.another()
    for number in range(4):
        await post_all(place.bus, topic, numbered(5), number)
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
    topic = await place.topic(1)
    group = place.group()
    other = await place.another()
    await post_all(place.bus, topic, numbered(10))
    first = await join(place.bus, topic, group)
    assert values(await read(first, 8)) == numbered(8)
    await first.commit({(topic, 0): 3})
    await first.close()
    second = await join(other, topic, group)
    assert values(await read(second, 7)) == numbered(7, 3)


async def test_a_commit_while_letting_go_counts(place: Place) -> None:
    topic = await place.topic(2)
    group = place.group()
    other = await place.another()
    for number in range(2):
        await post_all(place.bus, topic, numbered(6), number)
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
    topic = await place.topic(2)
    group = place.group()
    other = await place.another()
    for number in range(2):
        await post_all(place.bus, topic, numbered(5), number)
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
    topic = await place.topic(1)
    await post_all(place.bus, topic, numbered(5))
    first, second = [await join(place.bus, topic, place.group()) for _ in range(2)]
    await read(first, 5)
    await first.commit({(topic, 0): 5})
    assert values(await read(second, 5)) == numbered(5)


async def test_after_a_crash_everything_is_read_at_least_once(place: Place) -> None:
    topic = await place.topic(2)
    group = place.group()
    other = await place.another()
    for number in range(2):
        await post_all(place.bus, topic, numbered(10), number)
    crashing = await join(other, topic, group)
    done = await read(crashing, 12)
    await crashing.commit({(topic, 0): 2, (topic, 1): 2})
    await place.crash(other)
    heir = await join(place.bus, topic, group)
    again = await read(heir, 16)
    assert {(record.partition, record.offset) for record in done + again} == set(itertools.product(range(2), range(10)))
    assert min(record.offset for record in again) == 2


async def test_a_member_may_go_back_within_its_partitions(place: Place) -> None:
    topic = await place.topic(1)
    await post_all(place.bus, topic, numbered(6))
    member = await join(place.bus, topic, place.group())
    await read(member, 6)
    await member.seek((topic, 0), 2)
    assert values(await read(member, 4)) == numbered(4, 2)


async def test_nothing_is_read_before_the_assignment_was_told(place: Place) -> None:
    topic = await place.topic(1)
    await post_all(place.bus, topic, numbered(6))
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


# --- Kafka only: the broker goes away ----------------------------------------------------------------------------------


async def test_a_broker_killed_in_the_middle_of_a_stream_loses_nothing_acknowledged(kafka_own: OwnBroker) -> None:
    """G6: 2,000 records, SIGKILL after 700 of them, the same data started again; no operator touches the bus."""
    topic = "contract.restart"
    connection = KafkaConnection(bootstrap_servers=kafka_own.bootstrap, delivery_timeout_s=120.0)
    acknowledged: dict[int, int] = {}  # offset -> number
    received: list[Record] = []
    in_group: set[int] = set()

    async with KafkaBus(connection) as bus, KafkaBus(connection) as other:
        await bus.create_topics([TopicSpec(topic, 1)])

        async def produce() -> None:
            waiting = []
            for number in range(2000):
                waiting.append((number, await bus.post(topic, b"%d" % number, partition=0)))
                await asyncio.sleep(0.0005)
            for number, acknowledgement in waiting:
                acknowledged[(await acknowledgement).offset] = number

        async def consume() -> None:
            reader = await other.reader([(topic, 0)], start="start")
            while len(received) < 2000:
                received.extend(await reader.fetch(timeout_s=0.5))

        async def consume_in_group() -> None:
            member = await other.join([topic], group="contract-restart")
            while len(in_group) < 2000:
                for record in await member.fetch(timeout_s=0.5):
                    in_group.add(record.offset)
                    with suppress(BusUnavailableError):
                        await member.commit({(topic, 0): record.offset + 1})

        async def break_it() -> float:
            while len(received) < 700:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(kafka_own.kill)
            await asyncio.to_thread(kafka_own.start)
            return asyncio.get_running_loop().time()

        async with asyncio.timeout(150), asyncio.TaskGroup() as group:
            broken = group.create_task(break_it())
            group.create_task(produce())
            reading = group.create_task(consume())
            group.create_task(consume_in_group())
            await reading
            flowing_s = asyncio.get_running_loop().time()
        assert flowing_s > broken.result() - 1  # the stream was still going when the broker came back

    assert len(acknowledged) == 2000
    assert [record.offset for record in received] == list(range(2000))
    assert [int(record.value or b"-1") for record in received] == list(range(2000))
    assert acknowledged == {record.offset: int(record.value or b"-1") for record in received}
    assert in_group == set(range(2000))

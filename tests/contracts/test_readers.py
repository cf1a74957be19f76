"""Reading from where one was told, alone."""

from __future__ import annotations

import asyncio

import pytest

from bus.errors import BusError
from bus.port import Record
from tests.contracts.place import Place, numbered, post_all, read, values


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

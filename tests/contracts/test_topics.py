"""Topics, and what is posted to them."""

from __future__ import annotations

import asyncio

import pytest

from bus.errors import BusError, MessageTooLargeError, UnknownTopicError
from bus.topics import TopicSpec, partition_of
from tests.contracts.place import Place, numbered, post_all, read, values


async def test_without_sites_every_topic_is_here(place: Place) -> None:
    assert place.bus.beside("contract.one", "contract.other") is place.bus


async def test_a_topic_that_exists_stays_as_it_is(place: Place) -> None:
    topic = await place.topic(3)
    await place.bus.send(topic, b"here", partition=2)
    await place.bus.create_topics([TopicSpec(topic, 5)])
    assert await place.bus.partitions(topic) == 3
    assert await place.bus.end_offsets(topic) == {0: 0, 1: 0, 2: 1}


@pytest.mark.parametrize("what", ["partitions", "end_offsets", "prepare_topic", "post", "reader", "join"])
async def test_an_unknown_topic_is_an_error(place: Place, what: str) -> None:
    async def ask() -> object:
        match what:
            case "partitions":
                return await place.bus.partitions("contract.nowhere")
            case "end_offsets":
                return await place.bus.end_offsets("contract.nowhere")
            case "prepare_topic":
                await place.bus.prepare_topic("contract.nowhere")
                return None
            case "post":
                return await place.bus.post("contract.nowhere", b"x")
            case "reader":
                return await place.bus.reader([("contract.nowhere", 0)], start="start")
            case _:
                return await place.bus.join(["contract.nowhere"], group=place.group())

    with pytest.raises(UnknownTopicError, match=r"contract\.nowhere"):
        await ask()


async def test_a_partition_that_is_not_there_is_an_error(place: Place) -> None:
    topic = await place.topic(2)
    with pytest.raises(BusError, match="2 partitions"):
        await place.bus.post(topic, b"x", partition=2)
    with pytest.raises(BusError, match="2 partitions"):
        await place.bus.reader([(topic, 5)], start="start")


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
    assert refused.value.limit_bytes is not None
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

"""What `MemoryBus` has beside the contract: virtual time, latency, retention, an outage, and one sender's limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bus.errors import BusError, BusUnavailableError
from bus.memory.broker import MemoryBroker, Retention
from bus.memory.bus import MemoryBus
from bus.port import Position, Record, TopicPartition
from bus.topics import TopicSpec
from loadgen.sim.virtual_loop import run_virtual

DATA = TopicSpec("data", 1, retention_bytes=1 << 30)
CONTROL = TopicSpec("control", 2)


def virtually(broker: MemoryBroker, main: Callable[[MemoryBus], Awaitable[Any]], *, horizon_s: float = 1e6) -> Any:
    """Run `main` with a bus that has both topics, in virtual time."""

    async def inside() -> Any:
        async with MemoryBus(broker, "test") as bus:
            await bus.create_topics([DATA, CONTROL])
            return await main(bus)

    return run_virtual(inside(), horizon_s=horizon_s)


def now() -> float:
    return asyncio.get_running_loop().time()


async def settle(acknowledgements: list[Awaitable[Position]]) -> list[int | None]:
    """The offset of each record, None where it failed."""
    results = await asyncio.gather(*acknowledgements, return_exceptions=True)
    for result in results:
        assert isinstance(result, Position | BusUnavailableError), result
    return [result.offset if isinstance(result, Position) else None for result in results]


# --- time ------------------------------------------------------------------------------------------------------------


def test_without_latency_nothing_takes_time() -> None:
    async def main(bus: MemoryBus) -> None:
        reader = await bus.reader([("data", 0)], start="start")
        for number in range(1000):
            await bus.send("data", b"%d" % number)
            assert len(await reader.fetch()) == 1
        assert now() == 0.0
        assert await reader.fetch(timeout_s=7.0) == []
        assert now() == 7.0

    virtually(MemoryBroker(), main)


def test_latency_delays_acknowledgement_and_delivery() -> None:
    async def main(bus: MemoryBus) -> None:
        reader = await bus.reader([("data", 0)], start="start")
        acknowledgement = await bus.post("data", bytes(1000))
        assert await reader.fetch(timeout_s=0.0) == []
        assert await bus.end_offsets("data") == {0: 1}  # written, not delivered
        assert len(await reader.fetch(timeout_s=10.0)) == 1
        assert now() == pytest.approx(0.5)
        await acknowledgement
        assert now() == pytest.approx(0.5)

    virtually(MemoryBroker(latency_s=0.5), main)


def test_latency_may_depend_on_the_size_and_keeps_the_order() -> None:
    async def main(bus: MemoryBus) -> None:
        reader = await bus.reader([("data", 0)], start="start")
        large = await bus.post("data", bytes(100_000))
        small = await bus.post("data", b"small")
        await small
        assert now() > 0.1  # it came behind the large one
        await large
        assert [len(record.value or b"") for record in await reader.fetch()] == [100_000, 5]

    virtually(MemoryBroker(latency_s=lambda size_bytes: size_bytes * 1e-6), main)


def test_timestamps_are_of_the_loop_or_of_the_clock_that_was_given() -> None:
    async def main(bus: MemoryBus) -> list[Record]:
        await asyncio.sleep(2.5)
        await bus.send("data", b"x")
        return await (await bus.reader([("data", 0)], start="start")).fetch()

    assert virtually(MemoryBroker(), main)[0].timestamp_ms == 2500
    assert virtually(MemoryBroker(wall_clock=lambda: 1_700_000_000.25), main)[0].timestamp_ms == 1_700_000_000_250


def test_a_busy_reader_and_a_busy_sender_let_others_in() -> None:
    async def main(bus: MemoryBus) -> None:
        await bus.create_topics([TopicSpec("others", 1)])
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        for _ in range(320):
            await bus.post("data", b"x")
        assert turns >= 9
        reader = await bus.reader([("data", 0)], start="start")
        turns = 0
        for _ in range(80):
            await reader.fetch(max_records=1)
        assert turns >= 9
        task.cancel()

    virtually(MemoryBroker(), main)


# --- retention -------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_by_what_is_not_consumed() -> None:
    broker = MemoryBroker(retention=Retention(consumed_bytes=100_000))

    async def main(bus: MemoryBus) -> None:
        reader = await bus.reader([("data", 0)], start="start")
        highest = 0
        for _ in range(500):
            for _ in range(4):
                await bus.post("data", bytes(5000))
            await reader.fetch()
            highest = max(highest, broker.bytes_held())
        assert highest < 100_000 * 9 // 8 + 4 * 6000  # an eighth of slack, and one burst

    virtually(broker, main)


def test_what_some_reader_or_group_still_needs_is_kept() -> None:
    broker = MemoryBroker(retention=Retention(consumed_bytes=0))

    async def main(bus: MemoryBus) -> None:
        slow = await bus.reader([("data", 0)], start="start")
        quick = await bus.reader([("data", 0)], start="start")
        member = await bus.join(["data"], group="g")
        for number in range(1000):
            await bus.post("data", b"%d" % number)
            await quick.fetch()
        assert len(await slow.fetch(max_records=1000)) == 1000
        await slow.close()
        records = await member.fetch(max_records=1000)
        assert [record.offset for record in records] == list(range(1000))  # nothing was committed yet
        await member.commit({("data", 0): 900})
        await bus.post("data", b"one more")
        again = await bus.reader([("data", 0)], start="start")
        assert again.position(("data", 0)) == 900

    virtually(broker, main)


def test_past_its_retention_even_unread_data_goes() -> None:
    async def main(bus: MemoryBus) -> None:
        await bus.create_topics([TopicSpec("small", 1, retention_bytes=50_000)])
        reader = await bus.reader([("small", 0)], start="start")
        for number in range(100):
            await bus.post("small", b"%04d" % number + bytes(996))
        records = await reader.fetch()
        assert 40 <= len(records) <= 60
        assert records[-1].offset == 99
        assert [record.offset for record in records] == list(range(100 - len(records), 100))

    virtually(MemoryBroker(), main)


@pytest.mark.parametrize(("keep_bytes", "kept"), [(None, range(2000, 2001)), (10_000, range(100, 300))])
def test_control_topics_keep_everything_unless_told_otherwise(keep_bytes: int | None, kept: range) -> None:
    async def main(bus: MemoryBus) -> None:
        reader = await bus.reader([("control", 0)], start="start")
        for _ in range(2000):
            await bus.post("control", b"{}", partition=0)
            await reader.fetch()
        everything = await bus.reader([("control", 0)], start="start")
        assert len(await everything.fetch(max_records=5000)) in kept

    virtually(MemoryBroker(retention=Retention(control_bytes=keep_bytes, consumed_bytes=0)), main)


def test_a_compacted_topic_does_not_grow() -> None:
    broker = MemoryBroker()

    async def main(bus: MemoryBus) -> None:
        await bus.create_topics([TopicSpec("nodes", 1, compacted=True)])
        for number in range(5000):
            await bus.post("nodes", b"%d" % number, key=f"node-{number % 7}")
        records = await (await bus.reader([("nodes", 0)], start="start")).fetch()
        latest = {record.key: record.value for record in records}
        assert latest == {f"node-{number % 7}": b"%d" % number for number in range(4993, 5000)}
        assert len(records) < 100

    virtually(broker, main)


# --- an outage -------------------------------------------------------------------------------------------------------


def test_posts_wait_for_a_broker_that_comes_back_and_stay_in_order() -> None:
    broker = MemoryBroker()

    async def main(bus: MemoryBus) -> None:
        reader = await bus.reader([("data", 0)], start="start")
        waiting = [await bus.post("data", b"0")]
        broker.pause()
        waiting += [await bus.post("data", b"%d" % number) for number in range(1, 5)]
        assert await reader.fetch(timeout_s=10.0) == []
        broker.resume()
        waiting.append(await bus.post("data", b"5"))
        assert await settle(waiting) == [0, 1, 2, 3, 4, 5]
        assert [record.value for record in await reader.fetch()] == [b"%d" % number for number in range(6)]

    virtually(broker, main)


def test_a_broker_that_stays_away_fails_what_waited_and_every_request() -> None:
    broker = MemoryBroker()

    async def main(bus: MemoryBus) -> None:
        member = await bus.join(["control"], group="g")
        await bus.send("control", b"x", partition=0)
        await member.fetch()
        broker.pause()
        begun = now()
        waiting = await bus.post("data", b"lost")
        with pytest.raises(BusUnavailableError):
            await waiting
        assert now() - begun == pytest.approx(30.0)
        for request in (
            bus.partitions("data"),
            bus.end_offsets("data"),
            bus.reader([("data", 0)], start="end"),
            member.commit({("control", 0): 1}),
            member.lag(),
        ):
            begun = now()
            with pytest.raises(BusUnavailableError):
                await request
            assert 3.0 <= now() - begun <= 4.0
        broker.resume()
        assert await bus.end_offsets("data") == {0: 0}
        assert (await bus.send("data", b"again")).offset == 0

    virtually(broker, main)


def test_a_full_send_buffer_makes_post_wait() -> None:
    broker = MemoryBroker()

    async def main(bus: MemoryBus) -> None:
        broker.pause()
        waiting = [await bus.post("data", bytes(1_000_000)) for _ in range(34)]
        post = asyncio.create_task(bus.post("data", b"next"))
        await asyncio.sleep(5.0)
        assert not post.done()
        broker.resume()
        waiting.append(await post)
        assert await settle(waiting) == list(range(35))

    virtually(broker, main)


def test_leaving_while_the_broker_is_away_ends_in_time() -> None:
    broker = MemoryBroker()

    async def main(bus: MemoryBus) -> None:
        other = MemoryBus(broker, "other")
        async with other:
            await other.join(["data"], group="g")
            broker.pause()
            waiting = await other.post("data", b"x")
        with pytest.raises(BusError, match="closed"):
            await waiting
        assert now() < 10.0

    virtually(broker, main)


# --- groups, where time matters --------------------------------------------------------------------------------------


def test_a_member_that_was_cut_off_loses_its_partitions_and_joins_again() -> None:
    broker = MemoryBroker(session_timeout_s=6.0)

    async def main(bus: MemoryBus) -> None:
        told: list[tuple[float, str, int]] = []

        def telling(what: str) -> Callable[[frozenset[TopicPartition]], Awaitable[None]]:
            async def tell(partitions: frozenset[TopicPartition]) -> None:
                told.append((now(), what, len(partitions)))

            return tell

        async with MemoryBus(broker, "far") as far:
            lonely = await far.join(["control"], group="g", on_assigned=telling("got"), on_revoked=telling("lost"))
            await asyncio.sleep(0)
            near = await bus.join(["control"], group="g")
            await asyncio.sleep(1.0)
            assert len(near.assignment()) == len(lonely.assignment()) == 1
            told.clear()
            far.disconnect()
            await asyncio.sleep(5.9)
            assert len(near.assignment()) == 1
            await asyncio.sleep(0.2)
            assert len(near.assignment()) == 2
            assert len(lonely.assignment()) == 1  # what it believes
            with pytest.raises(BusUnavailableError):
                await lonely.commit(dict.fromkeys(lonely.assignment(), 99))
            far.reconnect()
            await asyncio.sleep(1.0)
            assert len(near.assignment()) == len(lonely.assignment()) == 1
            assert [what for _, what, _ in told] == ["lost", "got"]
            assert broker.committed("g") == {}

    virtually(broker, main)


def test_a_short_cut_goes_unnoticed() -> None:
    broker = MemoryBroker(session_timeout_s=6.0)

    async def main(bus: MemoryBus) -> None:
        member = await bus.join(["control"], group="g")
        await asyncio.sleep(1.0)
        for _ in range(5):
            bus.disconnect()
            await asyncio.sleep(4.0)
            bus.reconnect()
            await asyncio.sleep(1.0)
        assert len(member.assignment()) == 2
        await member.commit({("control", 0): 0})
        assert broker.committed("g") == {("control", 0): 0}

    virtually(broker, main)


def test_a_killed_member_keeps_its_partitions_for_a_session() -> None:
    broker = MemoryBroker(session_timeout_s=6.0)

    async def main(bus: MemoryBus) -> None:
        doomed = MemoryBus(broker, "doomed")
        await doomed.__aenter__()
        await doomed.join(["control"], group="g")
        await asyncio.sleep(1.0)
        doomed.kill()
        heir = await bus.join(["control"], group="g")
        await asyncio.sleep(5.9)
        assert heir.assignment() == frozenset()
        await asyncio.sleep(0.2)
        assert len(heir.assignment()) == 2
        with pytest.raises(BusError):
            await doomed.send("data", b"x")

    virtually(broker, main)


def test_a_member_that_does_not_let_go_is_left_behind_and_comes_back() -> None:
    broker = MemoryBroker()

    async def main(bus: MemoryBus) -> None:
        async def stubborn(partitions: frozenset[TopicPartition]) -> None:
            await asyncio.sleep(25.0)

        first = await bus.join(["control"], group="g", on_revoked=stubborn)
        await asyncio.sleep(1.0)
        second = await bus.join(["control"], group="g")
        await asyncio.sleep(9.5)
        assert second.assignment() == frozenset()
        await asyncio.sleep(1.0)  # 10 s have passed
        assert len(second.assignment()) == 2
        await first.commit({("control", 0): 5})
        assert broker.committed("g") == {}
        await asyncio.sleep(20.0)
        assert len(first.assignment()) == len(second.assignment()) == 1

    virtually(broker, main)


def test_a_forced_rebalance_tells_everybody_and_repeats_what_was_not_committed() -> None:
    broker = MemoryBroker()

    async def main(bus: MemoryBus) -> None:
        told: list[str] = []

        async def assigned(partitions: frozenset[TopicPartition]) -> None:
            told.append("assigned")

        async def revoked(partitions: frozenset[TopicPartition]) -> None:
            told.append("revoked")

        member = await bus.join(["control"], group="g", on_assigned=assigned, on_revoked=revoked)
        for number in range(4):
            await bus.send("control", b"%d" % number, partition=0)
        assert len(await member.fetch()) == 4
        await member.commit({("control", 0): 1})
        broker.rebalance("g")
        assert [record.value for record in await member.fetch()] == [b"1", b"2", b"3"]
        assert told == ["assigned", "revoked", "assigned"]

    virtually(broker, main)

"""What a link is found to carry: only while more was to be sent, only where clearly less than granted, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import numpy as np
import pytest

from bus.memory.bus import MemoryBroker, MemoryBus
from bus.port import Headers, Position, RecordValue
from bus.topics import TopicSpec
from loadgen.sim.virtual_loop import run_virtual
from stages.measuring.throughput import HOLD_S, MAX_HOLD_S, LinkThroughput
from stages.network.frame_sender import Destination, FrameSender, Outgoing, SenderHooks, sending
from stages.network.shaper import Link

from .network.test_frame_sender import PLAN

MBIT = 1_000_000


class Played:
    """A link that carries at most `bps`, and a sender that is granted what the limit allows."""

    def __init__(self, bps: float, wanted_bps: int = 20 * MBIT) -> None:
        self.link = LinkThroughput()
        self.bps = bps
        self.wanted_bps = wanted_bps
        self.now = 100.0

    def send(self, seconds: float, *, granted_bps: int | None = None) -> int | None:
        """Send frames of 10 ms for a while; returns the limit after that."""
        until_s = self.now + seconds
        while self.now < until_s:
            granted = granted_bps or min(self.wanted_bps, self.link.limit_bps(self.now) or self.wanted_bps)
            bits = granted * 0.01
            begin_s, self.now = self.now, self.now + bits / min(granted, self.bps)
            self.link.carried(begin_s, self.now, bits, granted)
        return self.link.limit_bps(self.now)


def test_a_link_that_carries_its_grants_has_no_limit() -> None:
    assert Played(50 * MBIT).send(60.0) is None
    assert Played(17 * MBIT).send(60.0) is None  # 15 % less is not clearly less


def test_a_link_that_falls_to_a_third_is_recognised_within_a_second_of_link_time() -> None:
    played = Played(50 * MBIT)
    played.send(10.0)
    played.bps = 7 * MBIT
    assert played.send(1.0) == pytest.approx(7 * MBIT, rel=0.05)


def test_one_bad_window_is_no_limit() -> None:
    played = Played(50 * MBIT)
    for _ in range(20):
        played.send(2.0)
        played.bps = 5 * MBIT
        played.send(0.1)
        played.bps = 50 * MBIT
        assert played.link.limit_bps(played.now) is None


def test_a_link_that_recovers_loses_its_limit_in_steps() -> None:
    played = Played(7 * MBIT)
    played.send(2.0)
    played.bps = 50 * MBIT
    limits = [played.send(HOLD_S) for _ in range(6)]
    assert limits[-1] is None
    raised = [limit for limit in limits if limit is not None]
    assert raised == sorted(raised)


def test_a_link_that_does_not_recover_is_tried_ever_more_rarely() -> None:
    played = Played(7 * MBIT)
    played.send(2.0)
    above_s = [0.0, 0.0]
    for _ in range(7200):
        before = played.now
        limit = played.send(0.5)
        if limit is None or limit > 8 * MBIT:
            above_s[before > 3700.0] += played.now - before
    assert above_s[0] < 60.0
    assert above_s[1] < 12.0
    assert played.link.limit_bps(played.now) is not None


def test_a_task_with_an_older_grant_shows_that_the_link_carries_more() -> None:
    played = Played(7 * MBIT)
    played.send(2.0)
    played.bps = 50 * MBIT
    assert played.send(0.3, granted_bps=20 * MBIT) is None


def test_tasks_that_share_the_link_are_counted_together() -> None:
    link = LinkThroughput()
    for number in range(100):
        begin_s = 100.0 + 0.02 * number
        for _ in range(2):  # two tasks, granted 10 Mbit/s each; the link carries 6
            link.carried(begin_s, begin_s + 0.02, 0.02 * 3 * MBIT, 10 * MBIT)
    assert link.limit_bps(102.0) == pytest.approx(6 * MBIT, rel=0.02)


def test_a_limit_is_forgotten_when_nothing_was_sent_for_long() -> None:
    played = Played(7 * MBIT)
    assert played.send(2.0) is not None
    assert played.link.limit_bps(played.now + MAX_HOLD_S + 1) is None


class NarrowBus(MemoryBus):
    """A bus behind a real link: it takes every frame at once and acknowledges at the rate of the link."""

    def __init__(self, broker: MemoryBroker, bps: float) -> None:
        super().__init__(broker)
        self.bps = bps
        self._free_s = 0.0

    async def post(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[Position]:
        clock = asyncio.get_running_loop().time
        self._free_s = max(self._free_s, clock()) + len(value or b"") * 8 / self.bps
        due_s = self._free_s

        async def acknowledge() -> Position:
            await asyncio.sleep(due_s - clock())
            posted = await MemoryBus.post(self, topic, value, key=key, partition=partition, headers=headers)
            return await posted

        return asyncio.ensure_future(acknowledge())


@pytest.mark.parametrize(("link_bps", "expected"), [(10 * MBIT, None), (0.4 * MBIT, 0.4 * MBIT)])
@pytest.mark.parametrize("pause_s", [0.0, 2.0])
def test_a_sender_measures_a_real_link_by_its_acknowledgements(
    link_bps: float, expected: float | None, pause_s: float
) -> None:
    """Pauses between the samples do not count as link time."""

    async def run() -> int | None:
        found = LinkThroughput()
        clock = asyncio.get_running_loop().time
        async with NarrowBus(MemoryBroker(), link_bps) as bus:
            await bus.create_topics([TopicSpec("out", 1)])
            acknowledged: list[int] = []
            sender = FrameSender(
                bus,
                PLAN,
                Destination("link1", "out", "t", "activations", (Link().grant(MBIT),)),
                SenderHooks(
                    gate=lambda: asyncio.sleep(0),
                    on_busy=lambda begin_s, end_s: None,
                    on_acknowledged=acknowledged.extend,
                    throughput=found,
                ),
                source="d",
            )
            async with sending(sender):
                for sample in range(20):
                    sender.put(Outgoing(sample, [np.zeros(25_000, np.uint8)], clock()))
                    while len(acknowledged) <= sample:
                        await asyncio.sleep(0.01)
                    await asyncio.sleep(pause_s)
        return found.limit_bps(clock())

    assert run_virtual(run(), horizon_s=200.0) == (None if expected is None else pytest.approx(expected, rel=0.1))

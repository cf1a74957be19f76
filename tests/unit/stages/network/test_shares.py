"""A link with a trace carries exactly what the trace says, shared in proportion to the grants."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadgen.sim.virtual_loop import run_virtual
from stages.network.played import PlayedNetwork
from stages.network.shaper import Grant, Link, cross
from stages.network.shares import LinkShares, Share
from stages.network.trace import Trace, parse_trace, read_trace

RECORDED = sorted((Path(__file__).parents[3] / "data" / "traces").glob("*.csv"))


def rows_until(trace: Trace, end_s: float) -> Iterator[tuple[float, float]]:
    """(bps, seconds) of the repeated trace from 0 to `end_s`."""
    left_s = end_s
    for row in itertools.cycle(trace.rows):
        yield row.bps, min(left_s, row.duration_s)
        left_s -= row.duration_s
        if left_s <= 0:
            return


def carried_bits(trace: Trace, end_s: float, granted_bps: float = math.inf) -> float:
    """The integral of what the link carries of this grant."""
    return sum(min(bps, granted_bps) * seconds for bps, seconds in rows_until(trace, end_s))


def traced(trace: Trace) -> Link:
    return Link(network=PlayedNetwork(trace=trace))


async def send(
    grant: Grant, next_bytes: Callable[[], int], until_s: float, gap_s: float = 0.0
) -> list[tuple[float, int]]:
    """(when crossed, bytes so far) of frames that are all ready from the start, each asked for `gap_s` late."""
    clock, sent = asyncio.get_running_loop().time, 0
    crossed = []
    while clock() < until_s:
        size = next_bytes()
        crossed_s = await cross((grant,), size, 0.0)
        sent += size
        crossed.append((crossed_s, sent))
        await asyncio.sleep(gap_s)
    grant.rest()
    return crossed


STEPS = parse_trace("steps", ["t_s,bps", "0,800000", "2,80000", "5,0", "9,400000", "10,0"])


@pytest.mark.parametrize("granted_bps", [50_000, 300_000, 10_000_000])
@pytest.mark.parametrize("trace", [STEPS, *map(read_trace, RECORDED)], ids=lambda trace: trace.name[-12:])
def test_one_task_gets_the_lesser_of_its_grant_and_the_link(trace: Trace, granted_bps: int) -> None:
    """Each frame crosses when the integral has reached its end; the link's rate is not rounded, delayed or smoothed."""

    async def run() -> list[tuple[float, int]]:
        rng = random.Random(1)
        unit = granted_bps // 400  # 20 ms at the grant
        return await send(traced(trace).grant(granted_bps), lambda: unit * rng.randint(1, 5), 2.5 * trace.period_s)

    crossed = run_virtual(run())
    assert len(crossed) > 10
    for crossed_s, sent_bytes in crossed:
        assert 8 * sent_bytes == pytest.approx(carried_bits(trace, crossed_s, granted_bps), rel=1e-6)


@pytest.mark.parametrize("gap_s", [0.0, 0.0007])
def test_tasks_share_a_short_link_in_proportion_to_their_grants(gap_s: float) -> None:
    """Frames of other sizes, and senders that take time between two frames, change neither shares nor sum."""
    trace = parse_trace("short", ["t_s,bps", "0,400000", "3,100000", "4,0", "5,500000", "8,500000"])
    grants_bps = (300_000, 200_000, 100_000)

    async def run() -> list[list[tuple[float, int]]]:
        link, rng = traced(trace), random.Random(2)
        grants = [link.grant(bps) for bps in grants_bps]
        largest = (4_000, 500, 2_000)
        sizes = [lambda most=most: rng.randint(400, most) for most in largest]
        return await asyncio.gather(
            *(send(grant, size, 40.0, gap_s) for grant, size in zip(grants, sizes, strict=True))
        )

    sent = run_virtual(run())
    bits = [8 * max(sent_bytes for crossed_s, sent_bytes in one if crossed_s <= 40.0) for one in sent]
    assert sum(bits) == pytest.approx(carried_bits(trace, 40.0), rel=5e-3)
    assert sum(bits) <= carried_bits(trace, 40.0)
    assert [one / sum(bits) for one in bits] == pytest.approx([3 / 6, 2 / 6, 1 / 6], rel=5e-3)


def test_a_task_that_rests_leaves_its_share_to_the_others_at_once() -> None:
    """Two tasks get half of the link each; the frame that is crossing when the other ends speeds up at that moment."""
    trace = parse_trace("flat", ["t_s,bps", "0,80000", "100,80000"])

    async def run() -> float:
        link = traced(trace)
        short, long = link.grant(80_000), link.grant(80_000)

        async def first() -> None:
            await cross((short,), 1_000, 0.0)  # until 0.2 s at half of the link
            short.rest()

        other = asyncio.create_task(first())
        crossed_s = await cross((long,), 3_000, 0.0)  # 1 kB in these 0.2 s, the rest in another 0.2 s
        await other
        return crossed_s

    assert run_virtual(run()) == pytest.approx(0.4)


def test_idle_time_earns_no_credit() -> None:
    async def run() -> float:
        grant = traced(STEPS).grant(10_000_000)
        await asyncio.sleep(11.0)
        return await cross((grant,), 10_000, 11.0) - 11.0

    assert run_virtual(run()) == pytest.approx(0.1)


def test_a_stopped_link_costs_no_steps_of_the_loop() -> None:
    """An outage of a day is one sleep, and a trace of many rows does not wake the sender at every row."""
    reads = 0
    outage = parse_trace("outage", ["t_s,bps", "0,8000", "1,0", "86401,8000", "86402,8000"])
    rows = [f"{n / 1000},{n % 2}" for n in range(2000)]
    fine = parse_trace("fine", ["t_s,bps", *rows, "2,1"])

    async def run(trace: Trace, size_bits: int) -> float:
        loop = asyncio.get_running_loop()

        def clock() -> float:
            nonlocal reads
            reads += 1
            return loop.time()

        shares = LinkShares(trace, clock)
        return await shares.carry(Share(80_000), size_bits, 0.0)

    assert run_virtual(run(outage, 8_800)) == pytest.approx(86_401.1)
    assert reads < 10
    reads = 0
    assert run_virtual(run(fine, 40)) == pytest.approx(80.0, abs=0.01)
    assert reads < 40


def test_a_sender_that_is_cancelled_in_a_frame_leaves_its_share() -> None:
    trace = parse_trace("flat", ["t_s,bps", "0,80000", "100,80000"])

    async def run() -> float:
        link = traced(trace)
        stopped, other = link.grant(80_000), link.grant(80_000)
        task = asyncio.create_task(cross((stopped,), 100_000, 0.0))
        await asyncio.sleep(1.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stopped.rest()  # as `FrameSender.run` does when it ends
        return await cross((other,), 10_000, 1.0)

    assert run_virtual(run()) == pytest.approx(2.0)


def test_results_cross_a_traced_link_and_then_a_constant_one_as_a_pipeline() -> None:
    trace = parse_trace("flat", ["t_s,bps", "0,80000", "100,80000"])

    async def run() -> float:
        grants = (traced(trace).grant(10_000_000), Link().grant(40_000))
        for _ in range(10):
            crossed_s = await cross(grants, 1_000, 0.0)
        return crossed_s

    # The second link is the bottleneck, 0.2 s a frame, after 0.1 s on the first.
    assert run_virtual(run()) == pytest.approx(2.1, abs=0.01)

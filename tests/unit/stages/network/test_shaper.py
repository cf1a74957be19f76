"""Links are held to their grants: on average exactly, in no second more."""

from __future__ import annotations

import asyncio
import random

import pytest

from loadgen.sim.virtual_loop import run_virtual
from stages.network.shaper import Grant, Link, cross, frame_bytes

HEAD_BYTES = 160  # what `frame_bytes` takes it for


async def _send(grants: tuple[Grant, ...], sizes: list[int], gap_s: float = 0.0) -> list[tuple[float, int]]:
    clock = asyncio.get_running_loop().time
    sent = []
    for size in sizes:
        await asyncio.sleep(gap_s)
        sent.append((await cross(grants, size, clock()), size))
    return sent


def worst_second_bps(sent: list[tuple[float, int]]) -> float:
    return max(sum(8 * size for at, size in sent if begin < at <= begin + 1.0) for begin, _ in sent)


@pytest.mark.parametrize("rate_bps", [1_000_000, 20_000_000, 1_000_000_000])
def test_the_rate_is_the_grant(rate_bps: int) -> None:
    size = frame_bytes(rate_bps, 1_000_000, 1_000_000) + HEAD_BYTES
    count = int(5 * rate_bps / (8 * size))
    sent = run_virtual(_send((Link().grant(rate_bps),), [size] * count))
    assert 8 * size * count / sent[-1][0] == pytest.approx(rate_bps, rel=5e-3)
    assert worst_second_bps(sent) <= rate_bps * (1 + 1e-9)


def test_idle_time_earns_no_credit() -> None:
    async def run() -> float:
        grant = Link().grant(8_000)
        await asyncio.sleep(100.0)
        begin_s = asyncio.get_running_loop().time()
        await cross((grant,), 1000, begin_s)
        return asyncio.get_running_loop().time() - begin_s

    assert run_virtual(run()) == pytest.approx(1.0)


def test_late_callers_catch_up_but_never_over_the_rate_in_a_second() -> None:
    """Bytes that were ready long ago, asked for late: deadlines lie in the past, the guard still holds the second."""

    async def run() -> list[tuple[float, int]]:
        grant = Link().grant(8_000)
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(0.9)
        return [(await cross((grant,), 100, 0.0), 100) and (clock(), 100) for _ in range(30)]

    sent = run_virtual(run())
    assert worst_second_bps(sent) <= 8_000
    assert sent[-1][0] == pytest.approx(3.0, abs=0.9)


def test_two_links_in_a_row_are_a_pipeline() -> None:
    async def run() -> float:
        grants = (Link().grant(8_000), Link().grant(4_000))
        for _ in range(10):
            await cross(grants, 100, 0.0)
        return asyncio.get_running_loop().time()

    # the slower link is the bottleneck: 10 x 0.2 s, after the first has crossed the faster one in 0.1 s
    # (and a guard's clock margin of two milliseconds a second)
    assert run_virtual(run()) == pytest.approx(2.1, abs=0.005)


def test_the_link_holds_its_capacity_whatever_was_granted() -> None:
    async def run() -> list[tuple[float, int]]:
        link = Link(80_000)
        rng = random.Random(1)
        grants = [link.grant(60_000) for _ in range(3)]
        parts = await asyncio.gather(*(_send((grant,), [rng.randint(100, 900) for _ in range(40)]) for grant in grants))
        return sorted(entry for part in parts for entry in part)

    assert worst_second_bps(run_virtual(run())) <= 80_000


def test_a_grant_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a grant needs a positive rate"):
        Link().grant(0)


@pytest.mark.parametrize(
    ("rate_bps", "sample_bytes", "size"),
    [
        (1_000, 3, 4095),  # so slow that heads count more than time
        (60_000_000, 150_000, 37_500),  # 199 of 199.1 frames fit a second
        (16_000_000, 4_000, 32_000),  # eight samples share a frame
        (1 << 40, 4_000, 952_000),  # not held back: the largest
        (1 << 40, 10_000_000, 909_091),
        (8_000_000, 0, 19_820),
    ],
)
def test_a_frame_is_cut_so_that_little_of_a_second_is_left_over(rate_bps: int, sample_bytes: int, size: int) -> None:
    assert frame_bytes(rate_bps, sample_bytes, 954_000) == size


@pytest.mark.parametrize("rate_bps", [1_000_000, 5_000_000, 18_000_000, 100_000_000, 1_000_000_000])
@pytest.mark.parametrize("sample_bytes", [40, 1_000, 4_704, 150_000, 3_000_000])
def test_heads_and_left_overs_cost_little(rate_bps: int, sample_bytes: int) -> None:
    frame = frame_bytes(rate_bps, sample_bytes, 954_000) + HEAD_BYTES
    second = rate_bps / 8
    goodput = int(second / frame) * (frame - HEAD_BYTES) / second
    assert goodput > (0.92 if rate_bps < 5_000_000 else 0.97)
    assert frame * 8 / rate_bps <= 0.035

"""The places of a window, and the samples without a result."""

from __future__ import annotations

import asyncio

from loadgen.sim.virtual_loop import run_virtual
from stages.window import MissingResults, Window


def test_a_sample_waits_until_a_result_frees_a_place() -> None:
    async def run() -> tuple[float, float, float]:
        window = Window()
        window.open(1)
        first_s = await window.take()
        asyncio.get_running_loop().call_later(2.0, window.give)
        second_s = await window.take()
        return first_s, second_s, asyncio.get_running_loop().time()

    first_s, second_s, now_s = run_virtual(run())
    assert second_s == now_s == first_s + 2.0


def test_the_time_of_a_place_is_when_it_became_free_not_when_it_was_taken() -> None:
    async def run() -> list[float]:
        window = Window()
        window.open(2)
        await asyncio.sleep(3.0)
        window.give()
        return [await window.take() for _ in range(3)]

    assert run_virtual(run()) == [0.0, 0.0, 3.0]


def test_a_closed_window_has_no_place_and_wakes_for_a_failure() -> None:
    async def run() -> float:
        window = Window()
        asyncio.get_running_loop().call_later(1.0, window.wake)
        await window.take()
        return asyncio.get_running_loop().time()

    assert run_virtual(run()) == 1.0


def test_a_result_counts_once() -> None:
    missing = MissingResults([3, 4])
    assert missing.remove(3)
    assert not missing.remove(3)
    assert not missing.remove(7)
    assert len(missing) == 1

"""The places of a window, and the samples without a result."""

from __future__ import annotations

import asyncio

import pytest

from bus.frames import AttemptPlan
from bus.messages import Placed, PlacedOverhead
from bus.routes.windows import MAX_WINDOW, window_samples
from bus.values import Execution, Kind, Objective, Parts, Placement
from loadgen.sim.virtual_loop import run_virtual
from stages.window import IN_FLIGHT_BYTES, MissingResults, Window, window_of


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


def plan(latency_s: float, execution: Execution = Execution.STREAMING, input_bytes: int | None = None) -> AttemptPlan:
    """A task of 100 samples whose slowest station takes 10 ms a sample, cut at the input and after layer 1."""
    placement = Placement(
        kind=Kind.EDGE_CLOUD, edge="e", cut1=0, cut2=1, cut1_name="input", cut2_name="a", link1_bps=1, link2_bps=1
    )
    placed = Placed(
        task_id="t", attempt=1, device="d", model="m", sha256="0" * 64, samples=100, policy="p",
        objective=Objective.PIPELINED, execution=execution, placement=placement, start_s=0.0, wait_s=0.0, delay_s=9.0,
        parts=Parts(link1_s=1.0, edge_s=0.2), overhead=PlacedOverhead(latency_s=latency_s) if latency_s else None,
    )  # fmt: skip
    return AttemptPlan.of(placed, region=0, todo=100, input_bytes=input_bytes)


@pytest.mark.parametrize(("latency_s", "more"), [(0.0, 0), (0.001, 1), (0.12, 12), (0.125, 13), (60.0, 100)])
def test_the_window_has_room_for_the_samples_in_flight(latency_s: float, more: int) -> None:
    sizes = (100_000, 50_000, 3_000_000, 40)
    assert window_of(plan(latency_s), sizes) == window_samples(Execution.STREAMING, sizes) + more
    assert window_of(plan(latency_s, Execution.SEQUENTIAL), sizes) == 1


def test_samples_in_flight_have_a_limit_of_bytes_where_they_are_cut() -> None:
    big = IN_FLIGHT_BYTES // 10
    assert window_of(plan(1.0), (big, 1, 40)) - window_samples(Execution.STREAMING, (big, 1, 40)) == 10
    assert window_of(plan(1.0, input_bytes=1), (big, 1, 40)) - window_samples(Execution.STREAMING, (big, 1, 40)) == 100
    assert window_of(plan(1.0), (1, 1, 1)) == MAX_WINDOW

"""A batcher computes what waits together, and each sample gets its own result, or its own error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from structlog.testing import capture_logs

from bus.errors import InvariantError
from loadgen.sim.virtual_loop import run_virtual
from stages.batches import Batcher, Computed

BATCH_S = 1.0  # of any number of samples


class Machine:
    """Doubles numbers, a batch a second; negative numbers fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.at_once = self.most_at_once = 0

    async def compute(self, items: Sequence[int]) -> tuple[list[int], float]:
        self.batches.append(list(items))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(BATCH_S)
        self.at_once -= 1
        if any(item < 0 for item in items):
            raise ValueError("negative")
        return [2 * item for item in items], BATCH_S


def test_a_sample_alone_is_computed_at_once() -> None:
    async def run() -> None:
        machine = Machine()
        begin_s = asyncio.get_running_loop().time()
        assert (await Batcher(machine.compute).submit(3)) == Computed(6, BATCH_S, 1)
        assert asyncio.get_running_loop().time() - begin_s == BATCH_S

    run_virtual(run())


def test_samples_collect_while_the_executor_is_busy_and_share_the_time_of_their_batch() -> None:
    async def run() -> None:
        machine = Machine()
        batcher = Batcher(machine.compute)
        first = batcher.submit(0)
        await asyncio.sleep(0.5)
        rest = [batcher.submit(number) for number in range(1, 5)]
        assert batcher.waiting == 4
        assert await asyncio.gather(first, *rest) == [
            Computed(0, 1.0, 1),
            *(Computed(2 * number, 0.25, 4) for number in range(1, 5)),
        ]
        assert machine.batches == [[0], [1, 2, 3, 4]]

    run_virtual(run())


def test_a_batch_has_at_most_so_many_samples_in_their_order() -> None:
    async def run() -> None:
        machine = Machine()
        batcher = Batcher(machine.compute, most=3)
        await asyncio.gather(*(batcher.submit(number) for number in range(8)))
        assert machine.batches == [[0, 1, 2], [3, 4, 5], [6, 7]]

    run_virtual(run())


def test_idle_executors_share_what_waits() -> None:
    async def run() -> None:
        machine = Machine()
        sizes: list[int] = []
        batcher = Batcher(machine.compute, executors=2, on_batch=sizes.append)
        results = await asyncio.gather(*(batcher.submit(number) for number in range(10)))
        assert [one.result for one in results] == [2 * number for number in range(10)]
        assert machine.batches == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        assert sizes == [5, 5]
        assert machine.most_at_once == 2

    run_virtual(run())


def test_a_bad_sample_fails_alone() -> None:
    async def run() -> None:
        batcher = Batcher(Machine().compute)
        good, bad, other = (batcher.submit(number) for number in (1, -1, 2))
        with pytest.raises(ValueError, match="negative"):
            await bad
        assert [(await one).result for one in (good, other)] == [2, 4]
        assert (await batcher.submit(5)).result == 10  # and the batcher goes on

    run_virtual(run())


def test_batches_of_good_samples_that_fail_are_not_tried_again() -> None:
    async def run() -> None:
        sizes: list[int] = []

        async def compute(items: Sequence[int]) -> tuple[list[int], float]:
            sizes.append(len(items))
            if len(items) > 1:
                raise ValueError("no batches")
            return list(items), BATCH_S

        batcher = Batcher(compute)
        with capture_logs() as logged:
            for _ in range(2):
                found = await asyncio.gather(*(batcher.submit(number) for number in range(3)))
                assert [one.result for one in found] == [0, 1, 2]
        assert [entry["error"] for entry in logged] == ["no batches"]
        assert sizes == [3, 1, 1, 1, 1, 1, 1]
        assert batcher.most == 1

    run_virtual(run())


def test_a_bad_sample_does_not_end_batches() -> None:
    async def run() -> None:
        machine = Machine()
        batcher = Batcher(machine.compute)
        await asyncio.gather(*(batcher.submit(number) for number in (1, -1)), return_exceptions=True)
        await asyncio.gather(*(batcher.submit(number) for number in (1, 2)))
        assert machine.batches[-1] == [1, 2]

    run_virtual(run())


def test_a_cancelled_batch_cancels_what_waits() -> None:
    """As when the event loop closes: nothing may be computed afterwards."""

    async def run() -> None:
        machine = Machine()
        batcher = Batcher(machine.compute, most=1)
        first, second = batcher.submit(1), batcher.submit(2)
        await asyncio.sleep(0.5)
        (running,) = (task for task in asyncio.all_tasks() if task is not asyncio.current_task())
        running.cancel()
        await asyncio.wait((first, second))
        assert first.cancelled()
        assert second.cancelled()
        assert machine.batches == [[1]]

    run_virtual(run())


def test_a_dropped_sample_is_not_computed_and_does_not_delay_the_others() -> None:
    async def run() -> None:
        machine = Machine()
        batcher = Batcher(machine.compute)
        first = batcher.submit(0)
        await asyncio.sleep(0.5)
        dropped, kept = batcher.submit(1), batcher.submit(2)
        dropped.cancel()
        first.cancel()  # in the middle of its batch
        assert (await kept).result == 4
        assert machine.batches == [[0], [2]]

    run_virtual(run())


def test_a_missing_result_is_a_bug_that_every_sample_reports() -> None:
    async def compute(items: Sequence[int]) -> tuple[list[int], float]:
        return list(items[1:]), BATCH_S

    async def run() -> None:
        batcher = Batcher(compute)
        found = await asyncio.gather(*(batcher.submit(number) for number in range(3)), return_exceptions=True)
        assert [type(one) for one in found] == [InvariantError] * 3

    run_virtual(run())


def test_new_limits_hold_for_the_next_batches() -> None:
    async def run() -> None:
        machine = Machine()
        batcher = Batcher(machine.compute, most=1, executors=3)
        jobs = [batcher.submit(number) for number in range(8)]
        await asyncio.sleep(0.5)
        assert machine.batches == [[0], [1], [2]]
        batcher.limit(4, 1)
        await asyncio.gather(*jobs)
        assert machine.batches[3:] == [[3, 4, 5, 6], [7]]

    run_virtual(run())

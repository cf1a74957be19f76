"""Batches: samples that wait for the same work are computed together.

An idle executor takes all samples that wait, so nothing is delayed while the machine is idle; while all executors are busy,
samples collect. This module knows neither models nor runtimes: `compute` does the work.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from math import ceil
from typing import Generic, NamedTuple, TypeVar

import structlog

from bus.errors import InvariantError
from bus.values import MAX_BATCH

log = structlog.get_logger("batches")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Computed(NamedTuple, Generic[Result]):
    """The result of one sample of a batch."""

    result: Result
    busy_s: float  # its share of the time of its batch
    batch: int  # samples in its batch


class _Waiting(NamedTuple, Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Computed[Result]]


class Batcher(Generic[Item, Result]):
    """Collects samples, of any tasks, and computes them in batches, in the order in which they were submitted."""

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Awaitable[tuple[Sequence[Result], float]]],
        *,
        most: int = MAX_BATCH,
        executors: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        """`compute` returns a result for each item, and the seconds that computing took.

        `most`: the largest batch. `executors`: how many batches may be computed at the same time. `on_batch` receives the
        size of each batch.
        """
        self._compute, self._on_batch = compute, on_batch
        self._most, self._executors = most, executors
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._running: set[asyncio.Task[None]] = set()  # one task for each busy executor
        self._starting = False  # whether batches are formed later in this turn of the event loop

    @property
    def most(self) -> int:
        """The largest batch."""
        return self._most

    def limit(self, most: int, executors: int) -> None:
        """Change the limits, for batches that are not formed yet."""
        self._most, self._executors = most, executors

    @property
    def waiting(self) -> int:
        """Samples that are not in a batch yet."""
        return len(self._queue)

    def submit(self, item: Item) -> asyncio.Future[Computed[Result]]:
        """Compute an item, together with others that wait; cancel the future to drop an item that still waits.

        The future raises what `compute` raises for a batch of this item alone.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Computed[Result]] = loop.create_future()
        self._queue.append(_Waiting(item, future))
        if not self._starting and len(self._running) < self._executors:
            self._starting = True
            loop.call_soon(self._start)  # after the other items of this turn have been submitted
        return future

    def _start(self) -> None:
        """Give idle executors equal shares of what waits."""
        self._starting = False
        while (idle := self._executors - len(self._running)) > 0:
            batch = self._take(idle)
            if not batch:
                return
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _take(self, idle: int) -> list[_Waiting[Item, Result]]:
        wanted = [one for one in self._queue if not one.future.done()]
        batch = wanted[: min(self._most, ceil(len(wanted) / idle))]
        self._queue = deque(wanted[len(batch) :])
        return batch

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled():  # the event loop or the runner is closing
            for one in self._queue:
                one.future.cancel()
        self._start()

    async def _run(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        if self._on_batch is not None:
            self._on_batch(len(batch))
        try:
            await self._settle(batch)
        finally:
            for one in batch:
                one.future.cancel()  # no effect on those that are done; else the event loop is closing

    async def _settle(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        try:
            results, busy_s = await self._compute([one.item for one in batch])
            if len(results) != len(batch):
                raise InvariantError(f"a batch of {len(batch)} samples has {len(results)} results")
        except Exception as error:
            if len(batch) == 1 or isinstance(error, InvariantError):
                for one in batch:
                    _fail(one.future, error)
                return
            wanted = [one for one in batch if not one.future.done()]
            for one in wanted:  # one by one, so that a bad sample fails alone
                if not one.future.done():
                    await self._settle([one])
            if len(wanted) == len(batch) and all(_succeeded(one.future) for one in batch):
                # The samples are good: batches fail, for example because another task cut the model elsewhere meanwhile.
                log.warning("batch failed, its samples did not: computing one by one", error=str(error))
                self._most = 1
            return
        for one, result in zip(batch, results, strict=True):
            if not one.future.done():  # else its task has ended
                one.future.set_result(Computed(result, busy_s / len(batch), len(batch)))


def _fail(future: asyncio.Future[Computed[Result]], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _succeeded(future: asyncio.Future[Computed[Result]]) -> bool:
    return not future.cancelled() and future.exception() is None

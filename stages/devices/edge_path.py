"""The way of an attempt's samples to its edge: the results that come back through it, the frame sender, the stall watch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Protocol

from bus import topics
from bus.errors import BusError, DeeparError
from bus.frames import AttemptPlan
from bus.messages import TaskCompleted, TaskSubmitted
from bus.tensors import Array
from stages.measuring.clock import exact_clock
from stages.measuring.throughput import LinkThroughput
from stages.network.frame_sender import Destination, FrameSender, SenderHooks, sending
from stages.network.shaper import Link
from stages.node import RETRY_S, Node


class StalledError(DeeparError):
    """The attempt sent no sample and received no result for longer than its time limit (`patience_s`)."""


class DeviceWork(Protocol):
    """What an attempt uses of its device."""

    node: Node
    link1: Link

    def throughput(self, edge: str) -> LinkThroughput:
        """What link 1 carries to an edge."""

    async def subscribe(self, edge: str) -> None:
        """Read the results that come back through `edge`. Raises `BusError`."""

    def open_input(self, task: TaskSubmitted) -> Callable[[int], list[Array]]:
        """A function from sample number to input tensors. Raises `UnknownNameError`, `ConfigError`."""

    async def complete(self, completed: TaskCompleted) -> None:
        """Report a task with all its results to the application and the planner."""

    async def fail(self, plan: AttemptPlan, cause: str, detail: str, *, retryable: bool = False) -> None:
        """Report to the planner that the attempt failed."""


async def stopped(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; unlike `await task`, this ends with the caller where that is cancelled."""
    task.cancel()
    await asyncio.wait((task,))


class EdgePath:
    """Sends the samples of one attempt; `missing` says how many results it waits for, `abort` ends it."""

    def __init__(
        self,
        device: DeviceWork,
        plan: AttemptPlan,
        *,
        patience_s: float,
        missing: Callable[[], int],
        abort: Callable[[Exception], None],
    ) -> None:
        self._device, self._plan = device, plan
        self._patience_s, self._missing, self._abort = patience_s, missing, abort
        self._failure: Exception | None = None
        self._progress_s = asyncio.get_running_loop().time()  # last time a sample was sent or a result arrived

    def progress(self, at_s: float | None = None) -> None:
        """A sample was sent or a result arrived."""
        self._progress_s = exact_clock()() if at_s is None else at_s

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[FrameSender]:
        """A running frame sender, once the results can be read. Raises `StalledError` where that takes too long."""
        edge = self._plan.placement.edge
        assert edge is not None
        sender = self._frame_sender(edge)
        try:
            async with self._watched():
                await self._subscribe(edge)
                async with sending(sender):
                    yield sender
        finally:
            span = (sender.began_s, sender.busy_until_s, sender.busy_s)
            self._device.node.spans.record("link1", self._plan, *span)

    @contextlib.asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        self.progress()
        watch = asyncio.create_task(
            self._watch(), name=f"{self._device.node.settings.name}: watch {self._plan.task_id}"
        )
        try:
            yield
        finally:
            await stopped(watch)

    async def _watch(self) -> None:
        """Abort the attempt when it makes no progress for longer than `patience_s`, while it waits for results."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._patience_s / 4)
            if not self._device.node.lease.alive or not self._missing():
                self._progress_s = clock()  # while the bus is away, missing results are expected
            elif clock() - self._progress_s > self._patience_s:
                self._failure = StalledError(f"{self._missing()} samples without a result for {self._patience_s:.0f} s")
                self._abort(self._failure)
                return

    async def _subscribe(self, edge: str) -> None:
        """Subscribe to the results that come through `edge`; retry until that succeeds."""
        while True:
            try:
                await self._device.subscribe(edge)
                return
            except BusError as error:
                self._device.node.log.warning("results not read; retrying", edge=edge, error=str(error))
                await asyncio.sleep(RETRY_S)
            if self._failure:
                raise self._failure

    def _frame_sender(self, edge: str) -> FrameSender:
        node, plan = self._device.node, self._plan
        grants = (self._device.link1.grant(plan.placement.link1_bps),)
        return node.components.frame_sender(
            node.bus,
            plan,
            Destination("link1", topics.activations_topic(edge), plan.task_id, "activations", grants),
            SenderHooks(
                gate=node.lease.gate,
                on_busy=partial(node.busy, "link1_s", plan.task_id),
                on_acknowledged=lambda samples: self.progress(),
                throughput=self._device.throughput(edge),
            ),
            source=node.settings.name,
            headers=node.spans.header("link1", plan),
        )

"""Stopping aiokafka's clients while the broker is unavailable: cancellations inside aiokafka do not reach the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bus.kafka.readers import stop_consumer
from bus.kafka.sender import stop_producer
from loadgen.sim.virtual_loop import run_virtual


class Stuck:
    """An AIOKafkaConsumer or AIOKafkaProducer whose `stop` raises `ending`, or never returns if that is None."""

    def __init__(self, ending: BaseException | None) -> None:
        self._coordinator = None
        self._fetcher = None
        self._client = self.client = SimpleNamespace(close=self._close)
        self._sender = SimpleNamespace(sender_task=None)
        self._message_accumulator = SimpleNamespace(_pending_batches=set(), _batches={}, fail_all=lambda error: None)
        self._ending = ending
        self._closed_future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cut_off = False

    async def stop(self) -> None:
        if self._ending is not None:
            raise self._ending
        await asyncio.gather(self._closed_future)  # as in aiokafka's client: cancelling this wait cancels the future

    async def _close(self) -> None:
        self.cut_off = True
        await asyncio.gather(self._closed_future)


@pytest.mark.parametrize("stop", [stop_consumer, stop_producer])
@pytest.mark.parametrize("ending", [asyncio.CancelledError(), OSError("gone"), None])
def test_a_stop_that_is_cancelled_inside_does_not_cancel_the_caller(
    stop: Callable[[Any], Awaitable[None]], ending: BaseException | None
) -> None:
    """Observed after a long broker outage, and with TLS on uvloop, where a connection sometimes closes late: the service
    ended as if it had been asked to stop.
    """

    async def main() -> tuple[bool, int]:
        one = Stuck(ending)
        await stop(one)
        task = asyncio.current_task()
        assert task is not None
        return one.cut_off, task.cancelling()

    assert run_virtual(main()) == (True, 0)

"""Closing a reader while the broker is away: aiokafka's own cancellations stay inside."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from bus.kafka_readers import _finish


class Stuck:
    """What is asked of an AIOKafkaConsumer here, with a `stop` that ends as it is told to."""

    def __init__(self, ending: BaseException) -> None:
        self._coordinator = None
        self._fetcher = None
        self._client = SimpleNamespace(close=self._close)
        self._ending = ending
        self.cut_off = False

    async def stop(self) -> None:
        raise self._ending

    async def _close(self) -> None:
        self.cut_off = True


@pytest.mark.parametrize("ending", [asyncio.CancelledError(), OSError("gone")])
async def test_a_stop_that_is_cancelled_inside_does_not_cancel_us(ending: BaseException) -> None:
    """Seen when a broker was away for long: the planner ended as if somebody had asked it to."""
    consumer: Any = Stuck(ending)
    await _finish(consumer)
    assert consumer.cut_off

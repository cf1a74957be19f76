"""Closing what aiokafka opened, while the broker is away or slow to say goodbye: its own cancellations stay inside."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from bus.kafka import connection, readers, sender


class Stuck:
    """What is asked of an AIOKafkaConsumer or -Producer here, with a `stop` that ends as it is told to, or never."""

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
        await asyncio.gather(self._closed_future)  # as aiokafka's client does: who ends this wait cancels the future

    async def _close(self) -> None:
        self.cut_off = True
        await asyncio.gather(self._closed_future)


@pytest.mark.parametrize("module", [readers, sender])
@pytest.mark.parametrize("ending", [asyncio.CancelledError(), OSError("gone"), None])
async def test_a_stop_that_is_cancelled_inside_does_not_cancel_us(
    module: Any, ending: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen when a broker was away for long, and on TLS with uvloop, where a connection now and then closes late: the service
    ended as if somebody had asked it to.
    """
    for where, name in ((readers, "_CLOSE_S"), (sender, "_SETTLE_S"), (connection, "HANG_UP_S")):
        monkeypatch.setattr(where, name, 0.01)
    one: Any = Stuck(ending)
    await module._finish(one)
    assert one.cut_off
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0

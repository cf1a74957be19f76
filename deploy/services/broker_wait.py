"""Retry while the broker is unavailable at the start of a service, limited by `DEEPAR_BROKER_PATIENCE`.

If a supervisor starts all services at once, waiting is cheaper than exiting and being restarted. Once a service has started,
it waits for its broker without a limit.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from bus.errors import BusUnavailableError
from bus.text.units import parse_duration

BROKER_RETRY_S = 1.0

log = structlog.get_logger("deepar")
T = TypeVar("T")


class Patience:
    """The time limit for all start-up steps of one service."""

    def __init__(self, patience_s: float) -> None:
        self._clock = asyncio.get_running_loop().time
        self._deadline_s = self._clock() + patience_s

    @classmethod
    def from_env(cls) -> Patience:
        """Read `DEEPAR_BROKER_PATIENCE`, default 0 s. Raises `ConfigError`."""
        return cls(parse_duration(os.environ.get("DEEPAR_BROKER_PATIENCE", "0s"), "DEEPAR_BROKER_PATIENCE"))

    async def through(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Retry `attempt` while the broker is unavailable; after the limit, raise its last error."""
        while True:
            try:
                return await attempt()
            except BusUnavailableError as error:
                if self._clock() >= self._deadline_s:
                    raise
                log.warning("waiting for the broker", error=str(error))
                await asyncio.sleep(BROKER_RETRY_S)

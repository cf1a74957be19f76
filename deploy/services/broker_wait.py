"""Waiting for a broker that is away while a service starts, for as long as `DEEPAR_BROKER_PATIENCE` says.

Where a supervisor starts everything at once, to wait costs less than to end and be started again. A service that serves
waits for its broker without end; this is about the time before.
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
    """One service's, over everything that it does to start."""

    def __init__(self, patience_s: float) -> None:
        self._clock = asyncio.get_running_loop().time
        self._deadline_s = self._clock() + patience_s

    @classmethod
    def from_env(cls) -> Patience:
        """As the environment says; by default none at all. Raises `ConfigError`."""
        return cls(parse_duration(os.environ.get("DEEPAR_BROKER_PATIENCE", "0s"), "DEEPAR_BROKER_PATIENCE"))

    async def through(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What the first attempt gives that finds a broker. Raises what the last one raised."""
        while True:
            try:
                return await attempt()
            except BusUnavailableError as error:
                if self._clock() >= self._deadline_s:
                    raise
                log.warning("waiting for the broker", error=str(error))
                await asyncio.sleep(BROKER_RETRY_S)

"""The worker threads of a runner."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

WORKERS = 4 * max(2, os.cpu_count() or 1)
"""More threads than cores, so that a small inference does not queue behind a large one: the system shares the cores."""


class Workers:
    """Worker threads, and how long samples wait while all of them are busy."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._jobs = 0  # samples that are computed or wait for a thread

    async def run(self, work: Callable[[], T]) -> tuple[T, float]:
        """What `work` returns, and the seconds that the sample waited because every thread was busy."""
        crowded = self._jobs >= WORKERS
        asked_s = time.monotonic()

        def timed() -> tuple[float, T]:
            return time.monotonic(), work()

        self._jobs += 1
        try:
            begin_s, outputs = await asyncio.get_running_loop().run_in_executor(self._pool, timed)
        finally:
            self._jobs -= 1
        return outputs, begin_s - asked_s if crowded else 0.0  # else it is the time to wake a thread

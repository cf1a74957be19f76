"""The clock with which a stage measures durations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def exact_clock() -> Callable[[], float]:
    """The running loop's clock; on uvloop the system's monotonic clock, which has the same zero.

    uvloop's own clock advances once per loop iteration, in whole milliseconds, which is too coarse for parts of a delay.
    """
    loop = asyncio.get_running_loop()
    return time.monotonic if type(loop).__module__ == "uvloop" else loop.time

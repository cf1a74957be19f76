"""The name of the running event loop, for logs and probes."""

from __future__ import annotations

import asyncio


def loop_name() -> str:
    """Name of the running event loop's package, e.g. `uvloop`."""
    return type(asyncio.get_running_loop()).__module__.split(".", 1)[0]

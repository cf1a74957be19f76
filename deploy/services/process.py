"""The process around a service: event loop, signals, exit codes, start and stop logging."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from deploy.services.telemetry.event_loop import loop_name

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_MISSED, EXIT_INTERRUPTED = 0, 1, 2, 99, 105

T = TypeVar("T")


def run_on_uvloop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop; Ctrl-C raises KeyboardInterrupt."""
    try:
        import uvloop  # imported here: users of the exit codes do not need it

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    finally:
        main.close()  # avoids a "never awaited" warning if it was interrupted before its start


async def until_stopped(
    serve: Coroutine[Any, Any, None],
    *,
    drain: Callable[[], Coroutine[Any, Any, None]] | None = None,
    drain_s: float = 8.0,
    **who: Any,
) -> bool:
    """Run a service until it ends or SIGTERM or SIGINT arrives.

    On a signal, `drain` may finish tasks under way for at most `drain_s`; then the service is cancelled. A second signal
    ends the draining. Returns whether a signal ended it; raises what the service raises.
    """
    import structlog

    log = structlog.get_logger("deepar").bind(**who)
    log.info("starting", loop=loop_name())
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def asked(number: int) -> None:
        (hurry if stop.is_set() else stop).set()
        log.info("stop requested", signal=signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)
    serving = asyncio.create_task(serve, name="service")
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            return False
        if drain is not None:
            draining = asyncio.create_task(drain())
            hurrying = asyncio.create_task(hurry.wait())
            await asyncio.wait({serving, draining, hurrying}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
            for task in (draining, hurrying):
                task.cancel()
        return True
    finally:
        stopping.cancel()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        log.info("stopped")

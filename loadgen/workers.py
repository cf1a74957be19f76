"""Worker processes that end with their parent: on Ctrl-C, on an error, and when the parent is killed.

The terminal sends Ctrl-C to every foreground process. Workers start with SIGINT blocked, so only the parent receives it and
ends them. They are spawned, not forked, because the progress display has threads and a fork of a process with threads may
hang.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import InvalidStateError, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType

import structlog

PR_SET_PDEATHSIG = 1
"""Linux, `prctl`: the signal that a process receives when the thread that started it ends."""


class Worker(SpawnProcess):
    """A process that ignores Ctrl-C and ends with its parent."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._starter = os.getpid()

    def start(self) -> None:
        with interrupts_held():
            super().start()

    def run(self) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != self._starter:
                os._exit(1)  # the parent ended during our imports
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for the result
        super().run()


class WorkerContext(SpawnContext):
    """`multiprocessing`, with `Worker` as its process."""

    Process = Worker


@contextmanager
def worker_pool(max_workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of workers. If the block raises, they are killed."""
    pool = ProcessPoolExecutor(max_workers=max_workers, mp_context=WorkerContext())
    try:
        yield pool
    except BaseException:
        with interrupts_held(), _cancelled_work_ignored():
            for child in multiprocessing.active_children():
                child.kill()
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


@contextmanager
def _cancelled_work_ignored() -> Iterator[None]:
    """Suppress a traceback of the pool's own thread about cancelled work.

    In Python 3.11 that thread sets an exception on futures that are already cancelled.
    """
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_type is not InvalidStateError:
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay SIGINT and SIGTERM to the end of the block, and start processes with SIGINT blocked. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])

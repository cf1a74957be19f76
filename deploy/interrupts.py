"""Handling of Ctrl-C and SIGTERM: both raise KeyboardInterrupt, unless the command handles SIGINT itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType

from deploy.services.process import EXIT_INTERRUPTED


def raise_interrupts() -> None:
    """Make Ctrl-C and SIGTERM raise KeyboardInterrupt in the main thread; in any other thread do nothing."""
    if threading.current_thread() is not threading.main_thread():
        return
    # SIGINT is ignored in a process that a script started in the background; keep that.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _as_interrupt)
    sys.unraisablehook = _unraisable


def end_children() -> None:
    """Kill the worker processes that are still running."""
    for child in multiprocessing.active_children():
        child.kill()


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """End the process on a KeyboardInterrupt raised in a finalizer, which Python would otherwise ignore."""
    if what.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(what)
        return
    end_children()
    os._exit(EXIT_INTERRUPTED)

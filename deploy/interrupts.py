"""Ctrl-C and SIGTERM while a command runs: both raise KeyboardInterrupt, unless the command handles SIGINT itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType

from deploy.services.process import EXIT_INTERRUPTED


def raise_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, and SIGTERM does what Ctrl-C does. For the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored: a script has put us into the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _as_interrupt)
    sys.unraisablehook = _unraisable


def end_children() -> None:
    """Kill the worker processes that there still are."""
    for child in multiprocessing.active_children():
        child.kill()


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """Python drops a KeyboardInterrupt that arises in a finalizer; the program must end all the same."""
    if what.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(what)
        return
    end_children()
    os._exit(EXIT_INTERRUPTED)

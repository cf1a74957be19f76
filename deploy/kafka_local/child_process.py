"""Child processes that end together with this process (Linux)."""

from __future__ import annotations

import os
import signal
import sys
import threading

# Runs in the child before the command: the kernel then signals the child when the parent ends for any reason
# (Linux).
_DIE_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, int(sys.argv[2]))\n"  # PR_SET_PDEATHSIG
    "os.getppid() == int(sys.argv[1]) or sys.exit(1)\n"
    "os.execvp(sys.argv[3], sys.argv[3:])\n"
)


def tied_to_us(command: list[str], number: signal.Signals = signal.SIGTERM) -> list[str]:
    """Wrap `command` so that it receives a signal when this process ends for any reason.

    The kernel ties a child to the thread that started it, so this does something on Linux and in the main thread only.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), str(int(number)), *command]

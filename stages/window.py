"""The window: the number of samples of a task in the pipeline at once. It bounds every buffer from device to last stage."""

from __future__ import annotations

from collections.abc import Iterable

from bus.values import Execution

MIN_WINDOW = 8
MAX_WINDOW = 1024
WINDOW_BYTES = 4 << 20


def window_samples(execution: Execution, cut_bytes: Iterable[int]) -> int:
    """How many samples of a task may be under way: one in sequential execution; else eight, which fills six stations, or
    as many more as fit four mebibytes at the widest cut, so that small samples can share frames.
    """
    if execution is Execution.SEQUENTIAL:
        return 1
    return max(MIN_WINDOW, min(MAX_WINDOW, WINDOW_BYTES // max(1, *cut_bytes)))

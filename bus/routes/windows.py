"""How many samples of a task are under way at once, from its execution and the sizes of its samples."""

from __future__ import annotations

from collections.abc import Iterable

from bus.values import Execution

MIN_WINDOW = 8
MAX_WINDOW = 1024
WINDOW_BYTES = 4 << 20
"""Limit for the samples of a window, counted at the widest cut, as far as it exceeds `MIN_WINDOW`."""


def window_samples(execution: Execution, cut_bytes: Iterable[int]) -> int:
    """The window of a task whose samples have these sizes at its cuts.

    It is 1 in sequential execution. Otherwise it is as many samples as fit in `WINDOW_BYTES` at the widest cut, so that small
    samples share frames, and at least `MIN_WINDOW`, which keeps the six parts of the pipeline busy.
    """
    if execution is Execution.SEQUENTIAL:
        return 1
    return max(MIN_WINDOW, min(MAX_WINDOW, WINDOW_BYTES // max(1, *cut_bytes)))

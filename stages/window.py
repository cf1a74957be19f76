"""The window: how many samples of a task are in the pipeline at once.

It bounds every buffer from the device to the last stage.
"""

from __future__ import annotations

from collections.abc import Iterable

from bus.values import Execution

MIN_WINDOW = 8
MAX_WINDOW = 1024
WINDOW_BYTES = 4 << 20


def window_samples(execution: Execution, cut_bytes: Iterable[int]) -> int:
    """The window of a task whose samples have these sizes at its cuts.

    It is 1 in sequential execution. Otherwise it is as many samples as fit in `WINDOW_BYTES` at the widest cut, so that small
    samples share frames, and at least `MIN_WINDOW`, which keeps the six parts of the pipeline busy.
    """
    if execution is Execution.SEQUENTIAL:
        return 1
    return max(MIN_WINDOW, min(MAX_WINDOW, WINDOW_BYTES // max(1, *cut_bytes)))

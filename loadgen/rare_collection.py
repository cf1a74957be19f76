"""The garbage collector, run rarely: most objects of a simulation are freed by their reference counts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rare_collection(after: int) -> Iterator[None]:
    """Set aside the objects that exist, and search for cycles only after `after` net allocations, and at the end.

    Where the process has set objects aside before, those stay so, and no others are set aside.
    """
    thresholds = gc.get_threshold()
    first = gc.get_freeze_count() == 0
    if first:
        gc.freeze()
    gc.set_threshold(after, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.collect()  # visits only what was created since objects were set aside
        if first:
            gc.unfreeze()

"""The garbage collector, run rarely: most objects of a simulation are freed by their reference counts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rare_collection(after: int) -> Iterator[None]:
    """Set aside the objects that exist, and search for cycles only after `after` net allocations, and at the end."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(after, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.collect()  # visits only what was created meanwhile
        gc.unfreeze()

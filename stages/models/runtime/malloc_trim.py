"""Calls that make glibc return freed memory to the system; without effect on other C libraries."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
MAPPED_FROM_BYTES = 4 << 20
"""Blocks of at least this size are mapped individually and returned when freed. By default glibc raises the threshold to
32 MiB after the first large block, and freed activations of 13 MB then stay in its heap.
"""


def map_large_blocks() -> None:
    """Sets the threshold `MAPPED_FROM_BYTES` for this process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


def give_back() -> None:
    """Returns freed memory to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
